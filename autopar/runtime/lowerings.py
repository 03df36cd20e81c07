"""The special programs of ops that need more than running on local shapes, by the name in `Strategy.lowering`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopar.graph.fake import is_fake
from autopar.graph.kernels import logits_gradient  # its module registers autopar::cross_entropy
from autopar.runtime.causal import attend_from
from autopar.runtime.collectives import Axis, all_reduce, exchange_mirrored
from autopar.runtime.expert_exchange import expert_exchange, own_experts
from autopar.runtime.halo import channel_statistics, sync_batch_norm, with_halo
from autopar.runtime.ring_attention import ring_attention
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.windows import Halo

Program = Callable[..., Any]

_embedding = torch.ops.aten.embedding.default
_cross_entropy = torch.ops.aten.cross_entropy_loss.default
_wide_cross_entropy = torch.ops.autopar.cross_entropy.default
MEAN, SUM = 1, 2  # aten's numbers for the reduction of a loss


def vocab_parallel_embedding(
    axis: Axis, weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: Any, **__: Any
) -> Tensor:
    """Partial rows: this rank looks up the indices of its own part of the vocabulary, the others give zeros."""
    first = axis.rank * weight.shape[0]
    local = indices - first
    absent = (local < 0) | (local >= weight.shape[0])
    own_padding = padding_idx - first if 0 <= padding_idx - first < weight.shape[0] else -1
    rows = _embedding(weight, local.masked_fill(absent, 0), own_padding)
    result: Tensor = rows.masked_fill(absent.unsqueeze(-1), 0)
    return result


def vocab_parallel_embedding_bag(
    axis: Axis, op: Program, weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False,
    mode: int = 0, sparse: bool = False, per_sample_weights: Tensor | None = None, *args: Any,
) -> Any:
    """Partial sums of bags: this rank adds the ids of its own part of the vocabulary, the others weigh nothing."""
    local = indices - axis.rank * weight.shape[0]
    absent = (local < 0) | (local >= weight.shape[0])
    given = torch.ones_like(indices, dtype=weight.dtype) if per_sample_weights is None else per_sample_weights
    return op(
        weight, local.masked_fill(absent, 0), offsets, scale_grad_by_freq, mode, sparse, given.masked_fill(absent, 0),
        *args,
    )


def group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The group norm; on CPUs of a contiguous tensor.

    Of one in channels-last order torch (2.13) there ends the process where it is to compute the gradients of weight and
    bias alone, as a backward in two parts has it.
    """
    result: Tensor = torch.ops.aten.group_norm.default(x.contiguous() if x.device.type == "cpu" else x, *args, **kwargs)
    return result


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss of each row from logits (rows, local vocabulary); the softmax is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, axis: Axis, ignore_index: int, num_classes: int
    ) -> Tensor:
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        own = logits.shape[-1]
        if num_classes:  # the last ranks' classes from this one on are padding
            own = min(max(num_classes - axis.rank * own, 0), own)
        top = wide[..., :own].amax(dim=-1) if own else torch.full_like(wide[..., 0], -torch.inf)
        top = all_reduce(axis, top, "max")
        shifted = wide - top.unsqueeze(-1) if wide is logits else wide.sub_(top.unsqueeze(-1))
        shifted[..., own:] = -torch.inf
        local = target - axis.rank * logits.shape[-1]
        ignored = target == ignore_index
        absent = (local < 0) | (local >= logits.shape[-1]) | ignored
        local = local.masked_fill(absent, 0)
        picked = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(absent, 0.0)
        weights = shifted.exp_()
        total, picked = all_reduce(axis, torch.stack((weights.sum(dim=-1), picked)))
        probabilities = weights.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, absent, ignored)
        ctx.dtype = logits.dtype
        losses: Tensor = (total.log() - picked).masked_fill(ignored, 0.0)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        probabilities, local, absent, ignored = ctx.saved_tensors
        scale = grads[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        picked = scale.masked_fill(absent.unsqueeze(-1), 0.0)
        grad = logits_gradient(probabilities, local.unsqueeze(-1), scale, picked, ctx.dtype)
        return grad, None, None, None, None


def vocab_parallel_cross_entropy(
    axis: Axis, logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
    ignore_index: int = -100, label_smoothing: float = 0.0, *, num_classes: int = 0, stays_wide: bool = False,
) -> Tensor:
    """Cross-entropy of logits (rows, vocabulary / n): the same value on every rank, a whole gradient for the loss.

    `stays_wide`: a loss of narrow logits is float32, as `autopar::cross_entropy` gives it, and not in their dtype.

    `num_classes` is the size of a vocabulary that n does not divide: classes from there on are padding, and never win.
    The rows' losses are summed in float32 at least; class weights and label smoothing are not split.
    """
    assert weight is None and label_smoothing == 0.0, "class weights and label smoothing need the whole vocabulary"
    if logits.dim() > 2:  # (rows, vocabulary, ...): the class dim goes last
        logits = logits.movedim(1, -1).flatten(0, -2)
        target = target.flatten()
    losses: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, target, axis, ignore_index, num_classes
    )
    dtype = losses.dtype if stays_wide else logits.dtype
    if reduction == MEAN:
        return (losses.sum() / (target != ignore_index).sum()).to(dtype)
    return losses.sum().to(dtype) if reduction == SUM else losses.to(dtype)


