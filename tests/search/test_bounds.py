import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_graphs import cluster, mlp_chain

from autopar.errors import InfeasibleError
from autopar.graph.model_graph import ModelGraph
from autopar.search.best_first import Engine
from autopar.search.candidates import PlanRequest, candidates
from autopar.simulate.simulator import simulate

GRAPHS = [
    mlp_chain(num_layers=5, hidden=64, inner=256, seq_len=32),
    mlp_chain(num_layers=3, hidden=512, inner=2048, seq_len=128, vocab=8192),
    mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=512, tied=True),
]


@settings(max_examples=25)
@given(
    st.sampled_from(GRAPHS), st.sampled_from([(1, 4), (2, 2), (2, 4), (3, 2)]),
    st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.25, 0.5), (0.2, 1.0, 1.0)]), st.sampled_from([4, 8, 24]),
    st.sampled_from(["float32", "bfloat16"]), st.integers(0, 10**6),
)
def test_bounds_never_exceed_the_simulated_time(
    graph: ModelGraph, shape: tuple[int, int], speeds: tuple[float, ...], batch: int, dtype: str, seed: int
) -> None:
    machine = cluster(per_node=shape[1], speeds=speeds[: shape[0]])
    engine = Engine(graph, machine, PlanRequest(global_batch=batch, dtype=dtype))
    try:
        space = candidates(machine, engine.request, engine.chooser, len(graph.blocks))
    except InfeasibleError:
        return
    rng = random.Random(seed)
    for c in rng.sample(space, min(6, len(space))):
        inner = sorted(rng.sample(range(1, len(graph.blocks)), c.pp - 1))
        cuts = (0, *inner, len(graph.blocks))
        timeline = simulate(graph, machine, engine.plan(c, cuts))
        own = engine.bounds.of_cut(c, cuts)
        best = engine.bounds.best_cut(c)
        assert best is not None
        slack = 1 + 1e-9
        assert own <= timeline.step_time_s * slack, c
        assert best[0] <= own * slack, c
        assert engine.bounds.quick(c) <= best[0] * slack or engine.bounds.quick(c) <= timeline.step_time_s * slack
        assert own >= 0.4 * timeline.step_time_s, "the bound is of use"
        kinds = engine.layout.kinds(c)
        for stage, group in enumerate(timeline.groups):
            table = engine.bounds.stage_table(c, kinds[stage])
            in_flight = min(c.pp - stage, c.num_micro_batches)
            memory = engine.bounds.memory_table(c, kinds[stage], table, in_flight)[cuts[stage], cuts[stage + 1]]
            assert memory <= group.memory.total * slack
            if graph is not GRAPHS[2]:
                assert memory == pytest.approx(group.memory.total)
