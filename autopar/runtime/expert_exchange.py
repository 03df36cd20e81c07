"""Experts that lie on several ranks: each rank's own for tokens that all have, and the exchange of split tokens.

How many tokens go where is known only when the router has chosen, so that parts have unequal sizes: the counts are
exchanged first, and the host waits for them once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.graph.experts import experts
from autopar.graph.fake import is_fake
from autopar.runtime.collectives import Axis

_ops = torch.ops._c10d_functional


def _exchange(axis: Axis, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """The rows that the ranks of the axis sent to this one, in order of rank."""
    result: Tensor = _ops.wait_tensor(_ops.all_to_all_single(rows.contiguous(), received, sent, axis.group_name))
    return result


class _Exchange(torch.autograd.Function):
    """Rows to the ranks where they are wanted; their gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange(axis, rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchange(ctx.axis, grads[0], ctx.received, ctx.sent), None, None, None


def _choices_of_experts(ids: Tensor, num_experts: int) -> Tensor:
    """How many of the choices are of each expert."""
    return ids.new_empty(num_experts) if is_fake(ids) else torch.bincount(ids, minlength=num_experts)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def expert_exchange(
    axis: Axis, hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, transposed: bool = False, gate: str = "",
    *, num_experts: int = 0, inside: Callable[..., tuple[Tensor, Tensor]] = experts,
) -> tuple[Tensor, Tensor]:
    """`autopar::experts` for this rank's tokens, where rank i holds the i-th part of the experts.

    Two all-to-alls in the forward and two in the backward, each of as many rows as there are choices. `inside` runs
    this rank's part of `num_experts` experts, of which axes inside this one may hold parts again; 0: they do not.
    """
    num_tokens, num_choices = index.shape
    num_local = num_experts // axis.size or up.shape[0]
    absent = (index < 0) | (index >= num_local * axis.size)
    ids = index.masked_fill(absent, 0).reshape(-1)  # a choice of no expert goes along with weight zero
    order = torch.argsort(ids, stable=True)
    leaving = _choices_of_experts(ids, num_local * axis.size).view(axis.size, num_local)
    arriving = _exchange(axis, leaving, [1] * axis.size, [1] * axis.size)
    numbers = torch.arange(num_local, device=index.device).repeat(axis.size)
    if is_fake(index):  # a dry run, to which nobody tells how many: each rank sends every other equally many
        sent = received = [(ids.numel() + rank) // axis.size for rank in range(axis.size)]
        own = numbers.new_empty((ids.numel(), 1))
    else:
        sent, received = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()
        own = torch.repeat_interleave(numbers, arriving.flatten()).unsqueeze(1)
    rows: Tensor = _Exchange.apply(hidden[order // num_choices], axis, sent, received)  # type: ignore[no-untyped-call]
    ones = weights.new_ones(own.shape, requires_grad=False)
    results, kept = inside(rows, own, ones, up, down, up_bias, down_bias, transposed, gate)
    back: Tensor = _Exchange.apply(results, axis, received, sent)  # type: ignore[no-untyped-call]
    each = back[torch.argsort(order)].view(num_tokens, num_choices, -1)
    weighted = each * weights.masked_fill(absent, 0).unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype), kept


@torch.compiler.disable  # type: ignore[untyped-decorator]
def own_experts(
    axis: Axis, hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, transposed: bool = False, gate: str = "",
) -> tuple[Tensor, Tensor]:
    """This rank's share of `autopar::experts` for tokens that all ranks have, where rank i holds the i-th part of them.

    Only the choices of this rank's experts are computed and kept.
    """
    own = index - axis.rank * up.shape[0]
    places = ((own >= 0) & (own < up.shape[0])).reshape(-1).nonzero().squeeze(1)
    tokens = places // index.shape[1]
    results, kept = experts(
        hidden[tokens], own.reshape(-1)[places].unsqueeze(1), weights.reshape(-1)[places].unsqueeze(1), up, down,
        up_bias, down_bias, transposed, gate,
    )
    return torch.zeros_like(hidden).index_add(0, tokens, results), kept
