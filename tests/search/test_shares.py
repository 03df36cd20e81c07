"""Unequal shares of a micro-batch: the slowest data rank is as fast as can be, and the plan is legal and taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixed import GRAPH, unlike_nodes
from toy_graphs import cluster

from autopar.plan.verify import verify_plan
from autopar.search.best_first import Engine
from autopar.search.planner import PlanRequest, find_plan
from autopar.search.shares import NOT_SHARED, _estimate, _settings, search_shares, share_out
from autopar.simulate.simulator import simulate


@given(
    kinds=st.lists(st.integers(0, 2), min_size=1, max_size=4), more=st.integers(0, 8),
    slopes=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3),
    starts=st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3),
)
@settings(max_examples=60)
def test_the_slowest_is_as_fast_as_in_any_other_shares(
    kinds: list[int], more: int, slopes: list[float], starts: list[float]
) -> None:
    total = len(kinds) + more

    def slowest(rows: tuple[int, ...]) -> float:
        return max(starts[kind] + slopes[kind] * own for kind, own in zip(kinds, rows, strict=True))

    found = share_out(total, kinds, lambda kind, rows: starts[kind] + slopes[kind] * rows)
    assert sum(found) == total and min(found) >= 1
    best = min(slowest(rows) for rows in product(range(1, total + 1), repeat=len(kinds)) if sum(rows) == total)
    assert slowest(found) == pytest.approx(best, rel=1e-6)


def test_a_fast_network_gets_shares_by_speed() -> None:
    """No other shares of its micro-batches are quicker, nor are even ones."""
    machine, request = unlike_nodes(bandwidth=1e12, speeds=(1.0, 0.5)), PlanRequest(global_batch=20)
    found = search_shares(Engine(GRAPH, machine, request), request, float("inf"), None)
    assert found is not None
    verify_plan(found.plan, GRAPH, machine)
    stage = found.plan.stages[0]
    assert stage.rows[0] == stage.rows[1] > stage.rows[2]
    steps = {
        rows: simulate(GRAPH, machine, replace(
            found.plan, micro_batch=max(rows), stages=(replace(stage, rows=rows),)
        ), detail=False).step_time_s
        for one in range(1, sum(stage.rows) // 2) for rows in [(one, one, sum(stage.rows) - 2 * one)]
    }
    assert min(steps.values()) == steps[stage.rows] == found.step_time_s
    plan = find_plan(GRAPH, machine, request)
    assert plan.certificate is not None
    assert plan.certificate.lower_bound_s <= plan.certificate.upper_bound_s <= found.step_time_s
    assert NOT_SHARED in plan.certificate.not_searched
    verify_plan(plan, GRAPH, machine)


def test_alike_devices_and_what_is_fixed_are_left_alone() -> None:
    machine, request = unlike_nodes(), PlanRequest(global_batch=20)
    for own, wanted in (
        (cluster(2, 2), request), (machine, replace(request, micro_batch=2)),
        (machine, replace(request, mesh=(("pp", 3),))),
    ):
        assert search_shares(Engine(GRAPH, own, wanted), wanted, float("inf"), None) is None
    assert search_shares(Engine(GRAPH, machine, request), request, 1e-9, None) is None, "none is better than that"


def test_what_one_row_takes_is_no_more_than_the_estimate() -> None:
    machine, request = unlike_nodes(bandwidth=1e12, speeds=(1.0, 0.5)), PlanRequest(global_batch=20)
    engine = Engine(GRAPH, machine, request)
    for candidate, total in list(_settings(engine, request))[:20]:
        whole = _estimate(engine, candidate, total, float("inf"))
        if whole is not None:
            early = _estimate(engine, candidate, total, 0.0)
            assert early is not None and 0 < early[0] <= whole[0] and early[1] == ()
            assert _estimate(engine, candidate, total, whole[0] * 1.001) == whole
    found = search_shares(engine, request, float("inf"), None)
    assert found is not None
    assert search_shares(engine, request, found.step_time_s * 1.01, None) == found
