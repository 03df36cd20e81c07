import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_graphs import cluster, mlp_chain

from autopar.errors import InfeasibleError
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Recompute, Variant
from autopar.search.best_first import Engine
from autopar.search.bounds import Cuts, spread_s
from autopar.search.candidates import Candidate, PlanRequest, candidates
from autopar.search.context import context_candidates
from autopar.simulate.simulator import simulate
from autopar.simulate.timeline import Timeline

GRAPHS = [
    mlp_chain(num_layers=5, hidden=64, inner=256, seq_len=32),
    mlp_chain(num_layers=3, hidden=512, inner=2048, seq_len=128, vocab=8192),
    mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=512, tied=True),
]


@settings(max_examples=25)
@given(
    st.sampled_from(GRAPHS), st.sampled_from([(1, 4), (2, 2), (2, 4), (3, 2)]),
    st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.25, 0.5), (0.2, 1.0, 1.0)]), st.sampled_from([4, 8, 24]),
    st.sampled_from(["float32", "bfloat16"]), st.sampled_from([16.0, 0.3, 0.1, 0.03]),
    st.sampled_from([None, 20.0, 500.0]), st.integers(0, 10**6),
)
def test_bounds_never_exceed_the_simulated_time(
    graph: ModelGraph, shape: tuple[int, int], speeds: tuple[float, ...], batch: int, dtype: str, memory_gib: float,
    host_gb_per_s: float | None, seed: int,
) -> None:
    machine = cluster(
        per_node=shape[1], speeds=speeds[: shape[0]], memory_gib=memory_gib, host_gb_per_s=host_gb_per_s
    )
    engine = Engine(graph, machine, PlanRequest(global_batch=batch, dtype=dtype))
    try:
        space = candidates(machine, engine.request, engine.chooser, len(graph.blocks))
    except InfeasibleError:
        return
    rng = random.Random(seed)
    context = [
        c for c in rng.sample(found, min(4, len(found)))
        if engine.chooser.choose(c.tp, sequence_parallel=c.sequence_parallel, cp=c.cp) is not None
    ] if (found := context_candidates(machine, engine.request, engine.chooser, len(graph.blocks))) else []
    for c in [*rng.sample(space, min(6, len(space))), *context]:
        inner = sorted(rng.sample(range(1, len(graph.blocks)), c.pp - 1))
        cuts = (0, *inner, len(graph.blocks))
        plan = engine.plan(c, cuts)
        timeline = simulate(graph, machine, plan)
        own = engine.bounds.of_cut(c, cuts)
        best = engine.bounds.best_cut(c)
        slack = 1 + 1e-9
        assert_memory(engine, c, cuts, plan, timeline, exact=graph is not GRAPHS[2])
        if not timeline.feasible:
            assert math.isinf(own) or graph is GRAPHS[2]
            continue
        assert best is not None
        other = simulate(graph, machine, with_random_variants(plan, rng, offload=host_gb_per_s is not None))
        assert not other.feasible or own <= other.step_time_s * slack, "whatever the layers do"
        assert own <= timeline.step_time_s * slack, c
        assert best[0] <= own * slack, c
        closest, of_cuts = engine.bounds.closer(c, best[0], [cuts])
        assert max(closest, of_cuts[cuts]) <= timeline.step_time_s * slack, c
        assert all(closest <= other * slack for other in of_cuts.values()), "no cut is below the bound over all"
        assert own <= engine.bounds.closer_of_cut(c, cuts) * slack**2 <= timeline.step_time_s * slack**3, c
        # What takes as long as a limit may be passed over, and nothing that is below it.
        limit_s = timeline.step_time_s * rng.choice([0.5, 0.9, 1.001, 1.5])
        under = engine.bounds.best_cut(c, limit_s)
        closer = engine.bounds.closer(c, under[0] if under else math.inf, limit_s=limit_s)[0]
        for bound in (under[0] if under else math.inf, closer):
            assert min(bound, limit_s) <= timeline.step_time_s * slack, c
        if host_gb_per_s is not None and c.cp == 1:  # what stands for it and its like with the state elsewhere
            like = replace(c, offload_optimizer=True, free_offload=True)
            both = engine.bounds.best_cut(like)
            assert both is not None
            of_both = engine.bounds.closer(like, both[0])[0]
            assert max(engine.bounds.quick(like), both[0], of_both) <= timeline.step_time_s * slack, c
        assert engine.bounds.quick(c) <= best[0] * slack or engine.bounds.quick(c) <= timeline.step_time_s * slack
        assert engine.bounds.work.rough(c) <= engine.bounds.work.of_work(c) * slack <= engine.bounds.quick(c) * slack**2
        assert own >= 0.4 * timeline.step_time_s, "the bound is of use"


