"""What an op does on one mesh axis, and what a whole block class does: the values that the search chooses among."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from autopar.sharding.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to run an op on an axis: the states of its operands (as Op.operands lists them) and of its outputs.

    `factor` names the split loop dimension ("" for the replicated variants R and RP). `lowering` names the special
    program that the split needs, one of `Lowering`'s ("" where the op itself, run on local shapes, is right).
    """

    factor: str
    inputs: tuple[State, ...]
    outputs: tuple[State, ...]
    lowering: str = ""

    def at_rows(self, captured: int, rows: int) -> Strategy:
        """The same choice when the batch has `rows` rows, from one captured at the tagged prime `captured`."""
        inputs, outputs = _at_rows(self.inputs, captured, rows), _at_rows(self.outputs, captured, rows)
        return replace(self, inputs=inputs, outputs=outputs)


@dataclass(frozen=True, kw_only=True)
class ClassSharding:
    """The choice for one block class on one mesh axis inside a stage, called `axis`.

    Where a stage has several such axes, a class has a ClassSharding for each, and states are in terms of the tensors as
    the axes before it leave them (`sharding/joint.py`).

    `inputs`, `params`, `buffers`, `outputs` give the states of the class's tuples of those names as they arrive, are
    stored, and leave; `ops` gives (op name, strategy) in execution order. A tensor whose state differs from what an op
    wants is converted once for each wanted state, and the conversion is shared by the ops that want it.
    A parameter is stored R, RP (replicated, its gradient summed over the axis once a step) or S(...).
    """

    cls: str
    inputs: tuple[State, ...]
    params: tuple[State, ...]
    buffers: tuple[State, ...]
    outputs: tuple[State, ...]
    ops: tuple[tuple[str, Strategy], ...]
    axis: str = "tp"

    def at_rows(self, captured: int, rows: int) -> ClassSharding:
        """The same choice when the batch has `rows` rows, from one captured at the tagged prime `captured`."""
        return ClassSharding(
            cls=self.cls,
            inputs=_at_rows(self.inputs, captured, rows),
            params=self.params,
            buffers=self.buffers,
            outputs=_at_rows(self.outputs, captured, rows),
            ops=tuple((name, strategy.at_rows(captured, rows)) for name, strategy in self.ops),
            axis=self.axis,
        )

    @cached_property
    def strategy(self) -> dict[str, Strategy]:
        return dict(self.ops)


def _at_rows(states: tuple[State, ...], captured: int, rows: int) -> tuple[State, ...]:
    return tuple(state.at_rows(captured, rows) for state in states)
