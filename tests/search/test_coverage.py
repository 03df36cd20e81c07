"""The coverage of a plan: ops with rules, ops that a tensor axis repeats, and their shares of the time."""

from dataclasses import replace

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.graph.model_graph import ModelGraph
from autopar.plan.coverage import Coverage, TargetShare, coverage_line
from autopar.plan.plan import Plan
from autopar.search.candidates import PlanRequest
from autopar.search.coverage import plan_coverage
from autopar.search.planner import Degrees, find_plan, plan_from_degrees
from autopar.simulate.class_costs import ClassCosts

MACHINE = cluster(1, 2)


def with_unknown_gelu(graph: ModelGraph) -> ModelGraph:
    classes = tuple(
        replace(cls, ops=tuple(
            replace(op, target="mine.gelu.default") if "gelu" in op.target else op for op in cls.ops
        )) for cls in graph.classes
    )
    return replace(graph, classes=classes)


def covered(graph: ModelGraph, tp: int) -> tuple[Plan, Coverage]:
    wanted = Degrees(global_batch=8, tp=tp, dp_replicate=2 // tp)
    plan = plan_from_degrees(graph, MACHINE, wanted)
    return plan, plan_coverage(graph, MACHINE, plan)


def test_without_a_tensor_axis_nothing_is_repeated() -> None:
    graph = mlp_chain()
    _, found = covered(graph, 1)
    assert found == Coverage(num_ops=sum(len(cls.ops) for cls in graph.classes), num_ruled=found.num_ops)
    assert coverage_line(found) == f"sharding rules: {found.num_ops} of {found.num_ops} ops"


def test_shares_are_of_the_time_of_all_ops() -> None:
    graph = with_unknown_gelu(mlp_chain(num_layers=3))
    plan, found = covered(graph, 2)
    seconds = {}
    for block in graph.blocks:
        cls = graph.block_class[block.cls]
        costs = ClassCosts(graph, cls, tp=2, rows=plan.micro_batch, device=MACHINE.nodes[0].device,
                           tp_group=MACHINE.group((0, 1)), dtype=plan.dtype)
        for op in cls.ops:
            time = costs.op_time(op, plan.sharding[cls.name].strategy[op.name])
            seconds[block.name, op.name] = time.forward_s + time.backward_s
    gelus = sum(time for (_, op), time in seconds.items() if op == "op_active")
    assert found.without_rule == (TargetShare("mine.gelu.default", pytest.approx(gelus / sum(seconds.values()))),)
    assert (found.num_ruled, found.num_ops) == (found.num_ops - 1, sum(len(cls.ops) for cls in graph.classes))
    whole = [
        op for cls in graph.classes for op in cls.ops
        if "mine" not in op.target and not plan.sharding[cls.name].strategy[op.name].factor
        and "view" not in op.target
    ]
    assert whole and found.num_repeated == len(whole)
    shares = [item.time_share for item in found.repeated]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) == found.repeated_share < 1
    line = coverage_line(found)
    assert f"without one, whole on every tensor rank: mine.gelu.default {gelus / sum(seconds.values()):.1%}" in line
    assert f"repeats {found.num_repeated} of the others" in line


def test_the_line_names_the_largest_alone() -> None:
    many = tuple(TargetShare(f"aten.op{i}.default", 0.01) for i in range(6))
    line = coverage_line(Coverage(num_ops=9, num_ruled=9, tp=2, num_repeated=6, repeated=many))
    assert line.endswith("aten.op2.default 1.0%, aten.op3.default 1.0% and 2 more kinds")


def test_a_found_plan_carries_it() -> None:
    graph = with_unknown_gelu(mlp_chain())
    plan = find_plan(graph, MACHINE, PlanRequest(global_batch=8))
    assert plan.coverage == plan_coverage(graph, MACHINE, plan)
    assert "mine.gelu.default" in str(plan)
