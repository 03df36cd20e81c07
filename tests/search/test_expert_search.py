"""The search over expert axes against every setting simulated."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import isinf

import pytest
from mixtures import mixture
from toy_graphs import cluster

from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError
from autopar.graph.expert_params import expert_ops, expert_params
from autopar.search import experts
from autopar.search.best_first import Engine
from autopar.search.block_problem import Problem
from autopar.search.candidates import PlanRequest, candidates
from autopar.search.experts import search_experts
from autopar.search.explain import _Place, block_s
from autopar.search.mathopt import minimize
from autopar.search.planner import Degrees, find_plan, plan_from_degrees
from autopar.search.simulated_plan import simulated
from autopar.sharding.joint import joint_strategies
from autopar.sharding.state import R, shard
from autopar.simulate.expert_costs import ExpertCosts
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


def test_the_search_prices_experts_as_the_simulator_does(engine: Engine) -> None:
    """With their axis, in what `--explain` weighs; what would cut a rank's experts into uneven parts is left out."""
    machine = cluster(per_node=16)  # no host holds up its devices
    plan = plan_from_degrees(engine.graph, machine, Degrees(
        global_batch=16, micro_batch=2, dtype="bfloat16", tp=2, dp_replicate=8, ep=4, compile=True,
    ))
    cls = next(cls for cls in engine.graph.classes if expert_params(cls))
    place = _Place.of(engine.graph, machine, plan, plan.stages[0], cls)
    strategies, shardings = joint_strategies(cls, (2,)), plan.class_shardings(cls.name, plan.stages[0])
    chosen = {op.name: (place._option(op, strategies[op.name], shardings, plan),) for op in cls.ops}
    found = minimize(Problem(cls, chosen, (R,), place.weighed, parameter_weight=0.0).graph)
    assert found is not None
    cost = place.cost(shardings, compile_=False)
    assert cost.forward_tp_comm_s > replace(place, expert_axis=None).cost(shardings, compile_=False).forward_tp_comm_s
    assert found.cost == pytest.approx(block_s(cost), abs=2e-8)
    (op,) = expert_ops(cls)
    assert place.expert_axis is not None
    weights = [op.operands.index(name) for name in expert_params(cls)]
    cut = [own for own in strategies[op.name] if any(own[0].inputs[i] == shard(0) for i in weights)]
    assert cut
    for size, is_uneven in ((4, False), (8, True)):
        costs = ExpertCosts(place.costs, replace(place.expert_axis, size=size))
        assert all(isinf(costs.op_time(op, own).forward_s) == is_uneven for own in cut)
