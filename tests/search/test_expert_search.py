"""The search over expert axes against every setting simulated."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from mixtures import mixture

from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError
from autopar.search import experts
from autopar.search.best_first import Engine
from autopar.search.candidates import PlanRequest, candidates
from autopar.search.experts import search_experts
from autopar.search.planner import find_plan
from autopar.search.simulated_plan import simulated
from autopar.simulate.simulator import simulate

CLUSTER = parse_cluster("1x4xA100-80GB")
REQUEST = PlanRequest(global_batch=4, micro_batch=1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(mixture(), CLUSTER, REQUEST)


def test_it_finds_the_fastest_and_no_bound_is_above_its_setting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "MAX_SIMULATED", 10_000)
    space = [c for c in candidates(CLUSTER, REQUEST, engine.chooser, len(engine.graph.blocks)) if c.tp == 1]
    fastest, last = float("inf"), len(engine.graph.blocks)
    settings = experts._settings(engine, space, float("inf"), None)
    assert {setting.ep for setting in settings} == {2, 4}
    for number, setting in enumerate(settings):
        pp = setting.candidate.pp
        closer = experts._of_cuts(engine, setting, float("inf"))
        tried = {engine.even_cuts(pp), None if closer is None else closer.cut}
        every = {(0, *borders, last) for borders in combinations(range(1, last), pp - 1)} if number % 16 == 0 else set()
        for cut in {cut for cut in tried | every if cut is not None}:
            made = simulated(engine, engine.plan(setting.candidate, cut, ep=setting.ep))
            if made is not None:
                assert closer is not None
                assert setting.bound_s <= closer.bound_s <= made.step_time_s
                fastest = min(fastest, made.step_time_s) if cut in tried else fastest
    outcome = search_experts(engine, space, None, float("inf"), None)
    assert outcome.best is not None
    assert outcome.best.step_time_s == fastest
    assert outcome.lower_bound_s <= fastest or outcome.lower_bound_s == float("inf")
    assert search_experts(engine, space, None, fastest, None).best is None


def test_a_plan_that_has_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is found, a faster plan with an expert axis takes its place, and the bound is of both."""
    space = candidates(CLUSTER, REQUEST, engine.chooser, len(engine.graph.blocks))
    found = search_experts(engine, space, None, float("inf"), None).best
    assert found is not None
    won = experts.ExpertsOutcome(best=found, lower_bound_s=found.step_time_s / 2)
    monkeypatch.setattr("autopar.search.planner.search_experts", lambda *_: won)
    plan = find_plan(mixture(), CLUSTER, replace(REQUEST, mesh=(("pp", 1), ("tp", 1))))
    assert all(stage.mesh.ep > 1 for stage in plan.stages)
    assert plan.certificate is not None
    assert plan.certificate.lower_bound_s <= found.step_time_s / 2
    assert simulate(mixture(), CLUSTER, plan).step_time_s == pytest.approx(plan.certificate.upper_bound_s)


def test_a_size_that_the_user_fixes() -> None:
    plan = find_plan(mixture(), CLUSTER, replace(REQUEST, mesh=(("ep", 2), ("pp", 1), ("tp", 1))))
    assert [stage.mesh.ep for stage in plan.stages] == [2]
    assert plan.certificate is not None
    assert "with ep 2" in plan.certificate.searched
    without = Engine(mixture(), CLUSTER, replace(REQUEST, mesh=(("ep", 1),)))
    assert search_experts(without, (), None, float("inf"), None).best is None
    with pytest.raises(InputError, match=r"the 8 experts of .* do not divide over ep 3; change"):
        find_plan(mixture(), CLUSTER, replace(REQUEST, mesh=(("ep", 3), ("pp", 1), ("tp", 1))))
    with pytest.raises(InputError, match=r"no plan with ep 4 .* ep must divide the data ranks"):
        find_plan(mixture(), CLUSTER, replace(REQUEST, mesh=(("ep", 4), ("pp", 2), ("tp", 1))))
