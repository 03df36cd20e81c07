import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.search.balance import range_sums, smallest_bottleneck, windows_of

COSTS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8)


def brute_force(costs: list[list[float]], extra: list[float], capacity: list[int] | None) -> float | None:
    num_stages, n = len(costs), len(costs[0])
    best = None
    for inner in itertools.combinations(range(1, n), num_stages - 1):
        cuts = (0, *inner, n)
        if capacity is not None and any(cuts[s + 1] - cuts[s] > capacity[s] for s in range(num_stages)):
            continue
        value = max(sum(costs[s][cuts[s] : cuts[s + 1]]) for s in range(num_stages)) + extra[cuts[1]]
        best = value if best is None else min(best, value)
    return best


@given(COSTS, st.integers(1, 4), st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4), st.data())
def test_cut_equals_brute_force(block: list[float], num_stages: int, speeds: list[float], data: st.DataObject) -> None:
    n = len(block)
    costs = [[cost / speed for cost in block] for speed in speeds[:num_stages]]
    extra = data.draw(st.lists(st.floats(0, 5), min_size=n + 1, max_size=n + 1))
    capacity = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=num_stages, max_size=num_stages))
    tables = [range_sums(np.array(c)) for c in costs]
    if capacity is not None:
        sizes = range_sums(np.ones(n))
        tables = [np.where(sizes <= most, table, np.inf) for table, most in zip(tables, capacity, strict=True)]
    best = brute_force(costs, extra, capacity) if num_stages <= n else None
    found = smallest_bottleneck(windows_of(tables), np.array(extra))
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.cuts[0] == 0
    assert found.cuts[-1] == n
    assert all(a < b for a, b in itertools.pairwise(found.cuts))
    assert found.value == pytest.approx(best)


def test_even_layers_are_cut_evenly() -> None:
    found = smallest_bottleneck(windows_of([range_sums(np.ones(12))] * 4))
    assert found is not None
    assert found.cuts == (0, 3, 6, 9, 12)


@given(st.integers(1, 9), st.integers(1, 10))
def test_windows_have_the_ranges_of_all_cuts_and_no_others(num_blocks: int, num_stages: int) -> None:
    ranges = np.array([[10 * first + last for last in range(num_blocks + 1)] for first in range(num_blocks + 1)])
    windows = windows_of([ranges] * num_stages)
    found = [set[int](windows[s].ravel().tolist()) for s in range(num_stages)]
    cuts = [(0, *inner, num_blocks) for inner in itertools.combinations(range(1, num_blocks), num_stages - 1)]
    for stage in range(num_stages):
        own = {10 * cut[stage] + cut[stage + 1] for cut in cuts}
        # Squares also have empty ranges, beginnings of the first stage and ends of the last that no cut has.
        allowed = {
            10 * first + last for first, last in (divmod(at, 10) for at in found[stage]) if first < last
            and (stage or first == 0) and (stage < num_stages - 1 or last == num_blocks)
        }
        assert allowed == own


def test_range_tables() -> None:
    costs = np.array([1.0, 3.0, 2.0])
    assert range_sums(costs)[1, 3] == 5.0
    assert np.isinf(range_sums(costs)[2, 2])
