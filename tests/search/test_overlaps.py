"""What communication adds to every range at once is what the simulator's functions say of each range by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.overlaps import backward_tables, forward_tables
from autopar.simulate.overlap import backward_exposed, forward_exposed

SECONDS = st.sampled_from([0.0, 0.1, 1.0, 2.5])
BLOCKS = st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=6)


@settings(max_examples=60)
@given(BLOCKS, SECONDS, SECONDS)
def test_all_ranges_at_once_equal_each_by_itself(
    blocks: list[tuple[float, float, float]], first_root: float, last_root: float
) -> None:
    compute, gather, reduce = (np.array(column) for column in zip(*blocks, strict=True))
    n = len(blocks)
    root = np.zeros((n + 1, n + 1))  # ranges with the first and with the last block have something outside layers
    root[0] += first_root
    root[:, n] += last_root
    forward = forward_tables(compute, gather, root)
    during, after = backward_tables(compute, gather, reduce, root)
    for i in range(n):
        for j in range(i + 1, n + 1):
            own = slice(i, j)
            alone = forward_exposed([0.0, *compute[own]], [root[i, j], *gather[own]])
            assert forward[i, j] == pytest.approx(alone.during_s)
            back = backward_exposed(
                [*compute[own][::-1], 0.0], [*gather[own][::-1], 0.0], [*reduce[own][::-1], root[i, j]]
            )
            assert during[i, j] == pytest.approx(back.during_s)
            assert after[i, j] == pytest.approx(back.after_s)


def test_with_many_roots_they_count_as_nothing() -> None:
    compute, gather = np.ones(6), np.ones(6)
    root = np.arange(49.0).reshape(7, 7)
    found, without = (forward_tables(compute, gather, each) for each in (root, np.zeros((7, 7))))
    assert np.array_equal(found, without)
