from __future__ import annotations

import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.graph.model_graph import ModelGraph
from autopar.search.best_first import Engine, Found
from autopar.search.borders import BorderSearch, moves
from autopar.search.bounds import Cuts
from autopar.search.candidates import Candidate, PlanRequest, candidates

GRAPHS = [
    mlp_chain(num_layers=5, hidden=512, inner=2048, seq_len=128),
    mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=2048, tied=True),
]


def searched(graph: ModelGraph, machine: Cluster, request: PlanRequest) -> tuple[Engine, Found | None]:
    engine = Engine(graph, machine, request)
    return engine, engine.search(candidates(machine, request, engine.chooser, len(graph.blocks))).best


def pipeline(batch: int = 8) -> tuple[Engine, Found]:
    """Five layers on four devices: the bound takes the embedding alone on the first, and even stages begin with two.

    Cut evenly: a search that has so few cuts before it tries all of them.
    """
    machine, request = cluster(1, 4), PlanRequest(global_batch=batch, micro_batch=1, mesh=(("pp", 4),))
    engine = Engine(GRAPHS[0], machine, request)
    best = engine.search(candidates(machine, request, engine.chooser, len(GRAPHS[0].blocks)), even=True).best
    assert best is not None
    return engine, best


def test_moves_take_a_block_from_one_stage_for_another() -> None:
    assert set(moves((0, 2, 3, 5))) == {(0, 1, 3, 5), (0, 2, 4, 5), (0, 3, 4, 5), (0, 1, 2, 5)}
    assert list(moves((0, 7))) == []
    assert list(moves((0, 1, 2, 3))) == []


def test_the_quickest_cut_is_one_layer_from_the_even_one() -> None:
    engine, best = pipeline()
    by_bound = engine.bounds.best_cut(best.candidate)
    assert by_bound is not None
    assert (by_bound[1], engine.even_cuts(4), best.cuts) == ((0, 1, 3, 5, 7), (0, 3, 4, 5, 7), (0, 3, 4, 5, 7))
    found = BorderSearch(engine).best(best, None)
    assert (found.candidate, found.cuts) == (best.candidate, (0, 2, 3, 5, 7))
    every = [engine.simulate(best.candidate, (0, *inner, 7)) for inner in combinations(range(1, 7), 3)]
    assert found == min(own for own in every if own is not None)
    assert found.step_time_s < 0.96 * best.step_time_s


@settings(max_examples=20)
@given(
    st.sampled_from(GRAPHS), st.sampled_from([(1, 3), (1, 4), (2, 2)]), st.sampled_from([1.0, 0.5]),
    st.sampled_from([4, 12]), st.sampled_from([16.0, 0.12, 0.08]),
)
def test_it_is_never_worse_fits_and_is_the_same_again(
    graph: ModelGraph, shape: tuple[int, int], speed: float, batch: int, memory_gib: float
) -> None:
    machine = cluster(per_node=shape[1], speeds=(1.0, speed)[: shape[0]], memory_gib=memory_gib)
    request = PlanRequest(global_batch=batch, mesh=(("pp", shape[0] * shape[1]),))
    try:
        engine, best = searched(graph, machine, request)
    except (InfeasibleError, InputError):
        return
    if best is None:
        return
    found = BorderSearch(engine).best(best, None)
    assert found.step_time_s <= best.step_time_s
    assert all(peak <= limit for peak, limit in zip(found.peak_bytes, found.limit_bytes, strict=True))
    assert found.cuts[0] == 0
    assert found.cuts[-1] == len(graph.blocks)
    again, best = searched(graph, machine, request)
    assert best is not None
    assert BorderSearch(again).best(best, None) == found


def test_the_time_limit_moves_nothing() -> None:
    engine, best = pipeline()
    assert BorderSearch(engine).best(best, time.monotonic() - 1) is best


def test_an_interrupt_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, best = pipeline()

    def interrupted(self: Engine, candidate: Candidate, cuts: Cuts) -> Found | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "simulate", interrupted)
    assert BorderSearch(engine).best(best, None) is best
    assert engine.interrupted
