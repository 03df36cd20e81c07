"""Shardings at another number of rows than they were written for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import ClassSharding, Strategy


def at_other_rows(
    choices: Sequence[ClassSharding], graph: ModelGraph, before: int, after: int
) -> tuple[ClassSharding, ...]:
    """Choices written for `before` rows as they are at `after` rows; `graph` has tagged rows or as many as `before`.

    No axis inside a stage splits rows. Where one splits a dim that holds rows and something else (a view that merged
    batch and sequence), the rows are among the blocks outside the split, S(0, outer = rows): they follow the number.
    """
    if before == after:
        return tuple(choices)
    return tuple(_changed(choice, graph.block_class[choice.cls], graph.rows, before, after) for choice in choices)


def _changed(choice: ClassSharding, cls: BlockClass, tag: int, before: int, after: int) -> ClassSharding:
    def state(name: str, own: State) -> State:
        if own.kind is not Kind.SHARDED or not name:
            return own
        shape = cls.tensor[name].shape
        holds_rows = own.dim < len(shape) and shape[own.dim] > 0 and shape[own.dim] % tag == 0
        if not holds_rows or own.outer % before:
            return own
        return replace(own, outer=own.outer // before * after)

    def states(names: Sequence[str], own: Sequence[State]) -> tuple[State, ...]:
        return tuple(state(name, one) for name, one in zip(names, own, strict=True))

    ops: list[tuple[str, Strategy]] = []
    for op, (name, strategy) in zip(cls.ops, choice.ops, strict=True):
        inputs, outputs = states(op.operands, strategy.inputs), states(op.outputs, strategy.outputs)
        ops.append((name, replace(strategy, inputs=inputs, outputs=outputs)))
    return replace(
        choice, inputs=states(cls.inputs, choice.inputs), outputs=states(cls.outputs, choice.outputs), ops=tuple(ops)
    )
