"""What --explain says: the prices add up, alternatives are the exact search's, and every kind of plan has a text."""

import dataclasses
import itertools
import math

import pytest
from rich.console import Console
from toy_graphs import cluster, device, mlp_chain

from autopar.errors import InputError
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.search.block_problem import Problem
from autopar.search.explain import Explanation, explain, split_text
from autopar.search.explain_text import explain_json, explain_table
from autopar.search.planner import Degrees, PlanRequest, find_plan, plan_from_degrees
from autopar.sharding.joint import joint_strategies
from autopar.sharding.state import R
from autopar.simulate.class_costs import ClassCosts

MACHINE = cluster(per_node=4)


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return mlp_chain(num_layers=3, hidden=2048, inner=8192, seq_len=512)


def planned(graph: ModelGraph, **degrees: int | bool) -> Plan:
    return plan_from_degrees(graph, MACHINE, Degrees(global_batch=16, micro_batch=4, dtype="float32", **degrees))


def text(found: Explanation) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as kept:
        console.print(explain_table(found))
    return kept.get()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_add_up_to_the_block_s_communication(graph: ModelGraph, sequence_parallel: bool) -> None:
    found = explain(graph, MACHINE, planned(graph, tp=4, sequence_parallel=sequence_parallel))
    assert found.block == "layers.0"
    assert found.charges
    for is_backward, total in ((False, found.cost.forward_tp_comm_s), (True, found.cost.backward_tp_comm_s)):
        parts = [item.time_s for item in found.charges if item.is_backward == is_backward]
        assert math.fsum(parts) == pytest.approx(total)


def test_alternatives_are_the_best_blocks_by_brute_force(graph: ModelGraph) -> None:
    plan = planned(graph, tp=4)
    found = explain(graph, MACHINE, plan, "layer")
    cls = graph.block_class["layer"]
    costs = ClassCosts(graph, cls, tp=4, rows=4, device=device(), tp_group=MACHINE.group((0, 1, 2, 3)), dtype="float32")
    strategies = joint_strategies(cls, (4,))
    problem = Problem(cls, strategies, (R,), costs)
    best: dict[tuple[str, str], float] = {}
    for values in itertools.product(*(range(n) for n in problem.graph.sizes)):
        price = problem.graph.cost(values)
        for op, (own,) in problem.choice(values).items():
            node = next(item for item in cls.ops if item.name == op)
            key = op, split_text(cls, node, own.inputs, own.outputs, own.factor)
            best[key] = min(price, best.get(key, math.inf))
    least = min(best.values())
    assert {item.op for item in found.alternatives} == {"op_wide", "op_narrow"}
    assert [item.harm_s for item in found.alternatives] == sorted(item.harm_s for item in found.alternatives)
    for item in found.alternatives:
        assert item.harm_s == pytest.approx(best[item.op, item.split] - least, rel=1e-6)
        assert item.harm_s > 0
        assert item.block_s > found.block_s
    named = {(op.op, op.split.partition(":")[0]) for op in found.ops}
    assert named == {("op_wide", "column split"), ("op_narrow", "row split")}


def test_a_plan_of_data_axes_says_what_they_do_and_what_a_tensor_axis_would_cost(graph: ModelGraph) -> None:
    plan = planned(graph, dp_shard=4, zero=3)
    found = explain(graph, MACHINE, plan)
    assert (found.axes, found.charges, found.alternatives) == ((), (), ())
    gathered, reduced = found.data
    assert (gathered.times_a_step, reduced.times_a_step) == (2 * plan.num_micro_batches, plan.num_micro_batches)
    assert gathered.size_bytes == 4 * 2 * 2048 * 8192
    others = {other.name: other.step_time_s for other in found.others}
    assert set(others) == {"tp 2", "tp 2, with sequence parallelism"}
    assert all(others.values())
    assert "parameters are gathered" in text(found)


def test_two_axes_are_explained_each_beside_the_other(graph: ModelGraph) -> None:
    found = explain(graph, MACHINE, planned(graph, cp=2, tp=2))
    assert found.axes == (("cp", 2), ("tp", 2))
    assert {item.axis for item in found.alternatives} == {"tp", "cp"}
    assert "other axes' splits stay" in text(found)


def test_a_choice_of_other_rows_or_on_demand_is_told(graph: ModelGraph) -> None:
    plan = planned(graph, tp=4)
    assert explain(graph, MACHINE, plan).notes == ()
    other = plan.sharding["layer"]
    cls = graph.block_class["layer"]
    whole = {op.name: joint_strategies(cls, (4,))[op.name][0][0] for op in cls.ops}
    repeated = dataclasses.replace(
        other, params=(R, R), ops=tuple((name, whole[name]) for name, _ in other.ops)
    )
    shardings = tuple(repeated if own.cls == "layer" else own for own in plan.shardings)
    found = explain(graph, MACHINE, dataclasses.replace(plan, shardings=shardings))
    assert found.alternatives[0].harm_s < 0, "the plan's choice was not the best, and that is told"
    assert any("asked for" in note for note in found.notes)


def test_a_searched_plan_shows_its_certificate_and_is_json(graph: ModelGraph) -> None:
    plan = find_plan(graph, MACHINE, PlanRequest(global_batch=16, dtype="float32", mesh=(("tp", 2),)))
    found = explain(graph, MACHINE, plan, "epilogue")
    value = explain_json(found)
    assert plan.certificate is not None
    assert value["certificate"]["upper_bound_s"] == plan.certificate.upper_bound_s
    assert value["class"] == "epilogue"
    assert "gap" in text(found)
    assert {other["name"] for other in value["other_plans"]} >= {"tp 1", "tp 4"}


def test_an_unknown_block_is_told_with_the_names_there_are(graph: ModelGraph) -> None:
    with pytest.raises(InputError, match=r"no block 'layers.9' to explain; the blocks are prologue, layers.0"):
        explain(graph, MACHINE, planned(graph, tp=4), "layers.9")
