"""Every entry of the zoo is captured, its ops have rules, and their strategies fit the tensors."""

from __future__ import annotations

import pytest
from all_entries import ENTRIES
from entry import Entry
from harness import captured

from autopar.graph.model_graph import BlockClass
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import divides
from autopar.sharding.state import RP, R

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn of their own deprecations


def classes_of(entry: Entry) -> tuple[BlockClass, ...]:
    graph = captured(entry).graph
    return tuple(graph.block_class[name] for name in dict.fromkeys(block.cls for block in graph.blocks))


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_op_has_a_rule(entry: Entry) -> None:
    graph = captured(entry).graph
    assert graph.blocks and graph.loss
    unread = [note for note in graph.notes if "do not reach the loss" in note]
    assert not unread, unread
    found = [(cls, class_strategies(cls, 2).unruled) for cls in classes_of(entry)]
    unruled = {op.target for cls, names in found for op in cls.ops if op.name in names}
    assert unruled == set(entry.expected_unruled), f"ops without a rule: {sorted(unruled)}"
    assert all(entry.expected_unruled.values()), "an op without a rule needs a reason"


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_every_strategy_fits_its_tensors(entry: Entry, size: int) -> None:
    graph = captured(entry).graph
    for cls in classes_of(entry):
        found = class_strategies(cls, size)
        for op in cls.ops:
            choices = found[op.name]
            assert choices[0].inputs == (R,) * len(op.operands)
            assert len({(s.inputs, s.outputs, s.lowering) for s in choices}) == len(choices)
            for choice in choices:
                placed = [*zip((*op.operands, *op.outputs), (*choice.inputs, *choice.outputs), strict=True)]
                uneven = [(t, state) for t, state in placed if t and not divides(cls.tensor[t].shape, state, size)]
                assert not uneven, f"{op.name} ({op.target}): {uneven}"
                assert not any(state.length and graph.depends_on_rows(state.length) for _, state in placed)
                for tensor, state in zip(op.operands, choice.inputs, strict=True):
                    assert state != RP or cls.tensor[tensor].requires_grad
