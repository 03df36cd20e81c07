"""Counts of variants: the least added time that fits, against trying everything; never over memory; on Llama-8B."""

from __future__ import annotations

import itertools
import math
import unittest.mock
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.plan import Plan, Recompute, Variant
from autopar.search import variants
from autopar.search.planner import PlanRequest, find_plan
from autopar.search.variants import Option, Options, Room, cheapest, least_added, levels
from autopar.simulate.simulator import simulate
from autopar.simulate.timeline import Timeline

VARIANTS = tuple(Variant(recompute=word, offload=away) for away in (False, True) for word in Recompute)
SECONDS = st.integers(0, 20).map(float)
BYTES = st.integers(0, 12).map(float)


@st.composite
def options(draw: st.DrawFn) -> Options:
    """Some options; the first adds nothing."""
    number = draw(st.integers(1, 5))
    first = Option(VARIANTS[0], 0.0, 0.0, draw(BYTES), draw(BYTES))
    rest = draw(st.permutations(VARIANTS[1:]))[: number - 1]
    return (first, *(Option(v, draw(SECONDS), draw(SECONDS), draw(BYTES), draw(BYTES)) for v in rest))


@st.composite
def stages(draw: st.DrawFn) -> tuple[list[Options], Room]:
    """Up to five layers of up to two kinds, in any order, and room for them."""
    kinds = draw(st.lists(options(), min_size=1, max_size=2))
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5))
    room = Room(
        budget_bytes=float(draw(st.integers(0, 150))), in_flight=draw(st.integers(1, 3)), extra_bytes=draw(BYTES),
        entry_bytes=draw(BYTES),
    )
    return layers, room


def needed(chosen: tuple[Option, ...], room: Room) -> float:
    """Bytes of a choice, as the simulator adds them up."""
    held = sum(option.held_bytes for option in chosen)
    held += room.entry_bytes if any(option.variant.offload for option in chosen) else 0.0
    return room.in_flight * held + max(room.extra_bytes, *(option.extra_bytes for option in chosen))


@settings(max_examples=250)
@given(stages(), st.sampled_from([(1.0, 1.0), (0.0, 1.0), (3.0, 5.0)]))
def test_counts_are_those_of_trying_everything(stage: tuple[list[Options], Room], weights: tuple[float, float]) -> None:
    layers, room = stage
    fitting = [every for every in itertools.product(*layers) if needed(every, room) <= room.budget_bytes * (1 - 1e-9)]
    times = [sum(option.added_s(weights) for option in every) for every in fitting]
    chosen = cheapest(layers, room, weights)
    if chosen is not None:
        assert needed(chosen, room) <= room.budget_bytes
        assert all(option in own for option, own in zip(chosen, layers, strict=True))
        assert sum(option.added_s(weights) for option in chosen) == pytest.approx(min(times, default=math.inf))
    else:
        assert not fitting
    kinds = list(dict.fromkeys(layers))
    numbers = [np.array([[layers.count(kind)]]) for kind in kinds]
    bounds = []
    for most in (variants.MANY_COUNTS, 0):  # by trying counts, and from a table
        with unittest.mock.patch.object(variants, "MANY_COUNTS", most):
            bounds.append(min(
                float(least_added(level, numbers, np.array([[room.for_held(level)]]), weights)[0, 0])
                for level in levels(kinds)
            ))
    bound, tabled = bounds
    assert bound == pytest.approx(tabled)
    exact = min(times, default=math.inf)
    assert math.isinf(bound) == math.isinf(exact)
    assert bound <= exact * (1 + 1e-9) + 1e-9
    if len(kinds) == 1:
        assert bound == pytest.approx(exact)


def test_layers_that_hold_least_come_first() -> None:
    options = (Option(VARIANTS[0], 0, 0, 10, 1), Option(VARIANTS[2], 0, 3, 1, 4))
    room = Room(budget_bytes=2 * (10 + 10 + 1 + 1) + 5, in_flight=2, extra_bytes=0, entry_bytes=0)
    chosen = cheapest([options] * 4, room, (1.0, 1.0))
    assert chosen is not None
    assert [option.variant.recompute for option in chosen] == ["full", "full", "none", "none"]


