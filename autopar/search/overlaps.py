"""What communication adds to each range of blocks, as `simulate/overlap.py` has it for one stage, for all at once."""

from __future__ import annotations

import numpy as np

from autopar.search.elimination import Table
from autopar.simulate.overlap import OVERLAP_SLOWDOWN

MANY_ROOTS = 4  # different sizes of what lies outside layers; beyond, ranges count as if it were gathered in no time


def forward_tables(compute: Table, gather: Table, root: Table) -> Table:
    """table[i, j]: what gathering adds to a forward of blocks i to j; infinite where that is empty.

    `compute` and `gather` have a block's seconds each, `root` a range's for what it gathers first. `compute` may have
    more dims in front, and then so has what is given.
    """
    size = compute.shape[-1] + 1
    upper = np.triu(np.ones((size, size), dtype=bool), 1)
    sizes, which = np.unique(root[upper], return_inverse=True)
    if len(sizes) > MANY_ROOTS:
        sizes, which = np.zeros(1), np.zeros_like(which)
    roots = sizes.reshape(-1, *(1,) * compute.ndim)  # all of them at once, in a dim in front
    shape = (*np.broadcast_shapes(roots.shape[:-1], compute.shape[:-1]), size - 1)
    clock, queue = np.broadcast_to(roots, shape).copy(), np.broadcast_to(roots, shape).copy()
    gathered, computed = np.broadcast_to(roots, (*roots.shape[:-1], size - 1)).copy(), np.zeros(compute.shape)
    all_during, all_gathered = np.zeros((*shape[:-1], size, size)), np.zeros((*roots.shape[:-1], size, size))
    for k in range(size - 1):
        clock_k, queue_k, gathered_k, computed_k = (
            each[..., : k + 1] for each in (clock, queue, gathered, computed)
        )
        queue_k += gather[k]
        gathered_k += gather[k]
        begin = np.maximum(clock_k, queue_k)
        np.add(begin, compute[..., k, None], out=clock_k)
        computed_k += compute[..., k, None]
        np.maximum(queue_k, begin, out=queue_k)
        all_during[..., : k + 1, k + 1] = clock_k - computed_k
        all_gathered[..., : k + 1, k + 1] = gathered_k
    first, last = np.nonzero(upper)
    during = np.moveaxis(all_during[..., first, last], 0, -1)[..., np.arange(len(which)), which.reshape(-1)]
    moved = np.moveaxis(all_gathered[..., first, last], 0, -1)[..., np.arange(len(which)), which.reshape(-1)]
    found = np.full((*compute.shape[:-1], size, size), np.inf)
    found[..., first, last] = during + OVERLAP_SLOWDOWN * np.maximum(0.0, moved - during)
    return found


def backward_tables(compute: Table, gather: Table, reduce: Table, root: Table) -> tuple[Table, Table]:
    """What gathering and reducing add to a backward of blocks i to j while it computes, and after its end.

    `root`: a range's seconds for what it reduces last. `compute` may have more dims in front, as for the forward.
    """
    size = compute.shape[-1] + 1
    shape = (*compute.shape[:-1], size)
    clock, queue, ready, moved, computed = (np.zeros(shape) for _ in range(5))
    # Of each range, when it is computed: the end, the queue until then, seconds of computing and of communication.
    ends, queues, works, sent = (np.zeros((*shape, size)) for _ in range(4))
    for k in range(size - 2, -1, -1):
        for each in (ready, queue, moved):
            each[..., k + 1] = gather[k]
        clock_k, queue_k, ready_k, moved_k, computed_k = (
            each[..., k + 1 :] for each in (clock, queue, ready, moved, computed)
        )
        begin = np.maximum(clock_k, ready_k)
        np.add(begin, compute[..., k, None], out=clock_k)
        computed_k += compute[..., k, None]
        for table, values in ((ends, clock_k), (queues, queue_k), (works, computed_k), (sent, moved_k)):
            table[..., k, k + 1 :] = values
        if k and gather[k - 1] > 0:
            queue_k[...] = np.maximum(queue_k, begin) + gather[k - 1]
            ready_k[...] = queue_k
            moved_k += gather[k - 1]
        if reduce[k] > 0:
            queue_k[...] = np.maximum(queue_k, clock_k) + reduce[k]
            moved_k += reduce[k]
    # The range ends with its first block: that one's reduction, then that of what lies outside layers.
    own = np.append(reduce, 0.0)[:, None]
    last = np.where(own > 0, np.maximum(queues, ends) + own, queues)
    last = np.where(root > 0, np.maximum(last, ends) + root, last)
    after = np.maximum(0.0, last - ends)
    during = ends - works
    hidden = np.maximum(0.0, sent + own + root - during - after)
    empty = np.tri(size, dtype=bool)
    return np.where(empty, np.inf, during + OVERLAP_SLOWDOWN * hidden), np.where(empty, np.inf, after)
