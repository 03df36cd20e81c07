"""Runs an op on shards, one rank after another in one process, and compares with the whole, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from emulated import whole_batch_norm, with_borders
from fx_class import info_of

from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import Arg, Literal, Op, Ref, TensorInfo
from autopar.sharding.local_args import bias_operand, local_infos, local_op
from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import divides, split_shape
from autopar.sharding.rules import op_factors, strategies_with
from autopar.sharding.rules.windows import halo_of
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import Strategy

T = torch.Tensor


@dataclass
class Sample:
    """A call of an op on real tensors.

    `frozen` lists the operand positions without gradient, `unread` the outputs that nothing reads.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()


@dataclass
class Built:
    """A sample as an Op with its tensors' descriptions, its operands and its outputs as they came out."""

    op: Op
    tensors: dict[str, TensorInfo]
    operands: list[T]
    leaves: list[T]
    outputs: list[T]


def overload(target: str) -> Any:
    namespace, packet, name = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), name)


def _refs(value: Any, operands: list[T]) -> Arg:
    if isinstance(value, torch.Tensor):
        operands.append(value)
        return Ref(f"x{len(operands) - 1}")
    if isinstance(value, (list, tuple)):
        return tuple(_refs(item, operands) for item in value)
    if isinstance(value, torch.dtype):
        return Literal("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Literal("device", str(value))
    return value


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


def unshard(parts: list[T], state: State) -> T:
    if state.length:
        return torch.cat(parts, state.dim).narrow(state.dim, 0, state.length)
    shape = list(parts[0].shape)
    local = shape[state.dim] // state.outer
    pieces = [part.reshape(*shape[: state.dim], state.outer, local, *shape[state.dim + 1 :]) for part in parts]
    shape[state.dim] *= len(parts)
    return torch.stack(pieces, state.dim + 1).reshape(shape)


def addends(value: T, size: int) -> list[T]:
    parts = [torch.randn_like(value) for _ in range(size - 1)]
    return [*parts, value - sum(parts, torch.zeros_like(value))]


def build(sample: Sample) -> Built:
    operands: list[T] = []
    args = tuple(_refs(item, operands) for item in sample.args)
    kwargs = tuple((name, _refs(item, operands)) for name, item in sample.kwargs.items())
    leaves = [
        x.clone().requires_grad_((x.is_floating_point() or x.is_complex()) and i not in sample.frozen)
        for i, x in enumerate(operands)
    ]
    op = Op(name="op", target=sample.target, args=args, kwargs=kwargs, outputs=())
    outputs = reference(op, leaves, [0], 1, Strategy(factor="", inputs=(), outputs=()), None)[0]
    tensors = {f"x{i}": info_of(f"x{i}", x, x.requires_grad) for i, x in enumerate(leaves)}
    tensors |= {f"y{i}": info_of(f"y{i}", y, y.requires_grad) for i, y in enumerate(outputs)}
    names = tuple("" if i in sample.unread else f"y{i}" for i in range(len(outputs)))
    op = Op(name="op", target=sample.target, args=args, kwargs=kwargs, outputs=names)
    return Built(op=op, tensors=tensors, operands=operands, leaves=leaves, outputs=outputs)


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


def padding(parts: list[T], state: State) -> T:
    """What lies in the parts behind the dim's last step; nothing for a shard without padding."""
    whole = torch.cat(parts, state.dim)
    first = state.length or whole.shape[state.dim]
    return whole.narrow(state.dim, first, whole.shape[state.dim] - first)


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


def _dropout(op: Op, operands: list[T], state: State, rank: int, size: int) -> list[T]:
    """Dropout with a mask that is fixed for the whole tensor, so that shards can be compared."""
    shape = list(operands[0].shape)
    if state.kind is Kind.SHARDED:
        shape[state.dim] *= size
    p, train = op.args[1], op.args[2]
    if not train:
        return [operands[0] * 1]
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) >= p
    mask = shard_of(keep, state, rank, size)
    result = operands[0] * mask / (1 - p)
    return [result, mask] if "native" in op.target else [result]


