"""Several mesh axes at once.

Axes are ordered, outermost first. A tensor's *placement* has one state an axis, each in terms of the tensor as the
axes before it leave it: (S(0), S(0)) splits dim 0 by the first axis and each part again by the second. An op's joint
strategy has one strategy an axis in the same sense: the second is one of the op that a rank of the first axis runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import overload

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import Arg, BlockClass, Op, Ref, TensorInfo
from autopar.sharding.factors import OpFactors, Split
from autopar.sharding.local_args import local_infos, local_op
from autopar.sharding.lowering import Lowering
from autopar.sharding.propagate import ClassStrategies, class_strategies
from autopar.sharding.reshard import divides, local_shape
from autopar.sharding.rules.table import gradients, strategies_with
from autopar.sharding.state import Kind, R, State
from autopar.sharding.strategy import Strategy

Placement = tuple[State, ...]
JointStrategy = tuple[Strategy, ...]

# Lowerings that an axis may use whatever the other axes do: each wraps the program of the axes after it.
WRAPPING = frozenset({
    "", Lowering.AXIS_RANDOM, Lowering.SCALED_MEAN, Lowering.BIAS_ON_FIRST_RANK, Lowering.SUM_OVER_COUNT,
})


def replicated(num_axes: int) -> Placement:
    """The placement of a tensor that is whole on every rank."""
    return (R,) * num_axes


def placement_text(placement: Placement) -> str:
    return " ".join(map(str, placement))


def factor_text(label: str) -> str:
    """A strategy's factor for reading; one that is split below its outermost level, in strides, is told as such."""
    name, _, inner = label.partition(".")
    return f"{name} in strides" if inner else name


