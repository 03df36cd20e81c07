"""Stages with meshes of their own on unlike nodes: legal, no slower than alike ones, and not under the bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.plan.plan import Plan, Schedule
from autopar.plan.verify import verify_plan
from autopar.search.best_first import Engine
from autopar.search.mixed import IdleFound, MixedOutcome, _Search, _StoppedError, search_mixed
from autopar.search.mixed_orders import moved_put_off, weights_put_off
from autopar.search.mixed_plans import mixed_plan
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

GRAPH = mlp_chain(num_layers=4, hidden=512, inner=2048, seq_len=64)


def unlike_nodes(bandwidth: float = 2e9, speeds: tuple[float, float] = (1.0, 0.4)) -> Cluster:
    """A fast node of two devices and a slow one of one, over a slow network."""
    nodes = cluster(per_node=2, speeds=speeds).nodes
    network = replace(nodes[0].network, bandwidth_bytes_per_s=bandwidth)
    return Cluster(name="unlike", nodes=(
        replace(nodes[0], network=network), replace(nodes[1], num_devices=1, network=network)
    ))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return find_plan(GRAPH, unlike_nodes(), PlanRequest(global_batch=16))


def test_stages_of_unlike_nodes_are_legal_and_no_slower(plan: Plan) -> None:
    machine = unlike_nodes()
    alike = find_plan(GRAPH, machine, PlanRequest(global_batch=16, unlike_stages=False))
    verify_plan(plan, GRAPH, machine)
    timeline = simulate(GRAPH, machine, plan)
    assert timeline.feasible
    assert plan.certificate is not None and alike.certificate is not None
    assert plan.certificate.upper_bound_s == timeline.step_time_s
    assert plan.certificate.lower_bound_s <= timeline.step_time_s <= alike.certificate.upper_bound_s
    assert sorted(rank for stage in plan.stages for rank in stage.devices) == [0, 1, 2]
    assert not any("different meshes" in words for words in plan.certificate.not_searched)
    assert any("different meshes" in words for words in alike.certificate.not_searched)


def test_stages_of_their_own_are_the_same_in_every_order_of_the_nodes() -> None:
    nodes, found = unlike_nodes(speeds=(0.6, 0.8)).nodes, []
    for order in (nodes, nodes[::-1]):
        machine = Cluster(name="unlike", nodes=order)
        engine = Engine(GRAPH, machine, PlanRequest(global_batch=12))
        outcome = search_mixed(engine, machine, float("inf"), None)
        assert outcome.best is not None
        assert all(list(stage.devices) == sorted(stage.devices) for stage in outcome.best.plan.stages)
        found.append((outcome.best.step_time_s, outcome.lower_bound_s, len(outcome.best.plan.stages)))
    assert found[0] == pytest.approx(found[1])


def test_a_number_of_devices_that_divides_nothing_has_stages_of_its_own() -> None:
    """Seven devices have no mesh for all of them here: a batch of 12 and fewer blocks than devices."""
    nodes = cluster(per_node=2, speeds=(0.4, 0.25, 1.0)).nodes
    machine = Cluster(name="seven", nodes=tuple(
        replace(node, num_devices=number) for node, number in zip(nodes, (1, 4, 2), strict=True)
    ))
    found = find_plan(GRAPH, machine, PlanRequest(global_batch=12))
    verify_plan(found, GRAPH, machine)
    assert sorted(rank for stage in found.stages for rank in stage.devices) == list(range(7))
    assert not found.baselines[0].feasible


def test_it_is_proved_closely(plan: Plan) -> None:
    assert plan.certificate is not None
    assert plan.certificate.gap < 0.05
    assert not plan.certificate.stopped_early


def test_what_leaves_devices_idle_is_told_where_it_is_faster() -> None:
    found = find_plan(GRAPH, unlike_nodes(bandwidth=2e7, speeds=(1.0, 0.05)), PlanRequest(global_batch=16))
    assert any(words.startswith("slowed down by 1x1x") for words in found.notes)


def test_nothing_is_told_of_idle_devices_where_that_is_no_faster() -> None:
    outcome = MixedOutcome(idle=IdleFound(step_time_s=2.0, unused="1x1xL4", used="1x2xH100"))
    assert outcome.idle_notes(2.0) == () == MixedOutcome().idle_notes(2.0)
    assert outcome.idle_notes(2.1) == (
        "slowed down by 1x1xL4: a step on 1x2xH100 alone would take 2 s; plan for that one, or with --idle-devices",
    )


def test_an_interrupt_keeps_the_plan_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, seen = unlike_nodes(), []

    def interrupt(done: int, total: int, best: float | None) -> None:
        seen.append(best)
        if best is not None:
            raise KeyboardInterrupt

    engine = Engine(GRAPH, machine, PlanRequest(global_batch=16))
    outcome = search_mixed(engine, machine, float("inf"), None, interrupt)
    assert outcome.best is not None and outcome.best.step_time_s == seen[-1]
    assert not outcome.complete and engine.interrupted
    assert outcome.lower_bound_s <= outcome.best.step_time_s


def test_nothing_changes_where_nodes_are_alike() -> None:
    request = PlanRequest(global_batch=8)
    found = find_plan(GRAPH, cluster(2, 1), request)
    assert found == find_plan(GRAPH, cluster(2, 1), replace(request, unlike_stages=False))


@pytest.mark.parametrize("unlike_stages", [True, False])
@pytest.mark.parametrize("speeds", [(0.6, 0.8, 0.6), (1.0, 0.3, 0.5)])
def test_the_order_of_nodes_changes_nothing_but_ranks(speeds: tuple[float, ...], unlike_stages: bool) -> None:
    """The plan of one order of the nodes, with the ranks of another, is the plan of that other."""
    nodes = cluster(per_node=2, speeds=speeds).nodes
    nodes = (replace(nodes[0], link=replace(nodes[0].link, bandwidth_bytes_per_s=1e9)), *nodes[1:])
    graph, request = mlp_chain(6, 256, 1024, 32), PlanRequest(global_batch=12, unlike_stages=unlike_stages)
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        machine = Cluster(name="unlike", nodes=tuple(nodes[i] for i in order))
        own = find_plan(graph, machine, request)
        verify_plan(own, graph, machine)
        assert own.certificate is not None
        assert simulate(graph, machine, own).step_time_s == own.certificate.upper_bound_s
        home = {2 * at + lane: 2 * i + lane for at, i in enumerate(order) for lane in range(2)}
        found.append((
            own.certificate.upper_bound_s, own.certificate.lower_bound_s, own.micro_batch, own.schedule, own.actions,
            [(sorted(home[rank] for rank in stage.devices), stage.mesh, stage.zero, stage.rows, stage.first)
             for stage in own.stages],
        ))
    for other in found[1:]:
        assert other[:2] == pytest.approx(found[0][:2], rel=1e-12)
        assert other[2:] == found[0][2:]


def test_layers_recompute_more_where_more_in_flight_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mlp_chain(num_layers=8, hidden=256, inner=1024, seq_len=512)
    machine = cluster(per_node=2, speeds=(1.0, 1.0, 0.25), memory_gib=0.026, host_gb_per_s=20.0)

    def found() -> MixedOutcome:
        engine = Engine(graph, machine, PlanRequest(global_batch=8, dtype="float32"))
        return search_mixed(engine, machine, float("inf"), None)

    deep = found()
    monkeypatch.setattr("autopar.search.mixed.MAX_DEEPENED", 0)
    usual = found()
    assert deep.best is not None and usual.best is not None
    assert deep.best.step_time_s < 0.95 * usual.best.step_time_s
    assert deep.lower_bound_s == usual.lower_bound_s <= deep.best.step_time_s
    verify_plan(deep.best.plan, graph, machine)
    timeline = simulate(graph, machine, deep.best.plan)
    assert timeline.feasible and timeline.step_time_s == deep.best.step_time_s


def test_the_time_limit_is_looked_at_before_each_plan_with_more_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mlp_chain(num_layers=8, hidden=256, inner=1024, seq_len=512)
    machine = cluster(per_node=2, speeds=(1.0, 1.0, 0.25), memory_gib=0.026, host_gb_per_s=20.0)
    engine = Engine(graph, machine, PlanRequest(global_batch=8, dtype="float32"))
    looked_at: list[int] = []

    def late(self: object) -> None:
        if looked_at:
            raise _StoppedError

    def made(*args: object, deeper: int = 0, **named: object) -> Plan:
        looked_at.extend([deeper] * (deeper > 0))
        return mixed_plan(*args, deeper=deeper, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("autopar.search.mixed._Search._check_time", late)
    monkeypatch.setattr("autopar.search.mixed_orders.mixed_plan", made)
    found = search_mixed(engine, machine, float("inf"), None)
    assert looked_at == [1]
    assert found.best is not None and not found.complete


def test_borders_are_moved_where_gradients_of_weights_are_put_off() -> None:
    graph = mlp_chain(num_layers=10, hidden=512, inner=2048, seq_len=64)
    machine = cluster(per_node=1, speeds=(1.0, 1.0, 0.5, 0.5))
    engine = Engine(graph, machine, PlanRequest(global_batch=16, dtype="bfloat16", micro_batch=2))
    search = _Search(engine, machine, float("inf"), None, None)
    search.run()
    tried = {parts: known for parts, known in search.outcome.tried.items() if known and len(parts) == 4}
    parts, known = max(tried.items(), key=lambda own: own[1].step_time_s)  # the slowest of them
    start = weights_put_off(engine, machine, known, float("inf"))
    assert start is not None
    best, costs = start, search._least[parts][1]
    found = list(moved_put_off(engine, machine, costs, parts, start, lambda: None))
    assert found
    for own in found:
        assert own.step_time_s < best.step_time_s
        best = own
        verify_plan(own.plan, graph, machine)
        timeline = simulate(graph, machine, own.plan)
        assert timeline.feasible and timeline.step_time_s == own.step_time_s
        assert any("W" in row for row in own.plan.actions) or own.plan.schedule is Schedule.ZERO_BUBBLE
