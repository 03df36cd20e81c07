"""What communication adds to each range of blocks, as `simulate/overlap.py` has it for one stage, for all at once."""

from __future__ import annotations

import numpy as np

from autopar.search.elimination import Table
from autopar.simulate.overlap import OVERLAP_SLOWDOWN

MANY_ROOTS = 4  # different sizes of what lies outside layers; beyond, ranges count as if it were gathered in no time


def forward_tables(compute: Table, gather: Table, root: Table) -> Table:
    """table[i, j]: what gathering adds to a forward of blocks i to j; infinite where that is empty.

    `compute` and `gather` have a block's seconds each, `root` a range's for what it gathers first.
    """
    size = len(compute) + 1
    found = np.full((size, size), np.inf)
    upper = np.triu(np.ones((size, size), dtype=bool), 1)
    sizes = np.unique(root[upper])
    for root_s in sizes if len(sizes) <= MANY_ROOTS else [0.0]:
        taken = upper & (root == root_s) if len(sizes) <= MANY_ROOTS else upper
        clock, queue, gathered = (np.full(size - 1, root_s) for _ in range(3))
        computed = np.zeros(size - 1)
        for k in range(size - 1):
            clock_k, queue_k, gathered_k, computed_k = (each[: k + 1] for each in (clock, queue, gathered, computed))
            queue_k += gather[k]
            gathered_k += gather[k]
            begin = np.maximum(clock_k, queue_k)
            clock_k[:] = begin + compute[k]
            computed_k += compute[k]
            np.maximum(queue_k, begin, out=queue_k)
            during = clock_k - computed_k
            during = during + OVERLAP_SLOWDOWN * np.maximum(0.0, gathered_k - during)
            column = found[: k + 1, k + 1]
            np.copyto(column, during, where=taken[: k + 1, k + 1])
    return found


def backward_tables(compute: Table, gather: Table, reduce: Table, root: Table) -> tuple[Table, Table]:
    """What gathering and reducing add to a backward of blocks i to j while it computes, and after its end.

    `root`: a range's seconds for what it reduces last.
    """
    size = len(compute) + 1
    during_s, after_s = np.full((size, size), np.inf), np.full((size, size), np.inf)
    clock, queue, ready, moved, computed = (np.zeros(size) for _ in range(5))
    for k in range(size - 2, -1, -1):
        ready[k + 1] = queue[k + 1] = moved[k + 1] = gather[k]
        clock_k, queue_k, ready_k, moved_k, computed_k = (
            each[k + 1 :] for each in (clock, queue, ready, moved, computed)
        )
        begin = np.maximum(clock_k, ready_k)
        end = begin + compute[k]
        computed_k += compute[k]
        # The range ends here: its own reduction, then that of what lies outside layers.
        last = np.maximum(queue_k, end) + reduce[k] if reduce[k] > 0 else queue_k
        own = root[k, k + 1 :]
        last = np.where(own > 0, np.maximum(last, end) + own, last)
        after = np.maximum(0.0, last - end)
        during = end - computed_k
        hidden = np.maximum(0.0, moved_k + reduce[k] + own - during - after)
        during_s[k, k + 1 :], after_s[k, k + 1 :] = during + OVERLAP_SLOWDOWN * hidden, after
        if k and gather[k - 1] > 0:
            queue_k[:] = np.maximum(queue_k, begin) + gather[k - 1]
            ready_k[:] = queue_k
            moved_k += gather[k - 1]
        clock_k[:] = end
        if reduce[k] > 0:
            queue_k[:] = np.maximum(queue_k, end) + reduce[k]
            moved_k += reduce[k]
    return during_s, after_s
