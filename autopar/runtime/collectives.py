"""Autograd-aware conversions between the states of a tensor on one mesh axis.

Group name, size and rank are baked into each conversion, so that a running program looks nothing up. Everything below
goes through torch's functional collectives, which both eager mode and torch.compile take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, constant_pad_nd

from autopar.sharding.state import Kind, State

_ops = torch.ops._c10d_functional

Fn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One rank's place on a mesh axis: the process group's name, its size, the rank in it, and the axis's own name."""

    group_name: str
    size: int
    rank: int
    name: str = "tp"


def all_reduce(axis: Axis, x: Tensor, op: str = "sum") -> Tensor:
    """Sum (or `op`) of `x` over the axis, as a new tensor."""
    result: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, axis.group_name))
    return result


def sum_over(axes: Sequence[Axis], x: Tensor) -> Tensor:
    """Sum of `x` over all ranks of these axes, outermost first: each rank sums a part of it and gathers the others'."""
    if len(axes) == 1:
        return all_reduce(axes[0], x)
    if x.is_complex():  # gloo scatters no complex numbers
        return torch.view_as_complex(sum_over(axes, torch.view_as_real(x)))
    flat = x.reshape(-1)
    missing = -len(flat) % math.prod(axis.size for axis in axes[1:])
    return _sum_flat(axes, constant_pad_nd(flat, [0, missing]) if missing else flat)[: len(flat)].view(x.shape)


def _sum_flat(axes: Sequence[Axis], flat: Tensor) -> Tensor:
    """`sum_over` of a tensor of one dim that all axes but the first divide."""
    *outer, inner = axes
    if not outer:
        return all_reduce(inner, flat)
    part = _ops.wait_tensor(
        _ops.reduce_scatter_tensor(flat.contiguous(), "sum", inner.size, inner.group_name)
    )
    result: Tensor = _ops.wait_tensor(_ops.all_gather_into_tensor(_sum_flat(outer, part), inner.size, inner.group_name))
    return result


def _stacked_gather(axis: Axis, x: Tensor) -> Tensor:
    """Shape (n, *x.shape): every rank's `x`."""
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous().unsqueeze(0), axis.size, axis.group_name))
    result: Tensor = gathered.view(axis.size, *x.shape)
    return result


def unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`x` with `dim` seen as these sizes, a view (as Tensor.unflatten, whose types torch does not give)."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def split_dim(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """View of `x` with `dim` seen as (outer, size, rest): three dims in its place."""
    assert x.shape[dim] % (outer * size) == 0, f"{x.shape[dim]} does not divide into {outer} x {size}"
    return unflatten(x, dim, (outer, size, x.shape[dim] // (outer * size)))


def pad_dim(axis: Axis, x: Tensor, dim: int) -> Tensor:
    """The tensor with zeros after the dim's last step, so that the axis divides it."""
    missing = -x.shape[dim] % axis.size
    return constant_pad_nd(x, [*[0] * (2 * (x.dim() - 1 - dim)), 0, missing]) if missing else x


def take_shard(axis: Axis, x: Tensor, dim: int, outer: int, length: int = 0) -> Tensor:
    """This rank's shard of a whole tensor: no communication. With a `length`, which is the dim's, it is padded."""
    x = pad_dim(axis, x, dim) if length else x
    shard = split_dim(x, dim, outer, axis.size).select(dim + 1, axis.rank)
    return shard.flatten(dim, dim + 1).contiguous()


