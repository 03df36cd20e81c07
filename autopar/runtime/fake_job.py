"""One rank of a job that does not exist: fake tensors, a fake process group, and a record of what the rank does.

The one file that touches torch's fake process group and its stand-ins for collectives (private; the same in torch 2.11
and 2.13).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from autopar.runtime import host_memory, recompute


@contextlib.contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """While inside, this process is `rank` of a job of `world_size`, whose collectives return at once with any values.

    A process group must not be there yet.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401 # registers how collectives change shapes
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a dry run needs a process without a process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_mode() -> FakeTensorMode:
    """The mode in which a dry run makes all its tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One communication of a rank: a collective over `ranks`, or a message to or from `peer`, one of them."""

    op: str  # all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv, ...
    group: str
    ranks: tuple[int, ...]
    size_bytes: int  # of the operand that both ends must have alike: the larger of input and output
    peer: int | None = None
    during: str = ""  # the pipeline action

    def __str__(self) -> str:
        whom = f"with rank {self.peer}" if self.peer is not None else f"over ranks {_short(self.ranks)}"
        return f"{self.op} of {self.size_bytes} bytes {whom}" + (f" in {self.during}" if self.during else "")


def _short(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]} .. {ranks[-1]}"


class Kind(StrEnum):
    """What a live tensor is for."""

    PARAMETER = "parameters"  # shards at rest and what is gathered of them
    OPTIMIZER = "optimizer"
    ACTIVATION = "activations"  # kept by autograd for the backward
    OTHER = "gradients and buffers"
    HOST = "in host memory"  # not on the device, and no part of its peak


_WORDS = {
    "allreduce_": "all_reduce", "broadcast_": "broadcast", "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "all_gather_into_tensor": "all_gather", "recv_": "recv",
    "reduce_scatter_tensor": "reduce_scatter", "alltoall_base_": "all_to_all", "all_to_all_single": "all_to_all",
}
_MESSAGES = ("send", "recv")


class _NormKernel(torch.autograd.Function):
    """rms_norm of fake tensors as one kernel, which keeps its input, its weight and a float32 number a row."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, dims: int, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(data, weight, data.new_empty(data.shape[: data.dim() - dims], dtype=torch.float32))
        return torch.empty_like(data)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        data, weight, _ = ctx.saved_tensors
        return torch.empty_like(data), None, None if weight is None else torch.empty_like(weight)


def _attention_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attention of fake tensors as the one kernel that has gradients of a mask, such as T5's; a CPU has none."""
    whole = bias.expand(*query.shape[:-1], key.shape[-2])
    found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, whole, True, scale=scale)
    out: Tensor = found[0]
    return out


