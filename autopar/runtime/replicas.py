"""Whole copies of a stage's parameters (ZeRO 0): gradients are summed over the copies while the last backward runs.

FSDP2 would gather and cut up parameters that are whole anyway, and make each a DTensor, which the optimizer pays for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel takes by default


class Replicas:
    """Sums the gradients of one stage's parameters over a group, in buckets, each once a step.

    Buckets go in one order on all ranks: parameters from last to first, as a backward reaches them. `overlaps` says
    whether the backward that runs next is the step's last, so that full buckets may go. Some parameters may have copies
    in a group of their `own` (None: on this rank alone).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], group: dist.ProcessGroup,
        own: Mapping[nn.Parameter, dist.ProcessGroup | None] | None = None,
    ) -> None:
        self.overlaps = False
        groups = {param: (own or {}).get(param, group) for param in params if param.requires_grad}
        self._group_of = {param: each for param, each in groups.items() if each is not None}
        self.buckets = _buckets(self._group_of)
        self._bucket_of = {param: index for index, bucket in enumerate(self.buckets) for param in bucket}
        self._ready: list[set[nn.Parameter]] = [set() for _ in self.buckets]
        self._next = 0
        self._works: list[dist.Work] = []
        hook = _weakly(self.accumulated)
        for param in self._bucket_of:
            param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def launch(self) -> None:
        """Send what has not gone yet."""
        while self._next < len(self.buckets):
            self._send(self.buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Wait until every gradient is the sum over all copies; the next step can begin."""
        self.launch()
        for work in self._works:
            work.wait()
        self._works.clear()
        for ready in self._ready:
            ready.clear()
        self._next, self.overlaps = 0, False

    def accumulated(self, param: Tensor) -> None:
        """A parameter's gradient of this backward is there: said by its hook, or by whoever adds it up elsewhere."""
        assert isinstance(param, nn.Parameter)
        if not self.overlaps or param not in self._bucket_of:
            return
        index = self._bucket_of[param]
        self._ready[index].add(param)
        while self._next < len(self.buckets) and len(self._ready[self._next]) == len(self.buckets[self._next]):
            self._send(self.buckets[self._next])
            self._next += 1

    def _send(self, bucket: list[nn.Parameter]) -> None:
        """Start the sum of a bucket's gradients, which become parts of one tensor."""
        held = [param for param in bucket if param.grad is not None]  # the same on all ranks, which run one program
        gradients = [param.grad for param in held if param.grad is not None]
        if not gradients:
            return
        if len(gradients) == 1 and gradients[0].is_contiguous():
            flat = gradients[0]
        else:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            sizes = [gradient.numel() for gradient in gradients]
            for param, part in zip(held, torch.split(flat, sizes), strict=True):
                param.grad = part.view_as(param)
        work = dist.all_reduce(flat, group=self._group_of[bucket[0]], async_op=True)
        assert work is not None
        self._works.append(work)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook of parameters that does not keep the method's owner, which holds the parameters: no collector sees through
    a tensor's hooks, so that the two, and the process group, would stay for ever."""
    kept = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        alive = kept()
        if alive is not None:
            alive(param)

    return hook


def _buckets(group_of: Mapping[nn.Parameter, dist.ProcessGroup]) -> list[list[nn.Parameter]]:
    """Parameters from last to first, cut where a bucket is full or the dtype or the group changes."""
    found: list[list[nn.Parameter]] = []
    size = 0
    for param in reversed(list(group_of)):
        first = found[-1][0] if found else None
        if first is None or size >= BUCKET_BYTES or (first.dtype, group_of[first]) != (param.dtype, group_of[param]):
            found.append([])
            size = 0
        found[-1].append(param)
        size += param.numel() * param.element_size()
    return found
