"""Runs an op on shards, one rank after another in one process, and compares with the whole, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from fx_class import info_of
from rank_programs import Rank, run_ranks, run_whole, shard_of

from autopar.graph.model_graph import Arg, Literal, Op, Ref, TensorInfo
from autopar.sharding.joint import JointStrategy, Placement, can_be_placed, joint_strategies_with, placed_shape
from autopar.sharding.rules import op_factors, strategies_with
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


def build(sample: Sample) -> Built:
    operands: list[T] = []
    args = tuple(_refs(item, operands) for item in sample.args)
    kwargs = tuple((name, _refs(item, operands)) for name, item in sample.kwargs.items())
    leaves = [
        x.clone().requires_grad_((x.is_floating_point() or x.is_complex()) and i not in sample.frozen)
        for i, x in enumerate(operands)
    ]
    op = Op(name="op", target=sample.target, args=args, kwargs=kwargs, outputs=())
    outputs = run_whole(op, leaves)
    tensors = {f"x{i}": info_of(f"x{i}", x, x.requires_grad) for i, x in enumerate(leaves)}
    tensors |= {f"y{i}": info_of(f"y{i}", y, y.requires_grad) for i, y in enumerate(outputs)}
    names = tuple("" if i in sample.unread else f"y{i}" for i in range(len(outputs)))
    op = Op(name="op", target=sample.target, args=args, kwargs=kwargs, outputs=names)
    return Built(op=op, tensors=tensors, operands=operands, leaves=leaves, outputs=outputs)


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


def _spread(value: T, placement: Placement, sizes: Sequence[int], summed: Kind) -> dict[Rank, T]:
    """Each rank's part; in a state of the kind `summed` the parts are addends."""
    parts: dict[Rank, T] = {(): value}
    for state, size in zip(placement, sizes, strict=True):
        made = {}
        for rank, part in parts.items():
            if state.kind is summed:
                pieces = addends(part, size)
            else:
                pieces = [shard_of(part, state, position, size) for position in range(size)]
            made.update({(*rank, position): piece for position, piece in enumerate(pieces)})
        parts = made
    return parts


