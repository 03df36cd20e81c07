import itertools

from hypothesis import given
from hypothesis import strategies as st

from autopar.search.balance import running_sums, smallest_bottleneck

COSTS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8)


def brute_force(costs: list[list[float]], capacity: list[float] | None = None) -> float | None:
    num_stages, n = len(costs), len(costs[0])
    best = None
    for inner in itertools.combinations(range(1, n), num_stages - 1):
        cuts = (0, *inner, n)
        loads = [sum(costs[s][cuts[s] : cuts[s + 1]]) for s in range(num_stages)]
        if capacity is not None and any(cuts[s + 1] - cuts[s] > capacity[s] for s in range(num_stages)):
            continue
        best = min(max(loads), best) if best is not None else max(loads)
    return best


@given(COSTS, st.integers(1, 4), st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4), st.data())
def test_cut_equals_brute_force(block: list[float], num_stages: int, speeds: list[float], data: st.DataObject) -> None:
    costs = [[cost / speed for cost in block] for speed in speeds[:num_stages]]
    capacity = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=num_stages, max_size=num_stages))
    best = brute_force(costs, capacity) if num_stages <= len(block) else None

    def first_fit(stage: int, last: int) -> int:
        assert capacity is not None
        return max(0, last - capacity[stage])

    found = smallest_bottleneck([running_sums(c) for c in costs], first_fit if capacity is not None else None)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.cuts[0] == 0
    assert found.cuts[-1] == len(block)
    assert all(a < b for a, b in itertools.pairwise(found.cuts))
    assert abs(found.bottleneck - best) <= 1e-6 * best
    assert found.lower_bound <= best * (1 + 1e-12)


def test_even_layers_are_cut_evenly() -> None:
    found = smallest_bottleneck([running_sums([1.0] * 12)] * 4)
    assert found is not None
    assert found.cuts == (0, 3, 6, 9, 12)
