"""What the ranks of a grid of axes compute for an op under a joint strategy, one after another in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from emulated import whole_batch_norm, with_borders

from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import Arg, Literal, Op, Ref, TensorInfo
from autopar.sharding.joint import WRAPPING, JointStrategy, Placement, local_joint_op
from autopar.sharding.local_args import bias_operand
from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import split_shape
from autopar.sharding.rules.windows import halo_of
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import Strategy

T = torch.Tensor
Rank = tuple[int, ...]  # a position on each axis


def overload(target: str) -> Any:
    namespace, packet, name = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), name)


def _values(arg: Arg, operands: Any) -> Any:
    if isinstance(arg, Ref):
        return next(operands)
    if isinstance(arg, tuple):
        return [_values(item, operands) for item in arg]
    if isinstance(arg, Literal):
        return torch.device(arg.value) if arg.kind == "device" else getattr(torch, arg.value)
    return arg


def call(op: Op, operands: list[T]) -> list[T]:
    """The op's tensor outputs, on these operands; an in-place op writes into a copy."""
    given = list(operands)
    packet = op.target.split(".")[1]
    if packet.endswith("_") and not packet.endswith("__"):
        given[0] = given[0].clone()
    feed = iter(given)
    args = [_values(arg, feed) for arg in op.args]
    kwargs = {name: _values(arg, feed) for name, arg in op.kwargs}
    result = overload(op.target)(*args, **kwargs)
    if op.target == EXPERTS_OP:
        return [result[0]]  # the second is for the op's own backward
    return list(result) if isinstance(result, (list, tuple)) else [result]


def shard_of(value: T, state: State, rank: int, size: int) -> T:
    if state.kind is not Kind.SHARDED:
        return value.clone()
    if state.length:
        missing = value.new_zeros([-n % size if d == state.dim else n for d, n in enumerate(value.shape)])
        return torch.cat((value, missing), state.dim).chunk(size, state.dim)[rank].clone()
    split, position = split_shape(tuple(value.shape), state, size)
    shape = list(value.shape)
    shape[state.dim] //= size
    return value.reshape(split).select(position, rank).reshape(shape).clone()


def run_whole(op: Op, operands: list[T]) -> list[T]:
    """The op's outputs in one process."""
    return _dropout(op, operands, tuple(operands[0].shape), (), (), ()) if _drops(op) else call(op, operands)


def run_ranks(
    op: Op, choice: JointStrategy, sizes: Sequence[int], operands: dict[Rank, list[T]], tensors: dict[str, TensorInfo]
) -> dict[Rank, list[T]]:
    """Each rank's outputs from each rank's operands, with the special lowerings simulated."""
    local = local_joint_op(op, choice, tensors, sizes)
    if _drops(op):
        shape, place = tensors[op.outputs[0]].shape, tuple(own.outputs[0] for own in choice)
        return {rank: _dropout(op, given, shape, place, rank, sizes) for rank, given in operands.items()}
    at_of = {own.lowering: at for at, own in enumerate(choice) if own.lowering not in WRAPPING}
    assert len(at_of) <= 1, f"two axes with programs of their own: {choice}"
    wrapped = {low: [at for at, own in enumerate(choice) if own.lowering == low] for low in WRAPPING}
    biased = wrapped[Lowering.BIAS_ON_FIRST_RANK]
    given = {
        rank: [
            x * float(all(rank[at] == 0 for at in biased)) if biased and i == bias_operand(op) else x
            for i, x in enumerate(own)
        ]
        for rank, own in operands.items()
    }
    counting = wrapped[Lowering.SUM_OVER_COUNT]
    if counting:
        local = replace(
            local, args=(*local.args[:3], *(None,) * (3 - len(local.args)), 2, *local.args[4:]), kwargs=()
        )
    if at_of:
        outputs = {}
        for at in at_of.values():
            for group in _groups(sizes, [at]):
                made = _together(op, local, choice[at], [given[rank] for rank in group], tensors, sizes[at])
                outputs.update(zip(group, made, strict=True))
    else:
        outputs = {rank: call(local, own) for rank, own in given.items()}
    for at in wrapped[Lowering.SCALED_MEAN]:
        outputs = {rank: [value / sizes[at] for value in made] for rank, made in outputs.items()}
    if counting:
        ignore = op.args[4] if len(op.args) > 4 else -100
        for group in _groups(sizes, counting):
            count = sum(int((given[rank][1] != ignore).sum()) for rank in group)
            outputs.update({rank: [value / count for value in outputs[rank]] for rank in group})
    return outputs