def reference(
    op: Op, leaves: Any, ranks: list[int], size: int, strategy: Strategy, tensors: dict[str, TensorInfo] | None
) -> list[list[T]]:
    """Each rank's outputs, with the special lowerings simulated. `leaves` has the operands of each rank."""
    if size == 1:
        leaves = [leaves]
    local = local_op(op, strategy, tensors, size) if tensors else op
    lowering = strategy.lowering
    if lowering == Lowering.VOCAB_PARALLEL_CROSS_ENTROPY:
        return _vocab_parallel_cross_entropy(local, leaves, strategy.inputs[0])
    if lowering == Lowering.SUM_OVER_COUNT:
        ignore = op.args[4] if len(op.args) > 4 else -100
        count = sum(int((given[1] != ignore).sum()) for given in leaves)
        summed = Op(
            name="", target=op.target, args=(*op.args[:3], *(None,) * (3 - len(op.args)), 2, *op.args[4:]), outputs=()
        )
        return [[value / count for value in call(summed, given)] for given in leaves]
    if lowering == Lowering.SYNC_BATCH_NORM:
        return whole_batch_norm(leaves, _operand_names(op), op.args[6], op.args[7])
    if lowering == Lowering.CHANNEL_STATISTICS:
        return _channel_statistics(op, leaves)
    if lowering == Lowering.SPATIAL_HALO:
        assert tensors is not None
        halo = halo_of(op, strategy, tensors, size)
        wider = with_borders([given[0] for given in leaves], halo)
        made = [call(local, [x, *given[1:]])[0] for x, given in zip(wider, leaves, strict=True)]
        return [[value.narrow(halo.dim, halo.skip, halo.keep)] for value in made]
    if lowering == Lowering.EXPERT_EXCHANGE:
        held = [torch.cat([given[i] for given in leaves]) for i in range(3, len(leaves[0]))]
        return [call(local, [*given[:3], *held]) for given in leaves]
    results = []
    for rank, given in zip(ranks, leaves, strict=True):
        if "dropout." in op.target:
            state = strategy.outputs[0] if strategy.outputs else State(Kind.REPLICATED)
            results.append(_dropout(op, given, state, rank, size))
        elif lowering == Lowering.SCALED_MEAN:
            results.append([value / size for value in call(local, given)])
        elif lowering == Lowering.BIAS_ON_FIRST_RANK:
            position = bias_operand(op)
            biased = [x * float(rank == 0) if i == position else x for i, x in enumerate(given)]
            results.append(call(local, biased))
        elif lowering == Lowering.VOCAB_PARALLEL_EMBEDDING:
            weight, ids = given
            shifted = ids - rank * weight.shape[0]
            inside = (shifted >= 0) & (shifted < weight.shape[0])
            results.append([weight[shifted.clamp(0, weight.shape[0] - 1)] * inside.unsqueeze(-1)])
        elif lowering == Lowering.OWN_EXPERTS:
            results.append(call(local, [given[0], given[1] - rank * given[3].shape[0], *given[2:]]))
        elif lowering == Lowering.VOCAB_PARALLEL_EMBEDDING_BAG:
            weight, ids, offsets = given[:3]
            inside = (ids >= rank * weight.shape[0]) & (ids < (rank + 1) * weight.shape[0])
            rows = weight[(ids - rank * weight.shape[0]) * inside] * inside.unsqueeze(-1)
            rows = rows * given[3].unsqueeze(-1) if len(given) > 3 else rows
            ends = [*offsets.tolist()[1:], len(ids)]
            bags = [rows[a:b].sum(0) for a, b in zip(offsets.tolist(), ends, strict=True)]
            results.append([torch.stack(bags)])
        elif lowering == Lowering.CAUSAL_CONTEXT:
            rows, keys = given[0].shape[-2], given[1].shape[-2]
            mask = torch.ones(keys, keys, dtype=torch.bool).tril()[rank * rows : (rank + 1) * rows]
            kwargs = tuple(item for item in op.kwargs if item[0] != "is_causal")
            masked = replace(op, args=(*op.args[:3], Ref("mask")), kwargs=kwargs)
            results.append(call(masked, [*given, mask]))
        else:
            assert lowering in ("", Lowering.AXIS_RANDOM), lowering
            results.append(call(local, given))
    return results


def _close(actual: T | None, expected: T | None, what: str) -> None:
    if actual is None or expected is None:
        other = actual if expected is None else expected
        assert other is None or not other.any(), f"{what}: gradient on one side alone"
        return
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, whole {tuple(expected.shape)}"
    if not expected.is_floating_point() and not expected.is_complex():
        assert torch.equal(actual, expected), what
        return
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _compare(
    parts: list[T | None], whole: T | None, state: State, what: str, summed: bool, *, is_gradient: bool = False
) -> None:
    """`summed`: this state's parts add up to the whole (P in the forward, RP in the backward)."""
    if whole is None or any(part is None for part in parts):
        for part in parts:
            _close(part, None, what)
        _close(whole, None, what)
    elif state.kind is Kind.SHARDED:
        _close(unshard(parts, state), whole, what)  # type: ignore[arg-type]
        behind = padding(parts, state)  # type: ignore[arg-type]
        assert behind.isfinite().all(), f"{what}: padding that is not finite"
        assert not (is_gradient and behind.any()), f"{what}: padding with a gradient"
    elif summed:
        _close(sum(parts[1:], parts[0]), whole, what)  # type: ignore[arg-type]
    else:
        for part in parts:
            _close(part, whole, what)