def pad_shard(axis: Axis, x: Tensor, dim: int, outer: int, length: int = 0) -> Tensor:
    """A whole tensor that is zero outside this rank's shard `x`: no communication."""
    shard = unflatten(x, dim, (outer, x.shape[dim] // outer))
    whole = shard.new_zeros((*shard.shape[: dim + 1], axis.size, *shard.shape[dim + 1 :]))
    whole.select(dim + 1, axis.rank).copy_(shard)
    return _unpadded(whole.flatten(dim, dim + 2), dim, length)


def _unpadded(x: Tensor, dim: int, length: int) -> Tensor:
    return x.narrow(dim, 0, length) if length else x


def merge_shards(stacked: Tensor, dim: int, outer: int) -> Tensor:
    """The whole tensor from the shards of every rank, stacked on a new dim 0."""
    parts = unflatten(stacked, dim + 1, (outer, stacked.shape[dim + 1] // outer))
    return parts.movedim(0, dim + 1).flatten(dim, dim + 2)


def all_gather(axis: Axis, x: Tensor, dim: int, outer: int, length: int = 0) -> Tensor:
    """The whole tensor from every rank's shard; with a `length`, without the padding after it."""
    return _unpadded(merge_shards(_stacked_gather(axis, x), dim, outer), dim, length)


def reduce_scatter(axis: Axis, x: Tensor, dim: int, outer: int, length: int = 0) -> Tensor:
    """This rank's shard of the sum over the axis; with a `length`, which is the dim's, it is padded."""
    x = pad_dim(axis, x, dim) if length else x
    parts = split_dim(x, dim, outer, axis.size).movedim(dim + 1, 0).flatten(dim + 1, dim + 2).contiguous()
    shape = parts.shape[1:]
    summed = _ops.wait_tensor(_ops.reduce_scatter_tensor(parts, "sum", axis.size, axis.group_name))
    result: Tensor = summed.view(shape)
    return result


def all_to_all(axis: Axis, x: Tensor, src: State, dst: State) -> Tensor:
    """From one sharded dim to another; strides of one dim, and padding, change by a gather and a slice."""
    if src.dim == dst.dim or src.length or dst.length:
        whole = all_gather(axis, x, src.dim, src.outer, src.length)
        return take_shard(axis, whole, dst.dim, dst.outer, dst.length)
    if x.is_complex():  # gloo exchanges no complex numbers
        return torch.view_as_complex(all_to_all(axis, torch.view_as_real(x), src, dst).contiguous())
    parts = split_dim(x, dst.dim, dst.outer, axis.size).movedim(dst.dim + 1, 0)
    parts = parts.flatten(dst.dim + 1, dst.dim + 2).contiguous()
    ones = [1] * axis.size
    received = _ops.wait_tensor(_ops.all_to_all_single(parts, ones, ones, axis.group_name))
    return merge_shards(received.view(parts.shape), src.dim, src.outer)


def _mirrored(axis: Axis, x: Tensor) -> Tensor:
    """The `x` of rank n-1-i, which gets this rank's."""
    splits = [int(rank == axis.size - 1 - axis.rank) for rank in range(axis.size)]
    received = _ops.wait_tensor(
        _ops.all_to_all_single(x.contiguous().unsqueeze(0), splits, splits, axis.group_name)
    )
    result: Tensor = received.view(x.shape)
    return result


def exchange_mirrored(axis: Axis, x: Tensor) -> Tensor:
    """The `x` of rank n-1-i; its gradient goes back the same way."""
    return _apply(x, partial(_mirrored, axis), partial(_mirrored, axis))


def start_ring_shift(axis: Axis, x: Tensor) -> Tensor:
    """Begins to send `x` to the next rank and to receive the one before's, which `wait` gives."""
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sent, received = ([int(rank == other) for rank in range(axis.size)] for other in (to, source))
    started: Tensor = _ops.all_to_all_single(x.contiguous().unsqueeze(0), received, sent, axis.group_name)
    return started


def wait(started: Tensor, like: Tensor) -> Tensor:
    """What a started exchange of tensors of one shape brought."""
    result: Tensor = _ops.wait_tensor(started).view(like.shape)
    return result


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _divide(size: int, x: Tensor) -> Tensor:
    return x / size


def fresh(out: Tensor) -> Tensor:
    """What a forward of an autograd function returns, as a tensor of its own while it is compiled.

    Where the last op gave its operand back (a `contiguous` or `to` with nothing to do), the code that torch 2.11
    compiles routes the gradient elsewhere (https://github.com/pytorch/pytorch/issues/180642): it would be zero.
    """
    return out.view_as(out) if torch.compiler.is_compiling() else out


class _Convert(torch.autograd.Function):
    """`forward_fn` on the value, `backward_fn` on its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_fn: Fn, backward_fn: Fn) -> Tensor:
        ctx.backward_fn = backward_fn
        return fresh(forward_fn(x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.backward_fn(grads[0]), None, None


def _along(fn: Callable[..., Tensor], axis: Axis, state: State) -> Fn:
    return partial(fn, axis, dim=state.dim, outer=state.outer, length=state.length)


def _pair(src: State, dst: State, axis: Axis, inner: Sequence[Axis]) -> tuple[Fn, Fn]:
    """The functions on the value and on the gradient. The gradient of R and of P is whole, that of RP is partial."""
    total = partial(sum_over, (axis, *inner))
    match src.kind, dst.kind:
        case Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD:
            return _same, total
        case Kind.REPLICATED_PARTIAL_GRAD, Kind.REPLICATED:
            return _same, partial(_divide, axis.size)
        case Kind.REPLICATED, Kind.SHARDED:
            return _along(take_shard, axis, dst), _along(all_gather, axis, dst)
        case Kind.REPLICATED_PARTIAL_GRAD, Kind.SHARDED:
            return _along(take_shard, axis, dst), _along(pad_shard, axis, dst)
        case Kind.SHARDED, Kind.REPLICATED:
            return _along(all_gather, axis, src), _along(take_shard, axis, src)
        case Kind.SHARDED, Kind.REPLICATED_PARTIAL_GRAD:
            return _along(all_gather, axis, src), _along(reduce_scatter, axis, src)
        case Kind.PARTIAL, Kind.REPLICATED:
            return total, _same
        case Kind.PARTIAL, Kind.REPLICATED_PARTIAL_GRAD:
            return total, total
        case Kind.PARTIAL, Kind.SHARDED:
            return _along(reduce_scatter, axis, dst), _along(all_gather, axis, dst)
        case Kind.SHARDED, Kind.SHARDED:
            return partial(all_to_all, axis, src=src, dst=dst), partial(all_to_all, axis, src=dst, dst=src)
    raise AssertionError(f"no conversion from {src} to {dst}")


def converter(
    src: State, dst: State, axis: Axis, inner: Sequence[Axis] = (), *, differentiable: bool
) -> Fn | None:
    """The function that takes a tensor from `src` to `dst` on the axis, or None where nothing is to be done.

    `inner`: axes after it that do the same, where it is a sum.
    A tensor without gradient has one replicated state only: R and RP are the same.
    """
    if src == dst:
        return None
    if differentiable:
        forward_fn, backward_fn = _pair(src, dst, axis, inner)
        return partial(_apply, forward_fn=forward_fn, backward_fn=backward_fn)
    forward_fn, _ = _pair(src, dst, axis, inner)
    return None if forward_fn is _same else forward_fn


def _apply(x: Tensor, forward_fn: Fn, backward_fn: Fn) -> Tensor:
    result: Tensor = _Convert.apply(x, forward_fn, backward_fn)  # type: ignore[no-untyped-call]
    return result
