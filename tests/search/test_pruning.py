"""Pruning by bounds keeps the optimum, and branch and bound finds it on graphs too wide to eliminate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search import mathopt
from autopar.search.elimination import Factor, FactorGraph, eliminate
from autopar.search.pruning import Bounded, branch_and_bound, prune


@st.composite
def factor_graphs(draw: st.DrawFn) -> FactorGraph:
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=7)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factors = []
    for _ in range(draw(st.integers(1, 10))):
        arity = min(len(sizes), draw(st.integers(1, 3)))
        variables = tuple(int(v) for v in random.permutation(len(sizes))[:arity])
        table = random.integers(0, 20, size=[sizes[v] for v in variables]).astype(float)
        table[random.random(table.shape) < 0.15] = np.inf
        factors.append(Factor(variables, table))
    return FactorGraph(sizes, tuple(factors))


@settings(max_examples=300, deadline=None)
@given(factor_graphs())
def test_pruning_keeps_an_optimum_and_bounds_it(graph: FactorGraph) -> None:
    best = eliminate(graph)
    if best is None:
        return
    pruned = prune(graph, best.cost, max_table=0)
    assert pruned.lower_bound <= best.cost + 1e-9
    left = eliminate(pruned.graph)
    assert left is not None
    assert left.cost == pytest.approx(best.cost, abs=1e-9)
    values = tuple(int(kept[i]) for kept, i in zip(pruned.kept, left.values, strict=True))
    assert graph.cost(values) == pytest.approx(best.cost, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(factor_graphs(), st.sampled_from([1, 4, 16]))
def test_branch_and_bound_equals_elimination(graph: FactorGraph, max_table: int) -> None:
    best = eliminate(graph)
    found = branch_and_bound(graph, max_table=max(max_table, max(graph.sizes)), max_nodes=10_000)
    if best is None:
        assert found.values is None
        return
    assert found.values is not None
    assert graph.cost(found.values) == pytest.approx(best.cost, abs=1e-9)
    assert found.lower_bound == pytest.approx(best.cost, abs=1e-6)


def test_a_search_cut_short_says_what_it_proved() -> None:
    random = np.random.default_rng(0)
    sizes = (6,) * 8
    pairs = [(a, b) for a in range(8) for b in range(a)]
    graph = FactorGraph(sizes, tuple(Factor(pair, random.random((6, 6))) for pair in pairs))
    best = eliminate(graph)
    found = branch_and_bound(graph, max_table=36, max_nodes=3)
    assert best is not None
    assert found.lower_bound <= best.cost + 1e-12
    assert found.values is None or graph.cost(found.values) >= best.cost - 1e-12


def test_a_wide_graph_is_proved_without_an_integer_program(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    sizes = (5,) * 9
    tables = tuple(Factor((a, b), random.random((5, 5)) * 1e-6) for a in range(9) for b in range(a))
    graph = FactorGraph(sizes, tables)
    best = eliminate(graph)
    monkeypatch.setattr(mathopt, "solve", lambda *_, **__: pytest.fail("HiGHS was asked"))
    found = mathopt.minimize(graph, max_table=5**6)
    assert best is not None and found is not None
    assert found.cost == pytest.approx(best.cost, rel=1e-9)


def test_what_nothing_proves_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(2)
    tables = tuple(Factor((a, b), random.random((6, 6))) for a in range(8) for b in range(a))
    graph = FactorGraph((6,) * 8, tables)

    def few(graph: FactorGraph) -> Bounded:
        found = branch_and_bound(graph, max_table=36, max_nodes=40)
        return Bounded(found.values or (0,) * 8, graph.cost(found.values or (0,) * 8), found.lower_bound)

    def fails(*_: object, **__: object) -> None:
        raise mathopt.SolverFailedError("HiGHS stopped")

    monkeypatch.setattr(mathopt, "branch_and_bound", few)
    monkeypatch.setattr(mathopt, "solve", fails)
    found = mathopt.minimize(graph, max_table=6)
    assert found is not None and "of the fastest only: HiGHS stopped" in caplog.text