class _AcceleratorKernels(TorchFunctionMode):
    """Ops keep what an accelerator's kernels keep: a CPU has none for them, does them in steps, and keeps more.

    Dropout of attention is left out, and norms are not computed: on fake tensors nobody sees their values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.ops.aten.scaled_dot_product_attention.default, nn.functional.scaled_dot_product_attention):
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if len(args) > 2 and mask is not None and mask.requires_grad and not kwargs.get("enable_gqa"):
                return _attention_with_bias(args[0], args[1], args[2], mask, kwargs.get("scale"))
        elif func is torch.ops.aten.rms_norm.default:
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            if weight is None or weight.dtype == args[0].dtype:  # else accelerators have no kernel either
                return _NormKernel.apply(args[0], len(args[1]), weight)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


@contextlib.contextmanager
def accelerator_kernels() -> Iterator[None]:
    """While inside, ops keep what they keep on an accelerator; also where the backward computes them again."""
    again = partial(checkpoint, context_fn=lambda: (contextlib.nullcontext(), _AcceleratorKernels()))
    with _AcceleratorKernels(), patch.object(recompute, "checkpoint", again):
        yield


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every communication, and the bytes of all tensors that are alive, by what they are for.

    `peak_bytes` is the most at one moment, `at_peak` of what it was made; `most` is each kind's own maximum.
    Tensors that were there before it was entered are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.during = ""
        self.live: Counter[Kind] = Counter()
        self.most: Counter[Kind] = Counter()
        self.peak_bytes = 0
        self.at_peak: Counter[Kind] = Counter()
        self._hosting = False  # whether what is made now is in host memory
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, Kind]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicated(func, args)
        found = pytree.tree_leaves(result)
        if func.namespace == "fsdp":  # it writes what it gathers into tensors that it is given
            gathers = "split_with_sizes_copy" in str(func)
            for leaf in pytree.tree_leaves((args, kwargs)) + found:
                if isinstance(leaf, Tensor):
                    self.label(leaf, Kind.PARAMETER if gathers else Kind.OTHER, again=False)
        for leaf in found:
            if isinstance(leaf, Tensor):
                self._see(_storage(leaf))
        return result

    def __enter__(self) -> Any:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        self._hooks.__enter__()
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        empty = host_memory.empty_on_host

        def on_host(*args: Any, **kwargs: Any) -> Tensor:
            self._hosting = True
            try:
                return empty(*args, **kwargs)
            finally:
                self._hosting = False

        self._host = patch.object(host_memory, "empty_on_host", on_host)
        self._host.start()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._host.stop()
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._hooks.__exit__(*exception)

    def forget_peak(self) -> None:
        """Count peaks from here on."""
        self.peak_bytes, self.most, self.at_peak = 0, Counter(), Counter()
        self._peak()

    def label(self, tensor: Tensor, kind: Kind, *, again: bool = True) -> None:
        """Say what a tensor's memory is for; `again`: even if that was said already."""
        storage = _storage(tensor)
        self._see(storage)
        known = self._known.get(storage._cdata)
        if known is not None and (again or known[2] is Kind.OTHER) and known[2] is not kind:
            reference, size, before = known
            self.live[before] -= size
            self.live[kind] += size
            self._known[storage._cdata] = reference, size, kind
            self._peak()

    def _saved(self, tensor: Tensor) -> Tensor:
        self.label(tensor, Kind.ACTIVATION, again=False)
        return tensor.detach()  # an output that kept itself would never die

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            reference, before, kind = known
            if before == size:
                return
            self.live[kind] += size - before
            self._known[key] = reference, size, kind
        else:
            def died(_: Any) -> None:
                _, last, kind = self._known.pop(key)
                self.live[kind] -= last

            kind = Kind.HOST if self._hosting else Kind.OTHER
            self._known[key] = weakref.ref(storage, died), size, kind
            self.live[kind] += size
        self._peak()

    def _peak(self) -> None:
        for kind, size in self.live.items():
            if size > self.most[kind]:
                self.most[kind] = size
        total = sum(self.live.values()) - self.live[Kind.HOST]
        if total > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, Counter(self.live)

    def _communicated(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.split("::")[1]
        if name in ("wait_tensor", "barrier"):
            return
        op = _WORDS.get(name, name)
        boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject) and hasattr(arg, "_type")), None)
        group = _group_name(boxed) if boxed is not None else [arg for arg in args if isinstance(arg, str)][-1]
        ranks = tuple(dist.get_process_group_ranks(_resolve(group)))
        sizes = [
            leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)
        ]
        peer = ranks[int(args[2])] if op in _MESSAGES else None
        size = max(sizes, default=0)
        if func.namespace == "_c10d_functional" and op == "all_gather":
            size *= len(ranks)
        self.calls.append(Call(op=op, group=group, ranks=ranks, size_bytes=size, peer=peer, during=self.during))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """The memory that the tensor takes on this rank: a distributed tensor's own storage is as large as the whole."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local().untyped_storage()
    return tensor.untyped_storage()


def _group_name(boxed: Any) -> str:
    from torch._C._distributed_c10d import ProcessGroup

    name: str = ProcessGroup.unbox(boxed).group_name
    return name


def _resolve(name: str) -> Any:
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]
