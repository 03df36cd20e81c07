"""Which devices are chosen: equal to planning every part, for each objective."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.cluster.part import part_of
from autopar.errors import InfeasibleError, InputError
from autopar.plan.goal import Goal
from autopar.plan.plan import Plan
from autopar.plan.verify import machine_of, verify_plan
from autopar.search import fleet
from autopar.search.fleet import Choice, choose_devices, numbers_to_try, parts
from autopar.search.mixed_costs import ClusterPools
from autopar.search.objective import Objective, longest_step_s
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

GRAPH = mlp_chain(num_layers=3, hidden=512, inner=2048, seq_len=64)
REQUEST = PlanRequest(global_batch=16)


def priced(bandwidth: float = 2e9, prices: tuple[float | None, ...] = (3.0, 1.0)) -> Cluster:
    """A fast node of two devices and a slow one of one, each with its price, over a slow network."""
    nodes = cluster(per_node=2, speeds=(1.0, 0.4)).nodes
    network = replace(nodes[0].network, bandwidth_bytes_per_s=bandwidth)
    return Cluster(name="priced", nodes=tuple(
        replace(node, num_devices=number, network=network, device=replace(node.device, price_per_hour=price))
        for node, number, price in zip(nodes, (2, 1), prices, strict=True)
    ))


@cache
def steps_of_all_parts(bandwidth: float) -> dict[tuple[int, ...], float]:
    """The step of every part of `priced`, planned alone."""
    machine, found = priced(bandwidth), {}
    for fast in range(3):
        for slow in range(2):
            if fast + slow:
                part = part_of(machine, (*range(fast), *((2,) if slow else ())))
                plan = find_plan(GRAPH, part, REQUEST)
                assert plan.certificate is not None
                found[fast, slow] = plan.certificate.upper_bound_s
    del found[1, 1]  # some devices of a node are a part only alone
    return found


@pytest.mark.parametrize("bandwidth", [2e9, 2e7])
@pytest.mark.parametrize(("goal", "longest"), [
    (Goal.TIME, None), (Goal.COST, None), (Goal.COST, 1.2), (Goal.DEVICES, 1.2), (Goal.DEVICES, 10.0),
])
def test_the_choice_is_the_best_of_all_parts(goal: Goal, longest: float | None, bandwidth: float) -> None:
    machine = priced(bandwidth)
    steps = steps_of_all_parts(bandwidth)
    quickest = min(steps.values())
    objective = Objective(goal=goal, max_step_time_s=longest and longest * quickest)
    choice = choose_devices(GRAPH, machine, REQUEST, objective, idle=True)
    expected = min(
        objective.score(step, counts, (3.0, 1.0))[0] for counts, step in steps.items()
    )
    assert choice.best.value == pytest.approx(expected, rel=0.006 if goal is Goal.TIME else 1e-9)
    assert choice.lower_bound <= choice.best.value * (1 + 1e-12)
    verify_plan(choice.plan, GRAPH, choice.best.cluster)
    assert machine_of(choice.plan, machine) == choice.best.cluster
    assert simulate(GRAPH, choice.best.cluster, choice.plan).step_time_s == choice.best.step_time_s
    assert len(choice.report()["parts"]) == len(choice.planned)


def slow_network(*, idle: bool) -> Choice:
    return choose_devices(GRAPH, priced(bandwidth=2e5), REQUEST, Objective(), idle=idle)


def test_all_devices_are_used_unless_some_may_be_idle() -> None:
    every, some = slow_network(idle=False), slow_network(idle=True)
    assert every.plan.num_devices == 3
    assert "priced#0-1 alone takes" in every.plan.notes[0] and "--idle-devices" in every.plan.notes[0]
    assert some.plan.num_devices == 2
    assert some.plan.notes[0].startswith("leaves 1 of the 3 devices of priced idle")
    assert "start 2 processes, on priced#0-1" in some.plan.notes[0]
    assert some.best.value < every.best.value


def test_a_step_that_no_part_takes_is_told() -> None:
    just_too_short_s = 0.99 * min(steps_of_all_parts(2e9).values())
    with pytest.raises(InfeasibleError, match=r"the quickest, priced.*allow more time"):
        choose_devices(GRAPH, priced(), REQUEST, Objective(goal=Goal.COST, max_step_time_s=just_too_short_s))
    with pytest.raises(InfeasibleError, match="did nothing but compute"):
        choose_devices(GRAPH, priced(), REQUEST, Objective(goal=Goal.DEVICES, max_step_time_s=1e-9))


def test_a_device_without_a_price_has_no_cost() -> None:
    with pytest.raises(InputError, match="price_per_hour"):
        choose_devices(GRAPH, priced(prices=(3.0, None)), REQUEST, Objective(goal=Goal.COST))


def test_a_mesh_is_one_of_all_devices() -> None:
    choice = choose_devices(
        GRAPH, cluster(2, 2), replace(REQUEST, mesh=(("dp", 4),)), Objective(goal=Goal.DEVICES, max_step_time_s=1e9)
    )
    assert [sum(own.counts) for own in choice.planned] == [4]


def test_parts_are_whole_nodes_or_devices_of_one() -> None:
    pools = ClusterPools(priced())
    assert set(parts(pools)) == {(2, 0), (2, 1), (0, 1), (1, 0)}
    assert set(parts(ClusterPools(cluster(6, 4)), few=True)) == {(4,), (16,), (24,), (1,), (2,)}
    for most in (1, 5, 8, 9, 100, 2048):
        numbers = numbers_to_try(most)
        assert numbers == sorted(set(numbers)) and numbers[0] == 1 and numbers[-1] == most


def test_a_deadline_gives_the_longest_step() -> None:
    assert longest_step_s(None, None, None, 100) is None
    assert longest_step_s(2.0, None, None, 100) == 2.0
    assert longest_step_s(None, 1.0, 1e6, 1000) == pytest.approx(3.6)
    assert longest_step_s(2.0, 1.0, 1e6, 1000) == 2.0
    assert longest_step_s(None, 1.0, 1001, 1000) == pytest.approx(1800)
    with pytest.raises(InputError, match="--tokens"):
        longest_step_s(None, 1.0, None, 1000)
    assert math.isinf(Objective(goal=Goal.COST, max_step_time_s=1.0).score(2.0, (1,), (1.0,))[0])


@pytest.mark.parametrize("objective", [Objective(), Objective(goal=Goal.COST)])
def test_bad_input_stays_bad_input(objective: Objective) -> None:
    with pytest.raises(InputError, match="magic"):
        choose_devices(GRAPH, priced(), replace(REQUEST, optimizer="magic"), objective)


@pytest.mark.parametrize("goal", [Goal.TIME, Goal.COST])
def test_without_time_the_first_plan_is_taken(goal: Goal) -> None:
    choice = choose_devices(GRAPH, priced(), replace(REQUEST, max_search_seconds=0.0), Objective(goal=goal))
    assert len(choice.planned) == 1 and choice.stopped_early
    verify_plan(choice.plan, GRAPH, choice.best.cluster)


def test_an_interrupt_keeps_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part is interrupted before anything of it is found: its bound still counts."""
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Plan:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return find_plan(*args, **kwargs)

    monkeypatch.setattr(fleet, "find_plan", interrupted)
    choice = choose_devices(GRAPH, priced(prices=(1.0, 1.0)), REQUEST, Objective(goal=Goal.COST))
    assert choice.stopped_early and len(choice.planned) == 1
    assert choice.lower_bound < choice.best.value
    calls.append(())
    with pytest.raises(KeyboardInterrupt):
        choose_devices(GRAPH, priced(prices=(1.0, 1.0)), REQUEST, Objective(goal=Goal.COST))
