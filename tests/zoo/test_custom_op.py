"""An op of the user's own: run whole and reported without a rule, split with one, with one process's numbers."""

from __future__ import annotations

import custom_op
import pytest
from entry import Entry
from harness import captured, parity, tensor_plan

import autopar
from autopar.runtime.local import LocalPool
from autopar.sharding.propagate import class_strategies
from autopar.sharding.rules import registry
from autopar.sharding.state import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*CustomOp:UserWarning")
TARGET = custom_op.RULE[0]


def test_without_a_rule_it_runs_whole_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(name="custom", family="custom", build=custom_op.build)
    monkeypatch.delitem(registry._RULES, TARGET)
    graph = captured(entry).graph
    layer = graph.block_class["Layer"]
    (op,) = [op for op in layer.ops if op.target == TARGET]
    found = class_strategies(layer, 2)
    assert found.unruled == (op.name,)
    assert all(state.kind is not Kind.SHARDED for s in found[op.name] for state in (*s.inputs, *s.outputs))
    assert f"ops without a sharding rule run whole on every tensor rank: {TARGET}" in tensor_plan(entry).notes


@pytest.mark.processes
def test_with_one_line_it_is_split(pool: LocalPool) -> None:
    entry = Entry(name="custom", family="custom", build=custom_op.build)
    graph, plan = captured(entry).graph, tensor_plan(entry)
    layer = graph.block_class["Layer"]
    (op,) = [op for op in layer.ops if op.target == TARGET]
    strategy = plan.sharding[layer.name].strategy[op.name]
    assert strategy.factor == "i"  # the layer's features inside: columns, then rows
    assert [str(state) for state in strategy.inputs] == ["S(2)", "S(2)", "S(1)"] and str(strategy.outputs[0]) == "P"
    report = parity(entry, plan, pool)
    assert report.passed, (report.loss_error, report.worst)
    assert len(report.gradient_errors) == len(graph.params)


def test_what_is_no_rule_ends_in_one_line() -> None:
    with pytest.raises(autopar.InputError, match="has no '->'"):
        autopar.register_rule("zoo.other.default", "a b, b c")
    assert not registry.find_rule("zoo.other.default")