def placed_shape(shape: tuple[int, ...], placement: Placement, sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of one rank's part of a tensor of global shape `shape`."""
    for state, size in zip(placement, sizes, strict=True):
        shape = local_shape(shape, state, size)
    return shape


def can_be_placed(shape: tuple[int, ...], placement: Placement, sizes: Sequence[int]) -> bool:
    """Whether every axis in turn divides what the axes before it leave."""
    for state, size in zip(placement, sizes, strict=True):
        if not divides(shape, state, size):
            return False
        shape = local_shape(shape, state, size)
    return True


class JointOptions(Sequence[JointStrategy]):
    """The joint strategies of one op as rows of numbers: row i runs `strategies[ids[i, axis]]` on each axis."""

    def __init__(self, strategies: Sequence[Strategy], ids: NDArray[np.intp]) -> None:
        self.strategies, self.ids = tuple(strategies), ids

    @staticmethod
    def of(options: Sequence[JointStrategy], num_axes: int) -> JointOptions:
        """The same strategies, in the same order."""
        if isinstance(options, JointOptions):
            return options
        number: dict[Strategy, int] = {}
        rows = [[number.setdefault(own, len(number)) for own in choice] for choice in options]
        return JointOptions(tuple(number), np.array(rows, dtype=np.intp).reshape(len(options), num_axes))

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> JointStrategy: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[JointStrategy, ...]: ...
    def __getitem__(self, index: int | slice) -> JointStrategy | tuple[JointStrategy, ...]:
        if isinstance(index, slice):
            return tuple(map(self._row, self.ids[index]))
        return self._row(self.ids[index])

    def __iter__(self) -> Iterator[JointStrategy]:
        return map(self._row, self.ids)

    def __contains__(self, choice: object) -> bool:
        if not isinstance(choice, tuple) or len(choice) != self.ids.shape[1]:
            return False
        found = np.ones(len(self), dtype=np.bool_)
        for axis, own in enumerate(choice):
            found &= np.array([own == other for other in self.strategies], dtype=np.bool_)[self.ids[:, axis]]
        return bool(found.any())

    def only(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> JointOptions:
        """Some of the strategies."""
        return JointOptions(self.strategies, self.ids[rows])

    def _row(self, ids: NDArray[np.intp]) -> JointStrategy:
        return tuple([self.strategies[i] for i in ids])


def joint_strategies(cls: BlockClass, sizes: Sequence[int]) -> dict[str, Sequence[JointStrategy]]:
    """Every way to run each op of the class on axes of these sizes, at most one factor an axis.

    Axes may split the same factor one after the other. A lowering that is no wrapper, because it depends on which part
    of its factor the rank has, is used by one axis at most, and no other axis then splits that factor.
    """
    single: dict[int, ClassStrategies] = {size: class_strategies(cls, size) for size in dict.fromkeys(sizes)}
    if len(sizes) == 1:
        return {name: tuple((strategy,) for strategy in found) for name, found in single[sizes[0]].items()}
    result: dict[str, Sequence[JointStrategy]] = {}
    known: dict[object, JointOptions] = {}
    for op in cls.ops:
        factors = single[sizes[0]].factors.get(op.name)
        if factors is None:  # no rule, or no gradient: whole on every rank
            plain = single[sizes[0]][op.name]
            result[op.name] = tuple(product(plain, repeat=len(sizes)))
            continue
        splits = [single[size].splits.get(op.name, ()) for size in sizes]
        # Ops with one rule at one size have the same choices: a block has many elementwise ones.
        plain = strategies_with(op, cls.tensor, sizes[0], factors, ())
        key = repr(factors), tuple(map(tuple, splits)), tuple(gradients(op, cls.tensor)[0]), plain
        if key not in known:
            known[key] = joint_strategies_with(op, cls.tensor, sizes, factors, splits)
        result[op.name] = known[key]
    return result


def joint_strategies_with(
    op: Op, tensors: Mapping[str, TensorInfo], sizes: Sequence[int], factors: OpFactors,
    splits: Sequence[Sequence[Split]],
) -> JointOptions:
    """Every way to run an op on axes of these sizes with each axis's splits, or none; each choice of states once."""
    tree = _Choices(op, tensors, factors, tuple(sizes), splits)
    ids = tree.following(())
    same = np.array(tree.same)[ids]  # equal rows choose the same states
    code = np.zeros(len(ids), dtype=np.intp)
    for axis in range(len(sizes)):
        _, code = np.unique(code * len(tree.same) + same[:, axis], return_inverse=True)
    _, first = np.unique(code, return_index=True)
    return JointOptions(tree.strategies, ids[np.sort(first)])


class _Choices:
    """The choices of one op, axis by axis; what may follow depends on the splits before it alone and is made once."""

    def __init__(
        self, op: Op, tensors: Mapping[str, TensorInfo], factors: OpFactors, sizes: tuple[int, ...],
        splits: Sequence[Sequence[Split]],
    ) -> None:
        self.sizes, self.splits, self.factors = sizes, splits, factors
        self.differentiable, _ = gradients(op, tensors)
        self.strategies: list[Strategy] = []
        self.same: list[int] = []  # of each strategy, a number of its states
        self._states: dict[tuple[object, ...], int] = {}
        self._number: dict[tuple[Split, tuple[int, ...]], int] = {}
        self._following: dict[tuple[int, tuple[tuple[Split, int], ...]], NDArray[np.intp]] = {}
        self._unsplit = [self._count(own) for own in strategies_with(op, tensors, sizes[0], factors, ())]

    def following(self, earlier: tuple[tuple[Split, int], ...], axis: int = 0) -> NDArray[np.intp]:
        """The strategies of the axes from `axis` on, on the op as the `earlier` splits (with their sizes) leave it."""
        if axis == len(self.sizes):
            return np.zeros((1, 0), dtype=np.intp)
        if not self.factors.joint:  # splits of different factors do not see each other
            earlier = tuple(sorted(earlier, key=lambda done: done[0][0]))
        key = axis, earlier
        if key in self._following:
            return self._following[key]
        size, left = self.sizes[axis], dict(self.factors.sizes)
        for done, parts in earlier:
            left.update((name, left[name] // parts) for name, _ in self.factors.parts(done))
        factors = replace(self.factors, sizes=left)
        rest = self.following(earlier, axis + 1)
        found = [_before(own, rest) for own in self._unsplit]
        for split in self.splits[axis]:
            own = _seen_locally(factors, split, earlier)
            if own is None or factors.refusal(own, size) or not _may_follow(factors, own, earlier):
                continue
            number = self._split(factors, own)
            found.append(_before(number, self.following((*earlier, (own, size)), axis + 1)))
        self._following[key] = np.concatenate(found)
        return self._following[key]

    def _split(self, factors: OpFactors, split: Split) -> int:
        key = split, tuple(factors.sizes.values())
        if key not in self._number:
            self._number[key] = self._count(factors.strategy(split, self.differentiable))
        return self._number[key]

    def _count(self, own: Strategy) -> int:
        self.strategies.append(own)
        self.same.append(self._states.setdefault((own.inputs, own.outputs, own.lowering), len(self._states)))
        return len(self.strategies) - 1


def _before(first: int, rest: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.concatenate([np.full((len(rest), 1), first, dtype=np.intp), rest], axis=1)


def _seen_locally(
    factors: OpFactors, split: Split, earlier: Sequence[tuple[Split, int]]
) -> Split | None:
    """A split of the whole factor in terms of what earlier splits leave of it; None where it would cut across them."""
    (name, inner), *_ = factors.parts(split)
    for done, size in earlier:
        before = dict(factors.parts(done)).get(name)
        if before is None or inner <= before:
            continue
        if inner % (before * size):
            return None
        inner //= size
    return split[0], inner


def _may_follow(factors: OpFactors, split: Split, earlier: Sequence[tuple[Split, int]]) -> bool:
    """Whether the split's lowering can be combined with those of the earlier splits."""
    own_wraps, own = factors.lowering(split[0]) in WRAPPING, {name for name, _ in factors.parts(split)}
    for done, _ in earlier:
        other_wraps, other = factors.lowering(done[0]) in WRAPPING, {name for name, _ in factors.parts(done)}
        if not (own_wraps or other_wraps):
            return False
        if (not own_wraps and _kept_by(factors, split) & other) or (not other_wraps and _kept_by(factors, done) & own):
            return False
    return True


def _kept_by(factors: OpFactors, split: Split) -> set[str]:
    """The factors that no other axis may split beside a lowering that is no wrapper.

    Of a joint split the first is free: tokens that are exchanged for their experts may be fewer.
    """
    first, *rest = (name for name, _ in factors.parts(split))
    return set(rest) or {first}


def local_joint_op(
    op: Op, choice: JointStrategy, tensors: Mapping[str, TensorInfo], sizes: Sequence[int]
) -> Op:
    """The op to call on one rank's operands under a joint strategy: `local_op`, axis after axis."""
    if len(sizes) == 1:
        return local_op(op, choice[0], tensors, sizes[0])
    # An op may read one tensor in two placements, so operands get names of their own while shapes are followed.
    own = [f"{i}:{name}" for i, name in enumerate(op.operands)]
    infos = {alias: replace(tensors[name], name=alias) for alias, name in zip(own, op.operands, strict=True)}
    infos.update({name: tensors[name] for name in op.outputs if name})
    current = _renamed(op, own)
    for strategy, size in zip(choice, sizes, strict=True):
        operands, outputs = local_infos(current, strategy, infos, size)
        following = local_op(current, strategy, infos, size)
        shapes = dict(zip((*current.operands, *current.outputs), (*operands, *outputs), strict=True))
        infos = {name: replace(info, shape=shapes[name]) for name, info in infos.items()}
        current = following
    return _renamed(current, op.operands)


def _renamed(op: Op, names: Sequence[str]) -> Op:
    following = iter(names)

    def rename(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(next(following))
        return tuple(rename(item) for item in arg) if isinstance(arg, tuple) else arg

    args = tuple(rename(arg) for arg in op.args)
    return replace(op, args=args, kwargs=tuple((key, rename(arg)) for key, arg in op.kwargs))


def held_share(placement: Placement, sizes: Sequence[int]) -> float:
    """The share of a tensor's elements that one rank holds."""
    split = (size for state, size in zip(placement, sizes, strict=True) if state.kind is Kind.SHARDED)
    return 1.0 / math.prod(split)