def bias_on_first_rank(axis: Axis, op: Program, bias_position: int, *args: Any, **kwargs: Any) -> Any:
    """An op whose output is partial and whose bias must count once: ranks after the first multiply it with zero."""
    if axis.rank == 0:
        return op(*args, **kwargs)
    if len(args) > bias_position:
        return op(*args[:bias_position], args[bias_position] * 0, *args[bias_position + 1 :], **kwargs)
    return op(*args, **{**kwargs, "bias": kwargs["bias"] * 0})


def scaled(factor: float, op: Program, *args: Any, **kwargs: Any) -> Any:
    """The op's output times a constant: a mean over 1/n of the elements is n times too large to be summed."""
    return op(*args, **kwargs) * factor


def axis_random(axis: Axis, op: Program, *args: Any, **kwargs: Any) -> Any:
    """The op with a random stream of this rank's own.

    The seed is drawn from the global generator, which stays equal on all ranks of the axis; so a recomputation that
    restores the global generator repeats the draw.
    """
    drawn = torch.randint(2**62, (), dtype=torch.int64)
    if is_fake(drawn):  # a dry run draws nothing
        return op(*args, **kwargs)
    seed = int(drawn)
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_cuda]
    devices = [tensors[0].device] if tensors else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + axis.rank)
        return op(*args, **kwargs)


def causal_context(
    axis: Axis, query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0,
    is_causal: bool = True, **keywords: Any,
) -> Tensor:
    """Causal attention of this rank's part of the queries (..., q/n, d) to whole keys and values (..., q, d).

    The rank computes the first half of its own part and the second half of the part of rank n-1-i, whose keys are as
    many fewer as its own are more: all ranks do the same work. Queries and results of second halves are exchanged.
    """
    assert attn_mask is None and is_causal, "a causal mask alone"
    rows = query.shape[-2]
    assert key.shape[-2] == rows * axis.size, "the queries are split over this axis alone"
    half = rows // 2
    run: Program = partial(axis_random, axis, attend_from) if dropout_p else attend_from
    far = (axis.size - 1 - axis.rank) * rows + half
    theirs = exchange_mirrored(axis, query[..., half:, :])
    later = exchange_mirrored(axis, run(theirs, far, key, value, dropout_p, **keywords))
    if not half:
        return later
    earlier = run(query[..., :half, :], axis.rank * rows, key, value, dropout_p, **keywords)
    return torch.cat((earlier, later), dim=-2)


def sum_over_count(
    axes: tuple[Axis, ...], op: Program, ignore_index: int, logits: Tensor, target: Tensor, *args: Any
) -> Tensor:
    """A cross-entropy `op` that sums over this rank's rows, divided by the valid targets of all the axes' ranks."""
    count = (target != ignore_index).sum()
    for axis in axes:
        count = all_reduce(axis, count)
    result: Tensor = op(logits, target, *args) / count
    return result


def special_program(
    name: str, op: Program, axis: Axis, *, bias_position: int = -1, halo: Halo | None = None, num_classes: int = 0
) -> Program:
    """The program called `name` for an op on this rank of the axis."""
    match name:
        case Lowering.VOCAB_PARALLEL_EMBEDDING:
            return partial(vocab_parallel_embedding, axis)
        case Lowering.VOCAB_PARALLEL_EMBEDDING_BAG:
            return partial(vocab_parallel_embedding_bag, axis, op)
        case Lowering.VOCAB_PARALLEL_CROSS_ENTROPY:
            stays_wide = op is _wide_cross_entropy
            return partial(vocab_parallel_cross_entropy, axis, num_classes=num_classes, stays_wide=stays_wide)
        case Lowering.BIAS_ON_FIRST_RANK:
            return partial(bias_on_first_rank, axis, op, bias_position)
        case Lowering.SCALED_MEAN:
            return partial(scaled, 1 / axis.size, op)
        case Lowering.AXIS_RANDOM:
            return partial(axis_random, axis, op)
        case Lowering.CAUSAL_CONTEXT:
            return partial(causal_context, axis)
        case Lowering.RING_ATTENTION:
            return partial(ring_attention, axis)
        case Lowering.SPATIAL_HALO:
            assert halo is not None
            return partial(with_halo, axis, halo, op)
        case Lowering.SYNC_BATCH_NORM:
            return partial(sync_batch_norm, axis)
        case Lowering.CHANNEL_STATISTICS:
            return partial(channel_statistics, axis, op)
        case Lowering.OWN_EXPERTS:
            return partial(own_experts, axis)
        case Lowering.EXPERT_EXCHANGE:
            return partial(expert_exchange, axis)
    raise AssertionError(f"no lowering is called {name!r}")
