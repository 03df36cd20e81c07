import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.elimination import Factor, FactorGraph, TableTooLargeError, eliminate
from autopar.search.mathopt import minimize, solve


def brute_force(graph: FactorGraph) -> float:
    return min(graph.cost(values) for values in itertools.product(*(range(n) for n in graph.sizes)))


def random_graph(seed: int, num_variables: int, num_factors: int, forbid: float, arity: int = 3) -> FactorGraph:
    rng = np.random.default_rng(seed)
    sizes = tuple(int(n) for n in rng.integers(1, 4, num_variables))
    factors = []
    for _ in range(num_factors):
        k = int(rng.integers(0, min(arity, num_variables) + 1))
        scope = tuple(int(v) for v in rng.permutation(num_variables)[:k])
        table = np.asarray(rng.integers(0, 20, [sizes[v] for v in scope]), dtype=np.float64)
        if k:
            table[rng.random(table.shape) < forbid] = np.inf
        factors.append(Factor(scope, table))
    return FactorGraph(sizes, tuple(factors))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 7), st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.4]))
def test_elimination_equals_brute_force(seed: int, num_variables: int, num_factors: int, forbid: float) -> None:
    graph = random_graph(seed, num_variables, num_factors, forbid)
    best = brute_force(graph)
    found = eliminate(graph)
    if math.isinf(best):
        assert found is None
        return
    assert found is not None
    assert found.cost == pytest.approx(best)
    assert graph.cost(found.values) == pytest.approx(best)
    assert eliminate(graph) == found


@pytest.mark.parametrize("seed", range(4))
def test_mathopt_equals_elimination(seed: int) -> None:
    graph = random_graph(seed, 6, 9, 0.15)
    exact, integer = eliminate(graph), solve(graph)
    if exact is None:
        assert integer is None
        return
    assert integer is not None
    assert integer.cost == pytest.approx(exact.cost)


def test_wide_graph_goes_to_mathopt() -> None:
    rng = np.random.default_rng(0)
    pairs = itertools.combinations(range(7), 2)
    graph = FactorGraph((3,) * 7, tuple(Factor(pair, rng.random((3, 3))) for pair in pairs))
    with pytest.raises(TableTooLargeError, match="limit is 100"):
        eliminate(graph, max_table=100)
    found = minimize(graph, max_table=100)
    assert found is not None
    assert found.cost == pytest.approx(brute_force(graph))


def test_long_chain_is_fast_and_exact() -> None:
    rng = np.random.default_rng(1)
    n = 500
    graph = FactorGraph((8,) * n, tuple(Factor((i, i + 1), rng.random((8, 8))) for i in range(n - 1)))
    found = eliminate(graph)
    assert found is not None
    best = np.zeros(8)
    for factor in graph.factors:
        best = (best[:, None] + factor.table).min(axis=0)
    assert found.cost == pytest.approx(float(best.min()))


def test_variables_of_one_value_may_be_many() -> None:
    """An array has a dim for each variable of a table, and numpy has 64 of them."""
    number = 70
    alone = [Factor((a, b), np.ones((1, 1))) for a, b in itertools.combinations(range(1, number), 2)]
    beside = [Factor((v, 0), np.array([[3.0, 1.0, 2.0]])) for v in range(1, number)]
    found = eliminate(FactorGraph((3, *[1] * (number - 1)), (*alone, *beside)))
    assert found is not None
    assert found.values == (1, *[0] * (number - 1))
    assert found.cost == len(alone) + len(beside)