def _groups(sizes: Sequence[int], axes: Sequence[int]) -> Iterator[list[Rank]]:
    """The ranks that differ in their positions on these axes alone, in order."""
    fixed = [range(1) if at in axes else range(size) for at, size in enumerate(sizes)]
    moving = [range(size) if at in axes else range(1) for at, size in enumerate(sizes)]
    for base in product(*fixed):
        yield [tuple(a + b for a, b in zip(base, step, strict=True)) for step in product(*moving)]


def _together(
    whole: Op, local: Op, strategy: Strategy, ranks: list[list[T]], tensors: dict[str, TensorInfo], size: int
) -> list[list[T]]:
    """The outputs of the ranks of one axis whose program depends on their part, or communicates."""
    match strategy.lowering:
        case Lowering.VOCAB_PARALLEL_CROSS_ENTROPY:
            return _vocab_parallel_cross_entropy(local, ranks, strategy.inputs[0])
        case Lowering.SYNC_BATCH_NORM:
            return whole_batch_norm(ranks, _operand_names(local), local.args[6], local.args[7])  # type: ignore[arg-type]
        case Lowering.CHANNEL_STATISTICS:
            return _channel_statistics(local, ranks)
        case Lowering.SPATIAL_HALO:
            halo = halo_of(whole, strategy, tensors, size)
            wider = with_borders([given[0] for given in ranks], halo)
            made = [call(local, [x, *given[1:]])[0] for x, given in zip(wider, ranks, strict=True)]
            return [[value.narrow(halo.dim, halo.skip, halo.keep)] for value in made]
        case Lowering.RING_ATTENTION:
            key, value = (torch.cat([given[i] for given in ranks], -2) for i in (1, 2))
            return [_causal_part(local, [given[0], key, value], rank) for rank, given in enumerate(ranks)]
        case Lowering.EXPERT_EXCHANGE:
            held = [torch.cat([given[i] for given in ranks]) for i in range(3, len(ranks[0]))]
            return [call(local, [*given[:3], *held]) for given in ranks]
    return [_alone(local, strategy, given, rank) for rank, given in enumerate(ranks)]


def _alone(op: Op, strategy: Strategy, given: list[T], rank: int) -> list[T]:
    """The outputs of one rank under a lowering that only needs to know which part it has."""
    match strategy.lowering:
        case Lowering.VOCAB_PARALLEL_EMBEDDING:
            weight, ids = given
            shifted = ids - rank * weight.shape[0]
            inside = (shifted >= 0) & (shifted < weight.shape[0])
            return [weight[shifted.clamp(0, weight.shape[0] - 1)] * inside.unsqueeze(-1)]
        case Lowering.OWN_EXPERTS:
            return call(op, [given[0], given[1] - rank * given[3].shape[0], *given[2:]])
        case Lowering.VOCAB_PARALLEL_EMBEDDING_BAG:
            weight, ids, offsets = given[:3]
            inside = (ids >= rank * weight.shape[0]) & (ids < (rank + 1) * weight.shape[0])
            rows = weight[(ids - rank * weight.shape[0]) * inside] * inside.unsqueeze(-1)
            rows = rows * given[3].unsqueeze(-1) if len(given) > 3 else rows
            ends = [*offsets.tolist()[1:], len(ids)]
            bags = [rows[a:b].sum(0) for a, b in zip(offsets.tolist(), ends, strict=True)]
            return [torch.stack(bags)]
        case Lowering.CAUSAL_CONTEXT:
            return _causal_part(op, given, rank)
    raise AssertionError(f"no program is known for {strategy.lowering}")


