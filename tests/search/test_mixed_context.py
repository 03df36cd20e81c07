"""Context axes in stages of unlike nodes: found where rows are few and long, and no faster than the bound says."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_mixed import unlike_nodes
from test_mixed_costs import drawn
from test_runs import bound_of, every_plan
from toy_graphs import mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.plan.file import load_plan, save_plan
from autopar.plan.verify import verify_plan
from autopar.search.best_first import Engine
from autopar.search.candidates import divisors, fewest_context_ranks
from autopar.search.mixed import search_mixed
from autopar.search.mixed_context import context_families, promising_counts
from autopar.search.mixed_costs import ClusterPools, MixedCosts
from autopar.search.mixed_plans import Part, mixed_plan
from autopar.search.plan_schedules import other_schedule
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

LONG = mlp_chain(num_layers=2, hidden=512, inner=2048, seq_len=1024)


def two_and(number: int, *, memory_share: float = 1.0) -> Cluster:
    """A fast node of two devices and a slow one of this many."""
    machine = unlike_nodes()
    return replace(machine, nodes=tuple(
        replace(node, num_devices=size, device=replace(
            node.device, memory_bytes=int(node.device.memory_bytes * memory_share)))
        for node, size in zip(machine.nodes, (2, number), strict=True)
    ))


@given(
    rows=st.integers(1, 48), node_size=st.integers(1, 12), nodes=st.integers(1, 3), data=st.data(),
    micro_batch=st.none() | st.integers(1, 4),
)
def test_the_fewest_context_ranks_are_those_of_all_sizes(
    rows: int, node_size: int, nodes: int, data: st.DataObject, micro_batch: int | None
) -> None:
    tp = data.draw(st.sampled_from(divisors(node_size)))
    ranks = node_size * nodes // tp
    allowed = [
        cp for cp in range(1, ranks + 1) if ranks % cp == 0 and rows % (ranks // cp) == 0
        and micro_batch in (None, rows * cp // ranks) and (cp == 1 or node_size % (cp * tp) == 0)
    ]
    assert fewest_context_ranks(rows, ranks, tp, node_size, micro_batch) == min(allowed, default=None)


def simulated(engine: Engine, machine: Cluster, pools: ClusterPools) -> Iterator[tuple[float, float, bool]]:
    """Every plan of the space that fits, each in the orders that are tried: seconds of its quickest order, and of the
    quickest with whole backwards; whether it has a context axis.
    """
    graph = engine.graph
    for count in divisors(engine.request.global_batch):
        for rewrites in dict.fromkeys([(), *context_families(engine, pools, count)]):
            costs = MixedCosts(engine, pools, count, rewrites, context=True)
            for stages in every_plan(costs):
                for settings in product(*(costs.settings[stage.group] for stage in stages)):
                    parts = tuple(
                        Part(stage.first, stage.last, setting, pools.ranks(pool, stage.start, size), stage.group)
                        for stage, setting in zip(stages, settings, strict=True)
                        for pool, size in [costs.groups[stage.group]]
                    )
                    plan = mixed_plan(engine, costs, parts)
                    orders = [
                        plan, *(other_schedule(graph, machine, plan, split_backward=own) for own in (False, True))]
                    runs = [own and simulate(graph, machine, own, detail=False) for own in orders]
                    step_s = [run.step_time_s if run and run.feasible else math.inf for run in runs]
                    if math.isfinite(step_s[0]):
                        yield min(step_s), min(step_s[:2]), any(own.candidate.cp > 1 for own in settings)


@pytest.mark.parametrize(("number", "global_batch", "share", "wins"), [
    (1, 2, 1.0, False), (2, 2, 1.0, True), (2, 3, 1.0, True), (1, 3, 0.004, False),
])
def test_the_search_finds_what_trying_everything_finds(
    number: int, global_batch: int, share: float, wins: bool
) -> None:
    machine = two_and(number, memory_share=share)
    engine = Engine(LONG, machine, PlanRequest(global_batch=global_batch))
    outcome = search_mixed(engine, machine, math.inf, None)
    every = list(simulated(engine, machine, ClusterPools(machine)))
    best_s, _, has_context = min(every)
    assert outcome.best is not None and outcome.complete and outcome.num_context
    assert outcome.lower_bound_s <= min(whole_s for _, whole_s, _ in every) * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= outcome.best.step_time_s <= best_s * 1.006
    assert any(stage.mesh.cp > 1 for stage in outcome.best.plan.stages) == has_context == wins


@pytest.mark.parametrize(("global_batch", "share"), [(2, 1.0), (3, 1.0), (2, 0.004), (4, 0.004)])
def test_no_bound_of_stages_with_context_axes_is_above_their_simulated_step(global_batch: int, share: float) -> None:
    machine, draw, seen = two_and(2, memory_share=share), random.Random(0), 0
    engine, pools = Engine(LONG, machine, PlanRequest(global_batch=global_batch)), ClusterPools(machine)
    for count in divisors(global_batch):
        for rewrites in context_families(engine, pools, count):
            costs = MixedCosts(engine, pools, count, rewrites, context=True)
            for stages in 2 * every_plan(costs):
                parts = tuple(filter(None, (drawn(costs, pools, stage, draw) for stage in stages)))
                if len(parts) == len(stages) and any(part.setting.candidate.cp > 1 for part in parts):
                    plan = mixed_plan(engine, costs, parts)
                    for own in (plan, other_schedule(LONG, machine, plan, split_backward=False)):
                        timeline = simulate(LONG, machine, own, detail=False) if own is not None else None
                        if timeline is not None and timeline.feasible:
                            assert bound_of(costs, stages) <= timeline.step_time_s * (1 + 1e-9)
                            seen += 1
    assert seen > 5, seen


def test_short_rows_promise_nothing_and_are_not_searched() -> None:
    """The same tokens in more and shorter rows: data axes do what a context axis would."""
    graph = mlp_chain(num_layers=2, hidden=512, inner=2048, seq_len=64)
    machine = two_and(2)
    engine = Engine(graph, machine, PlanRequest(global_batch=32))
    outcome = search_mixed(engine, machine, math.inf, None)
    assert outcome.best is not None and outcome.num_context == 0
    assert promising_counts(engine, ClusterPools(machine), outcome.best.step_time_s) == []


def test_a_plan_says_what_was_searched_and_is_the_same_in_every_order_of_nodes(tmp_path: Path) -> None:
    found = []
    for nodes in (two_and(2).nodes, two_and(2).nodes[::-1]):
        machine = Cluster(name="unlike", nodes=nodes)
        plan = find_plan(LONG, machine, PlanRequest(global_batch=2))
        assert plan.certificate is not None
        assert "of them with a context axis, as stages" in plan.certificate.searched
        assert plan.certificate.lower_bound_s <= plan.certificate.upper_bound_s
        save_plan(plan, tmp_path / "plan.json")
        again = load_plan(tmp_path / "plan.json")
        verify_plan(again, LONG, machine)
        assert simulate(LONG, machine, again).step_time_s == pytest.approx(plan.certificate.upper_bound_s)
        found.append((plan.certificate.upper_bound_s, plan.certificate.lower_bound_s,
                      [(stage.mesh, stage.zero, stage.first) for stage in plan.stages]))
    assert any(mesh.cp > 1 for mesh, _, _ in found[0][2])
    assert found[0] == found[1]
