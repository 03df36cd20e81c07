"""Attention whose keys and values go round the ranks of an axis, each hop behind the products of the step before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.attention_blocks import attend, attend_backward
from autopar.runtime.collectives import Axis, exchange_mirrored, fresh, start_ring_shift, wait

# Rows [start, stop) of the queries, rows [start, stop) of the keys, and whether they are the same rows of the sequence.
Pair = tuple[slice, slice, bool]


def ring_attention(
    axis: Axis, query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """Attention of this rank's part of the queries (..., q/n, d), keys (..., k/n, d) and values (..., k/n, e).

    Under a causal mask each rank first exchanges the second half of its part with rank n-1-i: then all ranks do the
    same work in every step. Keys and values are never whole on a rank, in the forward or in the backward.
    """
    assert attn_mask is None and dropout_p == 0.0, "no mask but the causal one, no dropout"
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    both = torch.cat((key, value), dim=-1)
    if not is_causal:
        return _run(query, both, axis, False, factor)
    assert query.shape[-2] == key.shape[-2], "a causal mask over as many queries as keys"
    half = query.shape[-2] // 2
    out = _run(_swapped(axis, query, half), _swapped(axis, both, half), axis, True, factor)
    return _swapped(axis, out, half)


def _swapped(axis: Axis, x: Tensor, half: int) -> Tensor:
    """The rows with those from `half` on exchanged between ranks i and n-1-i."""
    return torch.cat((x[..., :half, :], exchange_mirrored(axis, x[..., half:, :])), dim=-2)


def _run(query: Tensor, both: Tensor, axis: Axis, is_causal: bool, scale: float) -> Tensor:
    result: Tensor = _Ring.apply(query, both, axis, is_causal, scale)  # type: ignore[no-untyped-call]
    return result


def pairs(size: int, rank: int, other: int, queries: int, keys: int, is_causal: bool) -> Iterator[Pair]:
    """What the queries of a rank attend to among the keys of another; with a causal mask both have been swapped."""
    if not is_causal:
        yield slice(0, queries), slice(0, keys), False
        return
    for number, rows in _halves(size, rank, queries):
        for before, columns in _halves(size, other, keys):
            if before <= number:
                yield rows, columns, before == number


def _halves(size: int, rank: int, rows: int) -> list[tuple[int, slice]]:
    """What a rank has after the swap, numbered in the order of the sequence; the first half of one row is empty."""
    half = rows // 2
    later = (2 * (size - 1 - rank) + 1, slice(half, rows))
    return [(2 * rank, slice(0, half)), later] if half else [later]


class _Ring(torch.autograd.Function):
    """Keys and values side by side go round once forward; backward once more, and their gradients after them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, both: Tensor, axis: Axis, is_causal: bool, scale: float) -> Tensor:
        ctx.axis, ctx.is_causal, ctx.scale = axis, is_causal, scale
        wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
        width = query.shape[-1]
        total = query.new_zeros((*query.shape[:-1], both.shape[-1] - width), dtype=wide)
        log_sum = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
        own = both
        for step in range(axis.size):
            arriving = start_ring_shift(axis, both) if step < axis.size - 1 else None
            key, value = both[..., :width], both[..., width:]
            other = (axis.rank - step) % axis.size
            for rows, columns, is_same in pairs(
                axis.size, axis.rank, other, query.shape[-2], both.shape[-2], is_causal
            ):
                part, part_sum = attend(
                    query[..., rows, :], key[..., columns, :], value[..., columns, :], is_same, scale
                )
                _merge(total[..., rows, :], log_sum[..., rows], part.to(wide), part_sum.to(wide))
            both = both if arriving is None else wait(arriving, both)
        out = total.to(query.dtype)
        ctx.save_for_backward(query, own, out, log_sum)
        return fresh(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, both, out, log_sum = ctx.saved_tensors
        axis, width, grad = ctx.axis, query.shape[-1], grads[0]
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        grad_query = torch.zeros_like(query, dtype=log_sum.dtype)
        returning: Tensor | None = None
        for step in range(axis.size):
            arriving = start_ring_shift(axis, both) if step < axis.size - 1 else None
            key, value = both[..., :width], both[..., width:]
            other = (axis.rank - step) % axis.size
            grad_both = torch.zeros_like(both)
            for rows, columns, is_same in pairs(
                axis.size, axis.rank, other, query.shape[-2], both.shape[-2], ctx.is_causal
            ):
                parts = attend_backward(
                    grad[..., rows, :], query[..., rows, :], key[..., columns, :], value[..., columns, :],
                    out[..., rows, :], log_sum[..., rows], is_same, ctx.scale,
                )
                grad_query[..., rows, :] += parts[0]
                grad_both[..., columns, :width] += parts[1]
                grad_both[..., columns, width:] += parts[2]
            if returning is not None:
                grad_both += wait(returning, both)
            returning = start_ring_shift(axis, grad_both)
            both = both if arriving is None else wait(arriving, both)
        assert returning is not None
        return grad_query.to(query.dtype), wait(returning, both), None, None, None


def _merge(total: Tensor, log_sum: Tensor, part: Tensor, part_sum: Tensor) -> None:
    """Adds the attention of other keys to that of the keys so far, in place."""
    merged = torch.logaddexp(log_sum, part_sum)
    total.mul_((log_sum - merged).exp().unsqueeze(-1)).add_(part * (part_sum - merged).exp().unsqueeze(-1))
    log_sum.copy_(merged)