def _causal_part(op: Op, given: list[T], rank: int) -> list[T]:
    """Attention of the rank's part of the queries to all keys, under their part of the causal mask, if it has one."""
    if not (op.args[5] if len(op.args) > 5 else dict(op.kwargs).get("is_causal", False)):
        return call(op, given)
    rows, keys = given[0].shape[-2], given[1].shape[-2]
    mask = torch.ones(keys, keys, dtype=torch.bool).tril()[rank * rows : (rank + 1) * rows]
    kwargs = tuple(item for item in op.kwargs if item[0] != "is_causal")
    return call(replace(op, args=(*op.args[:3], Ref("mask")), kwargs=kwargs), [*given, mask])


def _drops(op: Op) -> bool:
    return "dropout." in op.target


def _dropout(
    op: Op, operands: list[T], shape: tuple[int, ...], place: Placement, rank: Rank, sizes: Sequence[int]
) -> list[T]:
    """Dropout with a mask that is fixed for the whole tensor, of this shape, so that shards can be compared."""
    p, train = op.args[1], op.args[2]
    if not train:
        return [operands[0] * 1]
    assert isinstance(p, float)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) >= p
    for state, position, size in zip(place, rank, sizes, strict=True):
        mask = shard_of(mask, state, position, size)
    result = operands[0] * mask / (1 - p)
    return [result, mask] if "native" in op.target else [result]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The local part of the loss, given what the ranks told one another; backward (softmax - one_hot) of the shard."""

    @staticmethod
    def forward(ctx: Any, logits: T, log_sum: T, target_logit: T, one_hot: T, weight: T) -> T:
        ctx.save_for_backward(torch.exp(logits - log_sum.unsqueeze(1)) - one_hot, weight)
        return (log_sum - target_logit) * weight

    @staticmethod
    def backward(ctx: Any, *grads: T) -> tuple[T | None, ...]:
        difference, weight = ctx.saved_tensors
        return difference * (grads[0] * weight).unsqueeze(1), None, None, None, None


def _vocab_parallel_cross_entropy(op: Op, ranks: list[list[T]], state: State) -> list[list[T]]:
    reduction = op.args[3] if len(op.args) > 3 else 1
    ignore = op.args[4] if len(op.args) > 4 else -100
    logits = [given[0] if given[0].dim() > 1 else given[0].unsqueeze(0) for given in ranks]
    target = ranks[0][1] if ranks[0][0].dim() > 1 else ranks[0][1].unsqueeze(0)
    whole = torch.cat([part.detach() for part in logits], 1)
    log_sum = whole[:, : state.length or None].logsumexp(1)
    padded = torch.zeros_like(whole)
    padded[:, state.length or whole.shape[1] :] = -torch.inf
    logits = [part + bar for part, bar in zip(logits, padded.chunk(len(ranks), 1), strict=True)]
    valid = target != ignore
    safe = target.masked_fill(~valid, 0)
    target_logit = whole.gather(1, safe.unsqueeze(1)).squeeze(1)
    hot = torch.zeros_like(whole).scatter(1, safe.unsqueeze(1), 1.0)
    results = []
    for part, one_hot in zip(logits, hot.chunk(len(ranks), 1), strict=True):
        losses = _VocabParallelCrossEntropy.apply(part, log_sum, target_logit, one_hot, valid.to(whole.dtype))
        if reduction == 0:
            results.append([losses.reshape(ranks[0][1].shape)])
        else:
            results.append([losses.sum() / (valid.sum() if reduction == 1 else 1)])
    return results


def _operand_names(op: Op) -> dict[str, int]:
    """The positions among the operands of a batch norm's tensors by name."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    given = [name for name, arg in zip(names, op.args, strict=False) if isinstance(arg, Ref)]
    return {name: position for position, name in enumerate(given)}


def _channel_statistics(op: Op, ranks: list[list[T]]) -> list[list[T]]:
    """Each rank's batch norm with its part of the running statistics, which all ranks then have whole."""
    names, length = _operand_names(op), ranks[0][0].shape[1]
    running = [names["running_mean"], names["running_var"]]
    results, parts = [], []
    for rank, given in enumerate(ranks):
        own = [given[i].narrow(0, rank * length, length).clone() for i in running]
        operands = list(given)
        for i, value in zip(running, own, strict=True):
            operands[i] = value
        results.append(call(op, operands))
        parts.append(own)
    for given in ranks:
        for place, i in enumerate(running):
            given[i].copy_(torch.cat([own[place] for own in parts]))
    return results
