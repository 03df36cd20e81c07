"""Programs of image networks: borders borrowed from neighbours, and batch norms with the statistics of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.collectives import Axis, all_gather, all_reduce
from autopar.sharding.rules.windows import Halo

_ops = torch.ops._c10d_functional


def _swap(
    axis: Axis, to_previous: Tensor, to_next: Tensor, dim: int, num_from_previous: int, num_from_next: int
) -> tuple[Tensor, Tensor]:
    """What the neighbours sent along `dim`; empty where the axis ends. One uneven all-to-all."""
    first, last = axis.rank == 0, axis.rank == axis.size - 1
    sent, received = [0] * axis.size, [0] * axis.size
    pieces = []
    if not first:
        sent[axis.rank - 1], received[axis.rank - 1] = to_previous.shape[dim], num_from_previous
        pieces.append(to_previous)
    if not last:
        sent[axis.rank + 1], received[axis.rank + 1] = to_next.shape[dim], num_from_next
        pieces.append(to_next)
    outgoing = torch.cat([piece.movedim(dim, 0) for piece in pieces]).contiguous()
    incoming = _ops.wait_tensor(_ops.all_to_all_single(outgoing, received, sent, axis.group_name)).movedim(0, dim)
    from_previous = 0 if first else num_from_previous
    return incoming.narrow(dim, 0, from_previous), incoming.narrow(dim, from_previous, 0 if last else num_from_next)


def _end(border: Tensor, dim: int, length: int, fill: str) -> Tensor:
    """What stands beyond an end of the whole, next to `border` (one position)."""
    if fill == "edge":
        return border.expand(*(length if i == dim else size for i, size in enumerate(border.shape)))
    shape = [length if i == dim else size for i, size in enumerate(border.shape)]
    return border.new_full(shape, 0.0 if fill == "zero" else float("-inf"))


class _Borrow(torch.autograd.Function):
    """A part with the borders of its neighbours; the borders' gradients go back and are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, halo: Halo) -> Tensor:
        ctx.axis, ctx.halo = axis, halo
        dim, length = halo.dim, x.shape[halo.dim]
        before, after = _swap(
            axis, x.narrow(dim, 0, halo.after), x.narrow(dim, length - halo.before, halo.before), dim,
            halo.before, halo.after,
        )
        if axis.rank == 0:
            before = _end(x.narrow(dim, 0, 1), dim, halo.before, halo.fill)
        if axis.rank == axis.size - 1:
            after = _end(x.narrow(dim, length - 1, 1), dim, halo.after, halo.fill)
        return torch.cat((before, x, after), dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        axis, halo = ctx.axis, ctx.halo
        dim, length = halo.dim, grads[0].shape[halo.dim] - halo.before - halo.after
        before, own, after = grads[0].split((halo.before, length, halo.after), dim)
        mine = own.clone()
        # The previous rank borrowed this rank's first positions as its `after`, the next one the last as its `before`.
        from_previous, from_next = _swap(axis, before, after, dim, halo.after, halo.before)
        if axis.rank > 0:
            mine.narrow(dim, 0, halo.after).add_(from_previous)
        elif halo.fill == "edge":
            mine.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
        if axis.rank < axis.size - 1:
            mine.narrow(dim, length - halo.before, halo.before).add_(from_next)
        elif halo.fill == "edge":
            mine.narrow(dim, length - 1, 1).add_(after.sum(dim, keepdim=True))
        return mine, None, None


def with_halo(axis: Axis, halo: Halo, op: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The op's output at this rank's positions, from its part `x` and borders of its neighbours' parts."""
    wider = _Borrow.apply(x, axis, halo)  # type: ignore[no-untyped-call]
    result: Tensor = op(wider, *args, **kwargs)
    dim = result.dim() - x.dim() + halo.dim
    return result if result.shape[dim] == halo.keep else result.narrow(dim, halo.skip, halo.keep)


class _SyncBatchNorm(torch.autograd.Function):
    """Output, mean and sum of squared deviations of a batch norm whose batch or positions lie on all ranks.

    The parts' moments are put together as Chan et al. (1983) do, which loses no digits where the mean is large. With
    the moments known, what is left is the norm in evaluation and, in the backward, its sums of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: Axis, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(x)
        count = x.numel() // x.shape[1]
        own_var, own_mean = torch.var_mean(wide, _others(x), correction=0)
        moments = all_gather(axis, torch.stack((own_mean, own_var * count)).unsqueeze(0), 0, 1)
        mean = moments[:, 0].mean(0)
        square = moments[:, 1].sum(0) + count * (moments[:, 0] - mean).square().sum(0)
        var = square / (count * axis.size)
        out = torch.batch_norm(x, _wide(weight), _wide(bias), mean, var, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.axis, ctx.eps = axis, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, square)
        return out, mean, square

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        scale, count = (var + ctx.eps).rsqrt(), x.numel() // x.shape[1] * ctx.axis.size
        unit = torch.ones_like(mean)
        _, along, total = _norm_backward(
            grads[0], x, unit, mean, var, mean, scale, False, ctx.eps, [False, True, True]
        )
        to_weight = None if weight is None else along.to(weight.dtype)
        to_bias = None if ctx.bias_dtype is None else total.to(ctx.bias_dtype)
        total, along = all_reduce(ctx.axis, torch.stack((total, along))) / count
        # scale * weight * (grad - total - (x - mean) * scale * along), as the gradient, x and a constant a channel.
        slope = scale if weight is None else scale * _wide(weight)
        of_x = -slope * scale * along
        constant = -slope * total - of_x * mean
        to_x = torch.addcmul(_per_channel(constant, x), grads[0], _per_channel(slope, x))
        return torch.addcmul(to_x, x, _per_channel(of_x, x)).to(x.dtype), to_weight, to_bias, None, None


_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def _wide(value: Any) -> Any:
    """A tensor in float32 at least."""
    return value.float() if value is not None and value.dtype in (torch.float16, torch.bfloat16) else value


def _others(x: Tensor) -> list[int]:
    """Every dim but the channels'."""
    return [0, *range(2, x.dim())]


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))


def sync_batch_norm(
    axis: Axis, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, *_: Any,
) -> Tensor:
    """aten.batch_norm in training on this rank's part of the batch or of the positions.

    Not training: with the running statistics, for which no other rank is asked.
    """
    if not training:
        return torch.batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, False)
    out, mean, square = _SyncBatchNorm.apply(x, weight, bias, axis, eps)  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            count = x.numel() // x.shape[1] * axis.size
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((square / (count - 1)).to(running_var.dtype), momentum)
    result: Tensor = out
    return result


def channel_statistics(
    axis: Axis, op: Callable[..., Any], x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor,
    running_var: Tensor, *args: Any,
) -> Tensor:
    """aten.batch_norm on this rank's channels; in training the whole running statistics are brought up to date."""
    first, length = axis.rank * x.shape[1], x.shape[1]
    mean, var = (running.narrow(0, first, length).clone() for running in (running_mean, running_var))
    result: Tensor = op(x, weight, bias, mean, var, *args)
    if not args[0]:
        return result
    with torch.no_grad():
        whole = all_gather(axis, torch.stack((mean, var)), 1, 1)
        running_mean.copy_(whole[0])
        running_var.copy_(whole[1])
    return result
