from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.search.balance import smallest_bottleneck, smallest_sum
from autopar.search.block_table import Sorts, _ranges

SORT = np.array([0, 1, 1, 2, 1, 1, 3])


def sorts() -> Sorts:
    counts, ranges = _ranges(SORT, 4, every=True)
    return Sorts(
        sort=SORT, classes=("first", "layer", "other", "last"), is_layer=(False, True, True, False),
        held=((), (), (), ()), first_outside=0, counts=counts, ranges=ranges,
    )


@pytest.mark.parametrize("num_stages", range(1, len(SORT) + 1))
def test_stages_reach_the_ranges_of_all_cuts_and_no_others(num_stages: int) -> None:
    made, num_blocks = sorts(), len(SORT)
    found: list[set[int]] = [set() for _ in range(num_stages)]
    for inner in combinations(range(1, num_blocks), num_stages - 1):
        for stage, span in enumerate(pairwise((0, *inner, num_blocks))):
            found[stage].add(int(made.ranges[span]))
    assert [set(np.flatnonzero(own).tolist()) for own in made.reached(num_stages)] == found


def test_windows_have_the_values_of_the_ranges() -> None:
    made = sorts()
    values = [np.arange(len(made.counts)) + 100.0 * stage for stage in range(3)]
    windows = made.windows(values)
    for cut in ((0, 1, 4, 7), (0, 3, 5, 7), (0, 5, 6, 7)):
        own = [windows[s, first - s, last - s - 1] for s, (first, last) in enumerate(pairwise(cut))]
        assert own == made.of_ranges(values, cut)


@given(st.integers(2, len(SORT)), st.integers(0, 10**6), st.sampled_from([0.1, 0.4, 0.7]))
def test_windows_of_what_is_allowed_have_all_cuts(num_stages: int, seed: int, share: float) -> None:
    made, rng = sorts(), np.random.default_rng(seed)
    values = rng.random((num_stages, len(made.counts)))
    values[rng.random(values.shape) < share] = np.inf
    where, every = made.where(list(values)), made.windows(list(values))
    quickest, least = smallest_sum(every), smallest_bottleneck(every)
    if where is None:
        assert quickest is None
        return
    few = made.windows(list(values), where)
    assert few.shape == (num_stages, where.size, where.size)
    assert where.size <= every.shape[1]
    assert smallest_sum(few, where.starts) == quickest
    assert smallest_bottleneck(few, starts=where.starts) == least
    for inner in combinations(range(1, len(SORT)), num_stages - 1):
        cut = (0, *inner, len(SORT))
        own = made.of_ranges(values, cut)
        if not np.isfinite(own).all():
            continue
        spans = list(pairwise(np.array(cut) - where.starts))
        assert [few[s, first, last] for s, (first, last) in enumerate(spans)] == own