def _close(actual: T, expected: T, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, whole {tuple(expected.shape)}"
    if not expected.is_floating_point() and not expected.is_complex():
        assert torch.equal(actual, expected), what
        return
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def padding(parts: list[T], state: State) -> T:
    """What lies in the parts behind the dim's last step; nothing for a shard without padding."""
    whole = torch.cat(parts, state.dim)
    first = state.length or whole.shape[state.dim]
    return whole.narrow(state.dim, first, whole.shape[state.dim] - first)


def _joined(parts: list[T], state: State, what: str, summed: Kind, is_gradient: bool) -> T:
    """What the parts of one axis make together; those of a replicated tensor are equal."""
    if state.kind is Kind.SHARDED:
        behind = padding(parts, state)
        assert behind.isfinite().all(), f"{what}: padding that is not finite"
        assert not (is_gradient and behind.any()), f"{what}: padding with a gradient"
        return unshard(parts, state)
    if state.kind is summed:
        return sum(parts[1:], parts[0])
    for part in parts[1:]:
        _close(part, parts[0], f"{what}: ranks differ")
    return parts[0]


def _compare(
    parts: dict[Rank, T], whole: T, placement: Placement, what: str, summed: Kind, *, is_gradient: bool = False
) -> None:
    """Puts the ranks' parts together, the last axis first; parts in a state of the kind `summed` are added."""
    for state in reversed(placement):
        groups: dict[Rank, list[T]] = {}
        for rank, part in parts.items():
            groups.setdefault(rank[:-1], []).append(part)
        parts = {rank: _joined(group, state, what, summed, is_gradient) for rank, group in groups.items()}
    _close(parts[()], whole, what)


def all_splits(built: Built) -> list[tuple[str, int]]:
    """Every factor at every level that divides it."""
    factors = op_factors(built.op, built.tensors)
    assert factors is not None, f"{built.op.target} has no rule"
    single = [(name, o) for name, n in factors.sizes.items() for o in range(1, n + 1) if n % o == 0]
    return [each for split in single for each in factors.with_joint(split)]


def sample_strategies(built: Built, size: int) -> tuple[Strategy, ...]:
    factors = op_factors(built.op, built.tensors)
    return strategies_with(built.op, built.tensors, size, factors, all_splits(built))


def sample_joint_strategies(built: Built, sizes: Sequence[int]) -> tuple[JointStrategy, ...]:
    """Every way to run the sample on these axes, each factor at every level."""
    factors = op_factors(built.op, built.tensors)
    assert factors is not None, f"{built.op.target} has no rule"
    return joint_strategies_with(built.op, built.tensors, sizes, factors, [all_splits(built)] * len(sizes))


def check(built: Built, strategy: Strategy, size: int) -> None:
    """Raises AssertionError where the op on shards, put together, differs from the whole op."""
    check_jointly(built, (strategy,), (size,))


def check_jointly(built: Built, choice: JointStrategy, sizes: Sequence[int]) -> None:
    """The same on several axes, under one strategy an axis."""
    op, title = built.op, f"{built.op.target} {choice} on {sizes}"
    inputs: list[Placement] = list(zip(*(own.inputs for own in choice), strict=True))
    outputs: list[Placement] = list(zip(*(own.outputs for own in choice), strict=True))
    leaves: dict[Rank, list[T]] = {rank: [] for rank in product(*map(range, sizes))}
    for whole, leaf, place in zip(built.operands, built.leaves, inputs, strict=True):
        assert can_be_placed(tuple(whole.shape), place, sizes), title
        for rank, part in _spread(whole, place, sizes, Kind.PARTIAL).items():
            leaves[rank].append(part.detach().requires_grad_(leaf.requires_grad))
    made = run_ranks(op, choice, sizes, leaves, built.tensors)

    for index, (whole, place) in enumerate(zip(built.outputs, outputs, strict=True)):
        if not op.outputs[index]:
            continue
        parts = {rank: own[index].detach() for rank, own in made.items()}
        shape = placed_shape(tuple(whole.shape), place, sizes)
        assert all(tuple(part.shape) == shape for part in parts.values()), f"{title}: local output shape"
        _compare(parts, whole.detach(), place, f"{title}: output {index}", Kind.PARTIAL)
    for index, (leaf, place) in enumerate(zip(built.leaves, inputs, strict=True)):
        if not leaf.requires_grad:  # running statistics are written to
            parts = {rank: own[index] for rank, own in leaves.items()}
            _compare(parts, leaf, place, f"{title}: operand {index} afterwards", Kind.PARTIAL)

    with_grad = [index for index, whole in enumerate(built.outputs) if whole.requires_grad and op.outputs[index]]
    wanted = [index for index, leaf in enumerate(built.leaves) if leaf.requires_grad]
    if not with_grad or not wanted:
        return
    whole_grads = [torch.randn_like(built.outputs[index]) for index in with_grad]
    expected = torch.autograd.grad(
        [built.outputs[i] for i in with_grad], [built.leaves[i] for i in wanted], whole_grads,
        retain_graph=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    spread = [
        _spread(grad, outputs[i], sizes, Kind.REPLICATED_PARTIAL_GRAD)
        for i, grad in zip(with_grad, whole_grads, strict=True)
    ]
    # All ranks at once: what a rank borrowed of another's tensors gives its gradient back.
    together = torch.autograd.grad(
        [made[rank][i] for rank in leaves for i in with_grad],
        [leaves[rank][i] for rank in leaves for i in wanted],
        [parts[rank] for rank in leaves for parts in spread], allow_unused=True, materialize_grads=True,
    )
    for position, index in enumerate(wanted):
        parts = {rank: together[at * len(wanted) + position] for at, rank in enumerate(leaves)}
        what = f"{title}: gradient of operand {index}"
        _compare(parts, expected[position], inputs[index], what, Kind.REPLICATED_PARTIAL_GRAD, is_gradient=True)