def all_splits(built: Built) -> list[tuple[str, int]]:
    """Every factor at every level that divides it."""
    factors = op_factors(built.op, built.tensors)
    assert factors is not None, f"{built.op.target} has no rule"
    single = [(name, o) for name, n in factors.sizes.items() for o in range(1, n + 1) if n % o == 0]
    return [each for split in single for each in factors.with_joint(split)]


def sample_strategies(built: Built, size: int) -> tuple[Strategy, ...]:
    factors = op_factors(built.op, built.tensors)
    return strategies_with(built.op, built.tensors, size, factors, all_splits(built))


def check(built: Built, strategy: Strategy, size: int) -> None:
    """Raises AssertionError where the op on shards, put together, differs from the whole op."""
    op, title = built.op, f"{built.op.target} {strategy} on {size}"
    leaves: list[list[T]] = [[] for _ in range(size)]
    for whole, leaf, state in zip(built.operands, built.leaves, strategy.inputs, strict=True):
        assert divides(tuple(whole.shape), state, size), title
        partial = addends(whole, size) if state.kind is Kind.PARTIAL else []
        for rank in range(size):
            part = partial[rank] if partial else shard_of(whole, state, rank, size)
            leaves[rank].append(part.detach().requires_grad_(leaf.requires_grad))
    outputs = reference(op, leaves, list(range(size)), size, strategy, built.tensors)

    _, shapes = local_infos(op, strategy, built.tensors, size)
    for index, (whole, state) in enumerate(zip(built.outputs, strategy.outputs, strict=True)):
        if not op.outputs[index]:
            continue
        parts = [given[index].detach() for given in outputs]
        assert all(tuple(part.shape) == shapes[index] for part in parts), f"{title}: local output shape"
        _compare(list(parts), whole.detach(), state, f"{title}: output {index}", state.kind is Kind.PARTIAL)
    for index, (leaf, state) in enumerate(zip(built.leaves, strategy.inputs, strict=True)):
        if not leaf.requires_grad and state.kind is not Kind.PARTIAL:  # running statistics are written to
            _compare([given[index] for given in leaves], leaf, state, f"{title}: operand {index} afterwards", False)

    with_grad = [index for index, whole in enumerate(built.outputs) if whole.requires_grad and op.outputs[index]]
    wanted = [index for index, leaf in enumerate(built.leaves) if leaf.requires_grad]
    if not with_grad or not wanted:
        return
    whole_grads = [torch.randn_like(built.outputs[index]) for index in with_grad]
    expected = torch.autograd.grad(
        [built.outputs[i] for i in with_grad], [built.leaves[i] for i in wanted], whole_grads,
        allow_unused=True, retain_graph=True,
    )  # fmt: skip
    spread = [
        addends(grad, size) if strategy.outputs[i].kind is Kind.REPLICATED_PARTIAL_GRAD
        else [shard_of(grad, strategy.outputs[i], rank, size) for rank in range(size)]
        for i, grad in zip(with_grad, whole_grads, strict=True)
    ]  # fmt: skip
    # All ranks at once: what a rank borrowed of another's tensors gives its gradient back.
    together = torch.autograd.grad(
        [outputs[rank][i] for rank in range(size) for i in with_grad],
        [leaves[rank][i] for rank in range(size) for i in wanted],
        [parts[rank] for rank in range(size) for parts in spread], allow_unused=True,
    )
    found: list[tuple[T | None, ...]] = [
        tuple(together[rank * len(wanted) : (rank + 1) * len(wanted)]) for rank in range(size)
    ]
    for position, index in enumerate(wanted):
        state = strategy.inputs[index]
        parts = [grads[position] for grads in found]
        if state.kind is Kind.REPLICATED_PARTIAL_GRAD:
            parts = [torch.zeros_like(leaves[0][index]) if part is None else part for part in parts]
        summed = state.kind is Kind.REPLICATED_PARTIAL_GRAD
        whole = expected[position]
        if summed and whole is None:
            whole = torch.zeros_like(built.operands[index])
        _compare(parts, whole, state, f"{title}: gradient of operand {index}", summed, is_gradient=True)