def test_more_than_the_host_holds_is_not_offloaded() -> None:
    away = Option(VARIANTS[3], 0, 1, 0, 1, 10)
    full = Option(VARIANTS[2], 0, 3, 1, 1)
    options = (Option(VARIANTS[0], 0, 0, 10, 1), full, away)
    for host_bytes, expected in ((80.0, away), (79.0, full)):
        room = Room(budget_bytes=10, in_flight=2, extra_bytes=0, entry_bytes=0, host_bytes=host_bytes)
        assert cheapest([options] * 4, room, (1.0, 1.0)) == (expected,) * 4


@pytest.fixture(scope="module")
def llama() -> ModelGraph:
    return capture_source(load_source("llama-3.1-8b", seq_len=8192, dtype="bfloat16"))


def alternative(graph: ModelGraph, cluster: str, plan: Plan, recompute: Recompute) -> Timeline:
    stages = tuple(replace(stage, variants=(), recompute=recompute) for stage in plan.stages)
    return simulate(graph, parse_cluster(cluster), replace(plan, stages=stages))


def test_a_mixed_plan_of_llama_8b_beats_all_or_nothing(llama: ModelGraph) -> None:
    """Keeping everything does not fit, recomputing everything is slower, and one layer less would not fit.

    Two rows at once on whole layers: one row's activations fit whole, as a norm keeps its input alone.
    """
    cluster = "1x8xH100-80GB"
    request = PlanRequest(
        global_batch=64, seq_len=8192, micro_batch=2, offload=False, mesh=(("cp", 1), ("tp", 1), ("pp", 1))
    )
    plan = find_plan(llama, parse_cluster(cluster), request)
    timeline = simulate(llama, parse_cluster(cluster), plan)
    assert timeline.feasible
    assert {stage.recompute_word for stage in plan.stages} == {"mixed"}
    assert not alternative(llama, cluster, plan, Recompute.NONE).feasible
    full = alternative(llama, cluster, plan, Recompute.FULL)
    assert full.feasible
    assert full.step_time_s > 1.05 * timeline.step_time_s
    (stage,) = plan.stages
    variants = list(stage.layer_variants(plan.num_layers(stage)))
    variants[variants.index(Variant(recompute=Recompute.FULL))] = Variant()
    fewer = replace(plan, stages=(stage.with_variants(variants),))
    assert not simulate(llama, parse_cluster(cluster), fewer).feasible


def test_early_stages_recompute_more(llama: ModelGraph) -> None:
    """Under 1F1B they hold more micro-batches."""
    cluster = parse_cluster("1x8xA100-40GB")
    graph, request = llama, PlanRequest(global_batch=64, seq_len=8192, micro_batch=1, offload=False)
    from autopar.search.best_first import Engine
    from autopar.search.candidates import Candidate

    engine = Engine(graph, cluster, request)
    candidate = Candidate(
        pp=4, tp=2, dp_replicate=1, dp_shard=1, zero=0, sequence_parallel=True, offload_optimizer=False,
        micro_batch=1, num_micro_batches=64,
    )
    cuts = engine.even_cuts(4)
    assert cuts is not None
    plan = engine.plan(candidate, cuts)
    timeline = simulate(graph, cluster, plan)
    assert timeline.feasible
    full = [stage.recompute_layers(plan.num_layers(stage))["full"] for stage in plan.stages]
    assert full == sorted(full, reverse=True)
    assert full[0] > full[2]


def test_offload_is_searched_where_it_is_allowed(llama: ModelGraph) -> None:
    """A host link as wide as Grace Hopper's makes recomputation needless."""
    cluster = parse_cluster("1x4xGH200")
    plans = [
        find_plan(llama, cluster, PlanRequest(global_batch=64, seq_len=8192, micro_batch=4, offload=offload))
        for offload in (False, True)
    ]
    times = [simulate(llama, cluster, plan).step_time_s for plan in plans]
    assert times[1] < times[0]
    assert not any(stage.num_offloaded or stage.offload_optimizer for stage in plans[0].stages)
    assert any(stage.num_offloaded or stage.offload_optimizer for stage in plans[1].stages)
