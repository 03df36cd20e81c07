"""A pipeline takes another order of its micro-batches where that is faster and fits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.plan.actions import Action, ActionKind, most_in_flight, requirements
from autopar.plan.plan import Plan, Schedule
from autopar.plan.text import certificate_line
from autopar.plan.verify import verify_plan
from autopar.search.best_first import Engine
from autopar.search.candidates import candidates
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.plan_schedules import least_in_any_order_s, other_schedule, search_deeper, search_orders
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.schedules import plan_actions
from autopar.simulate.simulator import simulate

GRAPH = mlp_chain(num_layers=8, hidden=512, inner=2048, seq_len=64)


def machine(bandwidth: float = 1e11) -> Cluster:
    """Four nodes of one device."""
    nodes = cluster(per_node=1, speeds=(1.0,) * 4).nodes
    return Cluster(name="four", nodes=tuple(
        replace(node, network=replace(node.network, bandwidth_bytes_per_s=bandwidth)) for node in nodes
    ))


def pipeline(own: Cluster) -> Plan:
    return plan_from_degrees(GRAPH, own, Degrees(global_batch=16, micro_batch=2, pp=4))


def test_weights_are_put_off_where_that_shortens_the_bubble() -> None:
    own = machine()
    plan = pipeline(own)
    other = other_schedule(GRAPH, own, plan)
    assert other is not None
    verify_plan(other, GRAPH, own)
    assert simulate(GRAPH, own, other).step_time_s < simulate(GRAPH, own, plan).step_time_s
    assert any("W" in row for row in other.actions) or other.schedule is Schedule.ZERO_BUBBLE


def test_a_slow_link_is_hidden_by_a_deeper_warm_up() -> None:
    own = machine(bandwidth=3e7)
    plan = pipeline(own)
    other = other_schedule(GRAPH, own, plan, split_backward=False)
    assert other is not None and not any("W" in row for row in other.actions)
    verify_plan(other, GRAPH, own)
    assert simulate(GRAPH, own, other).step_time_s < simulate(GRAPH, own, plan).step_time_s
    assert most_in_flight(plan_actions(other)[0])[0] > most_in_flight(plan_actions(plan)[0])[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_order_is_under_what_is_said_of_all(data: st.DataObject) -> None:
    """Any order that can run, each backward whole or in two parts, against the simulator; and how close the best is."""
    own = machine(bandwidth=data.draw(st.sampled_from([3e7, 1e9, 1e11])))
    plan = plan_from_degrees(GRAPH, own, Degrees(global_batch=4, micro_batch=data.draw(st.sampled_from([1, 2])), pp=4))
    least_s = least_in_any_order_s(GRAPH, own, plan)
    assert least_s is not None
    left = [
        Action(ActionKind(kind), stage, i) for stage in range(4) for i in range(plan.num_micro_batches)
        for kind in data.draw(st.sampled_from(["FB", "FIW"]))
    ]
    lists: list[list[str]] = [[] for _ in range(4)]
    done: set[Action] = set()
    while left:
        able = [a for a in left if all(done.intersection(options) for options in requirements(a, 4))]
        action = data.draw(st.sampled_from(able))
        left.remove(action)
        done.add(action)
        lists[action.stage].append(str(action))
    ordered = replace(plan, actions=tuple(map(",".join, lists)))
    assert simulate(GRAPH, own, ordered).step_time_s >= least_s * (1 - 1e-12)
    assert simulate(GRAPH, own, plan).step_time_s >= least_s * (1 - 1e-12)


def test_a_plan_says_how_good_its_order_is() -> None:
    found = find_plan(GRAPH, machine(), PlanRequest(global_batch=64, seq_len=None, dtype="bfloat16", mesh=(("pp", 4),)))
    bound = found.certificate
    assert bound is not None and bound.order_bound_s is not None
    assert 0.8 * bound.upper_bound_s < bound.order_bound_s <= bound.upper_bound_s
    assert "in no order of micro-batches do its stages take under" in certificate_line(bound)
    alone = find_plan(GRAPH, machine(), PlanRequest(global_batch=64, seq_len=None, dtype="bfloat16", mesh=(("pp", 1),)))
    assert alone.certificate is not None and alone.certificate.order_bound_s is None
    assert "in no order" not in certificate_line(alone.certificate)


def test_no_more_is_in_flight_than_memory_holds() -> None:
    own = machine(bandwidth=3e7)
    plan = pipeline(own)
    peak = max(group.memory.total for group in simulate(GRAPH, own, plan).groups)
    tight = Cluster(name="tight", nodes=tuple(
        replace(node, device=replace(node.device, memory_bytes=int(peak * 1.0001), usable_memory_fraction=1.0))
        for node in own.nodes
    ))
    other = other_schedule(GRAPH, tight, plan, split_backward=False)
    assert other is None or simulate(GRAPH, tight, other).feasible


@cache
def planned() -> tuple[Plan, Cluster]:
    own = machine(bandwidth=1e8)
    return find_plan(GRAPH, own, PlanRequest(global_batch=16, mesh=(("pp", 4),))), own


def test_a_planned_pipeline_is_ordered_where_that_is_faster() -> None:
    plan, own = planned()
    verify_plan(plan, GRAPH, own)
    timeline = simulate(GRAPH, own, plan)
    assert timeline.feasible and plan.certificate is not None
    assert plan.certificate.upper_bound_s == timeline.step_time_s
    assert plan.certificate.lower_bound_s <= timeline.step_time_s
    plain = replace(plan, actions=(), schedule=Schedule.ONE_F_ONE_B)
    assert plan.actions or plan.schedule is not Schedule.ONE_F_ONE_B
    if all(stage.virtual == 0 for stage in plan.stages):
        assert timeline.step_time_s < simulate(GRAPH, own, plain).step_time_s


@pytest.mark.parametrize("words", ["other schedules than 1F1B, but for"])
def test_what_was_not_searched_names_the_other_orders(words: str) -> None:
    plan, _ = planned()
    assert plan.certificate is not None
    assert any(own.startswith(words) for own in plan.certificate.not_searched)


@pytest.mark.parametrize("host_gb_per_s", [None, 20.0])
def test_layers_recompute_more_where_more_in_flight_hides_slow_links(host_gb_per_s: float | None) -> None:
    graph = mlp_chain(num_layers=8, hidden=256, inner=1024, seq_len=512)
    nodes = cluster(per_node=1, speeds=(1.0,) * 4, memory_gib=0.05, host_gb_per_s=host_gb_per_s).nodes
    own = Cluster(name="four", nodes=tuple(
        replace(node, network=replace(node.network, bandwidth_bytes_per_s=1e8)) for node in nodes
    ))
    engine = Engine(graph, own, PlanRequest(global_batch=16, dtype="float32"))
    space = [c for c in candidates(own, engine.request, engine.chooser, len(graph.blocks)) if c.pp == 4]
    best = engine.search(space).best
    assert best is not None
    ordered = search_orders(engine, best.step_time_s, None)
    before_s = min(best.step_time_s, ordered.step_time_s if ordered is not None else best.step_time_s)
    found = search_deeper(engine, before_s, None)
    assert found is not None and found.step_time_s < 0.8 * before_s
    verify_plan(found.plan, graph, own)
    timeline = simulate(graph, own, found.plan)
    assert timeline.feasible and timeline.step_time_s == found.step_time_s
    usual = plan_actions(engine.plan(best.candidate, best.cuts))
    assert most_in_flight(plan_actions(found.plan)[0])[0] > most_in_flight(usual[0])[0]
    assert search_deeper(engine, found.step_time_s, None) is None
