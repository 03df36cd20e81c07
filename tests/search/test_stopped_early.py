"""A search that the time limit or the user ends before its time."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.cluster.parse import parse_cluster
from autopar.errors import InfeasibleError
from autopar.plan.text import certificate_line
from autopar.plan.verify import verify_plan
from autopar.search import best_first, plan_schedules
from autopar.search.best_first import Engine, Found
from autopar.search.bounds import Bounds, Cuts
from autopar.search.candidates import Candidate, candidates
from autopar.search.planner import PlanRequest, find_plan
from autopar.search.work_bounds import WorkBounds
from autopar.simulate.simulator import simulate

GRAPH = mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=4096)
MACHINE = cluster(2, 4)


def test_the_time_limit_holds_while_bounds_are_computed() -> None:
    graph, machine = mlp_chain(96, 12288, 49152, 2048, 50000), parse_cluster("64x8xH100")
    began = time.process_time()
    plan = find_plan(graph, machine, PlanRequest(global_batch=1536, max_search_seconds=0.1))
    assert time.process_time() - began < 2  # all bounds take longer
    verify_plan(plan, graph, machine)
    assert simulate(graph, machine, plan).feasible
    assert plan.certificate is not None
    assert plan.certificate.stopped_early
    assert "the time limit of 0.1 s came first" in plan.certificate.searched
    assert "simulations" not in plan.certificate.searched


def test_no_time_at_all_gives_the_first_plan_that_fits_and_a_bound_by_the_work_alone() -> None:
    certificate = find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24, max_search_seconds=0)).certificate
    whole = find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24)).certificate
    assert certificate is not None
    assert whole is not None
    assert 0 < certificate.lower_bound_s <= whole.lower_bound_s
    assert certificate_line(certificate).endswith("stopped early")
    assert "no time is proved" in certificate_line(replace(certificate, lower_bound_s=0))


def test_a_limit_before_any_plan_says_so() -> None:
    with pytest.raises(InfeasibleError, match="the time limit of 0 s came before any plan was found"):
        find_plan(GRAPH, cluster(2, 4, memory_gib=0.001), PlanRequest(global_batch=24, max_search_seconds=0))


def test_the_limit_of_work_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_first, "MAX_SIMULATIONS", 1)
    certificate = find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24)).certificate
    assert certificate is not None
    assert certificate.stopped_early
    assert re.search(r"the limit of work, here \d simulations, came first", certificate.searched)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_an_interrupt_gives_the_best_so_far(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proved holds for the whole search of such plans; other orders of micro-batches may be quicker."""
    real, seen = Engine.simulate, []

    def interrupted(self: Engine, candidate: Candidate, cuts: Cuts) -> Found | None:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(real(self, candidate, cuts))
        return seen[-1]

    whole = Engine(GRAPH, MACHINE, PlanRequest(global_batch=24))
    best = whole.search(candidates(MACHINE, whole.request, whole.chooser, len(GRAPH.blocks))).best
    monkeypatch.setattr(Engine, "simulate", interrupted)
    plan = find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24))
    assert plan.certificate is not None
    assert best is not None
    assert plan.certificate.stopped_early
    assert plan.certificate.searched.endswith("an interrupt came first")
    assert plan.certificate.upper_bound_s == min(found.step_time_s for found in seen if found)
    assert plan.certificate.lower_bound_s <= best.step_time_s
    verify_plan(plan, GRAPH, MACHINE)


def test_an_interrupt_while_orders_are_tried_keeps_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_schedules, "other_schedule", interrupted)
    plan = find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24))
    assert plan.certificate is not None
    assert plan.certificate.stopped_early
    assert plan.certificate.searched.endswith("an interrupt came first")
    verify_plan(plan, GRAPH, MACHINE)


def test_an_interrupt_loses_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proved at an interrupt holds for what the whole search finds, wherever the interrupt comes.

    The planner may then find another order of micro-batches that is quicker, which its certificate knows of.
    """
    whole = Engine(GRAPH, MACHINE, PlanRequest(global_batch=24))
    best = whole.search(candidates(MACHINE, whole.request, whole.chooser, len(GRAPH.blocks))).best
    assert best is not None
    real = Engine._refine
    for after in range(0, 40, 3):
        calls = iter(range(after))

        def interrupted(
            self: Engine, candidate: Candidate, even: bool, limit_s: float, calls: object = calls
        ) -> object:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            return real(self, candidate, even, limit_s)

        engine = Engine(GRAPH, MACHINE, PlanRequest(global_batch=24))
        space = candidates(MACHINE, engine.request, engine.chooser, len(GRAPH.blocks))
        engine.probe(space, time.monotonic() + 60)
        monkeypatch.setattr(Engine, "_refine", interrupted)
        outcome = engine.search(space, incumbent=engine.best)
        assert outcome.lower_bound_s <= best.step_time_s
        monkeypatch.setattr(Engine, "_refine", real)


def test_an_interrupt_at_the_first_bounds_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine(GRAPH, MACHINE, PlanRequest(global_batch=24))
    best = whole.search(candidates(MACHINE, whole.request, whole.chooser, len(GRAPH.blocks))).best
    assert best is not None
    real, interrupts = WorkBounds.rough, iter([KeyboardInterrupt])

    def interrupted(self: WorkBounds, candidate: Candidate) -> float:
        if candidate.tp > 1 and (error := next(interrupts, None)) is not None:
            raise error
        return real(self, candidate)

    engine = Engine(GRAPH, MACHINE, PlanRequest(global_batch=24))
    space = candidates(MACHINE, engine.request, engine.chooser, len(GRAPH.blocks))
    engine.probe(space, time.monotonic() + 60)
    monkeypatch.setattr(WorkBounds, "rough", interrupted)
    outcome = engine.search(space, incumbent=engine.best)
    assert engine.interrupted
    assert not outcome.complete
    assert 0 < outcome.lower_bound_s <= best.step_time_s


def test_an_interrupt_before_any_plan_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bounds, "quick", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_plan(GRAPH, MACHINE, PlanRequest(global_batch=24))