def assert_memory(
    engine: Engine, c: Candidate, cuts: Cuts, plan: Plan, timeline: Timeline, *, exact: bool
) -> None:
    """The bounds see the memory that the simulator sees, and what the leanest variants would leave of it."""
    kinds, bounds = engine.layout.kinds(c), engine.bounds
    everything = simulate(engine.graph, engine.cluster, replace(plan, stages=tuple(
        replace(stage, variants=(), recompute=Recompute.NONE) for stage in plan.stages
    )))
    for stage, (kept, own) in enumerate(zip(everything.rank_peak_bytes, timeline.rank_peak_bytes, strict=True)):
        span, in_flight = (cuts[stage], cuts[stage + 1]), min(c.pp - stage, c.num_micro_batches)
        memory = bounds.memory_table(c, kinds[stage], in_flight)[span]
        least = bounds.least_memory_table(c, kinds[stage], in_flight)[span]
        assert memory <= kept * (1 + 1e-9)
        assert least <= own * (1 + 1e-9)
        if exact:
            assert memory == pytest.approx(kept)
            assert (own <= kinds[stage].memory_limit_bytes) == (least <= kinds[stage].memory_limit_bytes)


def with_random_variants(plan: Plan, rng: random.Random, *, offload: bool) -> Plan:
    every = [Variant(recompute=word, offload=away) for word in Recompute for away in {False, offload}]
    return replace(plan, stages=tuple(
        stage.with_variants([rng.choice(every) for _ in range(plan.num_layers(stage))]) for stage in plan.stages
    ))


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    st.lists(st.tuples(*(st.floats(0.0, 10.0),) * 3), min_size=1, max_size=3), st.integers(0, 10**6),
)
def test_blocks_spread_at_will_bound_every_assignment(
    kinds: list[str], each: list[tuple[float, float, float]], seed: int
) -> None:
    number = [random.Random(seed + i).randint(1, 2) for i in range(len(each))]
    times = {kind: np.array([own["abc".index(kind)] for own in each]) for kind in dict.fromkeys(kinds)}
    bound = spread_s(times, kinds, np.array(number, dtype=np.float64))
    blocks = [entry for entry, count in enumerate(number) for _ in range(count)]
    longest = min(
        max(sum(times[kind][b] for b, at in zip(blocks, stages, strict=True) if at == stage)
            for stage, kind in enumerate(kinds))
        for stages in product(range(len(kinds)), repeat=len(blocks))
    )
    assert bound <= longest * (1 + 1e-9)


def test_blocks_spread_over_unlike_stages_keep_them_busy() -> None:
    """Twelve like blocks that take three times as long on one of two stages: nine and three of them."""
    assert spread_s({"fast": np.ones(1), "slow": np.full(1, 3.0)}, ["fast", "slow"], np.full(1, 12.0)) == 9.0


def test_the_gradients_that_the_ends_share_count() -> None:

    graph = mlp_chain(num_layers=4, hidden=64, inner=64, seq_len=16, vocab=65536, tied=True)
    machine = cluster(per_node=1, speeds=(1.0, 1.0))
    engine = Engine(graph, machine, PlanRequest(global_batch=4, dtype="float32"))
    found = [c for c in candidates(machine, engine.request, engine.chooser, len(graph.blocks)) if c.pp == 2]
    assert found
    for c in found:
        cuts = (0, 3, len(graph.blocks))
        timeline = simulate(graph, machine, engine.plan(c, cuts))
        tied_s = engine.layout.tied_s(c, 65536 * 64)
        assert tied_s > 0.2 * timeline.step_time_s
        assert engine.bounds.quick(c) > tied_s
        closer, of_cuts = engine.bounds.closer(c, 0.0, [cuts])
        assert 0.95 * timeline.step_time_s <= of_cuts[cuts] <= timeline.step_time_s * (1 + 1e-9)
        assert tied_s < closer <= of_cuts[cuts]
