"""The strategies of a whole block class, with the strided splits that its ops pass to one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from autopar.graph.model_graph import BlockClass
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
    inputs with no gradient anywhere before them (masks, positions) are pinned to R.
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

    splits: dict[str, dict[Split, None]] = {name: dict.fromkeys(f.default_splits()) for name, f in factors.items()}
    states: dict[str, dict[State, None]] = {name: {} for name in tensors}
    ops = [op for op in cls.ops if op.name in factors]
    grew = True
    while grew:
        grew = False
        for op in ops:
            found = factors[op.name]
            placed = [*zip(op.operands, found.operands, strict=True), *zip(op.outputs, found.outputs, strict=True)]
            for name, dims in placed:
                for state in states.get(name, ()):
                    split = found.split_for(dims, state)
                    for each in found.with_joint(split) if split else ():
                        if not found.refusal(each, size):
                            splits[op.name].setdefault(each)
            differentiable, _ = gradients(op, tensors)
            for split in splits[op.name]:
                if found.refusal(split, size):
                    continue
                strategy = found.strategy(split, differentiable)
                for name, state in zip((*op.operands, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True):
                    if name and state.kind is Kind.SHARDED and state not in states[name]:
                        states[name][state] = None
                        grew = True

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
