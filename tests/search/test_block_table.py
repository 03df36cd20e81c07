from itertools import combinations, pairwise

import numpy as np
import pytest

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
