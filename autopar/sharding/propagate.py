"""The strategies of a whole block class, with the strided splits that its ops pass to one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from autopar.graph.model_graph import BlockClass, Op
from autopar.sharding.factors import OpFactors, Split
from autopar.sharding.rules.table import gradients, op_factors, strategies_with
from autopar.sharding.state import Kind, R, State
from autopar.sharding.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStrategies(Mapping[str, tuple[Strategy, ...]]):
    """The strategies of each op by its name (a mapping), and the ops that have no rule and run whole."""

    strategies: dict[str, tuple[Strategy, ...]]
    unruled: tuple[str, ...] = ()
    factors: dict[str, OpFactors] = field(default_factory=dict, repr=False)
    splits: dict[str, tuple[Split, ...]] = field(default_factory=dict, repr=False)  # of each op that has factors

    def __getitem__(self, name: str) -> tuple[Strategy, ...]:
        return self.strategies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.strategies)

    def __len__(self) -> int:
        return len(self.strategies)


def class_strategies(cls: BlockClass, size: int) -> ClassStrategies:
    """Every way to run each op of the class on an axis of `size` ranks.

    A fixed point: an op starts with one split a factor; when a neighbour can leave or take a shared tensor in a strided
    shard, the op also gets the split that makes that shard, if it has one. Ops whose tensors come from the class's
    inputs with no gradient anywhere before them (masks, positions) are pinned to R. Padded shards begin at parameters,
    whose sizes no batch changes, and are passed on by the neighbours that can.
    """
    tensors = cls.tensor
    factors: dict[str, OpFactors] = {}
    unruled: list[str] = []
    pinned = _pinned(cls)
    for op in cls.ops:
        found = op_factors(op, tensors)
        if found is None:
            unruled.append(op.name)
        elif op.name not in pinned:
            factors[op.name] = found

    splits: dict[str, dict[Split, None]] = {name: {} for name in factors}
    for op in cls.ops:
        for plain in factors[op.name].default_splits() if op.name in factors else ():
            if not factors[op.name].refusal(plain, size, may_pad=_in_parameter(cls, op, factors[op.name], plain)):
                splits[op.name][plain] = None
    states: dict[str, dict[State, None]] = {name: {} for name in tensors}
    ops = [op for op in cls.ops if op.name in factors]
    seen: dict[tuple[str, int], int] = {}  # of an op's tensor, how many of its states the op has looked at
    passed_on = dict.fromkeys(factors, 0)  # of an op's splits, how many have made states
    grew = True
    while grew:
        grew = False
        for op in ops:
            found = factors[op.name]
            placed = [*zip(op.operands, found.operands, strict=True), *zip(op.outputs, found.outputs, strict=True)]
            for place, (name, dims) in enumerate(placed):
                known = states.get(name, {})
                for state in islice(known, seen.get((op.name, place), 0), None):
                    split = found.split_for(dims, state)
                    for each in found.with_joint(split) if split else ():
                        if not found.refusal(each, size, may_pad=bool(state.length)):
                            splits[op.name].setdefault(each)
                seen[op.name, place] = len(known)
            differentiable, _ = gradients(op, tensors)
            for split in islice(splits[op.name], passed_on[op.name], None):
                strategy = found.strategy(split, differentiable, size)
                for name, state in zip((*op.operands, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True):
                    if name and state.kind is Kind.SHARDED and state not in states[name]:
                        states[name][state] = None
                        grew = True
            passed_on[op.name] = len(splits[op.name])

    result: dict[str, tuple[Strategy, ...]] = {}
    for op in cls.ops:
        if op.name in pinned:
            result[op.name] = (Strategy(factor="", inputs=(R,) * len(op.operands), outputs=(R,) * len(op.outputs)),)
        else:
            chosen = splits.get(op.name, ())
            result[op.name] = strategies_with(op, tensors, size, factors.get(op.name), chosen)
    return ClassStrategies(
        strategies=result, unruled=tuple(unruled), factors=factors,
        splits={name: tuple(found) for name, found in splits.items()},
    )


def _in_parameter(cls: BlockClass, op: Op, factors: OpFactors, split: Split) -> bool:
    """Whether the split factor lies in a parameter."""
    return any(
        name in cls.params and any(split[0] in names for names in dims)
        for name, dims in zip(op.operands, factors.operands, strict=True)
    )


def _pinned(cls: BlockClass) -> frozenset[str]:
    """The ops that no gradient reaches and that read nothing computed from a tensor with a gradient."""
    derived = {info.name for info in cls.tensors if info.requires_grad}
    pinned = set()
    for op in cls.ops:
        if derived.isdisjoint((*op.operands, *op.outputs)):
            pinned.add(op.name)
        else:
            derived.update(name for name in op.outputs if name)
    return frozenset(pinned)
