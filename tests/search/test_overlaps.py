"""What communication adds to every range at once is what the simulator's functions say of each range by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.overlaps import backward_tables, forward_tables
from autopar.simulate.overlap import backward_exposed, forward_exposed

SECONDS = st.sampled_from([0.0, 0.1, 1.0, 2.5])
BLOCKS = st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=6)


ROOTS = st.lists(SECONDS, min_size=49, max_size=49)


@pytest.mark.parametrize("gathers", [True, False])
@settings(max_examples=60)
@given(BLOCKS, ROOTS)
def test_all_ranges_at_once_equal_each_by_itself(
    gathers: bool, blocks: list[tuple[float, float, float]], roots: list[float]
) -> None:
    compute, gather, reduce = (np.array(column) for column in zip(*blocks, strict=True))
    n = len(blocks)
    gather, root = gather * gathers, np.array(roots).reshape(7, 7)[: n + 1, : n + 1]
    forward = forward_tables(compute, gather, root)
    during, after = backward_tables(compute, gather, reduce, root)
    twice, longer = backward_tables(np.array([compute, 2 * compute]), gather, reduce, root)
    assert np.array_equal(twice[0], during) and np.array_equal(longer[0], after)
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
