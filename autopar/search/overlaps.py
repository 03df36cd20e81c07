"""What communication adds to each range of blocks, as `simulate/overlap.py` has it for one stage, for all at once."""

from __future__ import annotations

import numpy as np

from autopar.search.elimination import Table
from autopar.simulate.overlap import OVERLAP_SLOWDOWN


def forward_tables(compute: Table, gather: Table, root: Table) -> Table:
    """table[i, j]: what gathering adds to a forward of blocks i to j; infinite where that is empty.

    `compute` and `gather` have a block's seconds each, `root` a range's for what it gathers first. `compute` may have
    more dims in front, and then so has what is given.

    A block begins when the one before has been computed and its own parameters are there, for which the queue is free
    from when that one began: the blocks after the first wait for what gathering takes longer than computing does.
    """
    waits = _running(np.maximum(0.0, gather[1:] - compute[..., :-1]))
    waited = waits[..., None, :] - waits[..., :, None]  # of a block, from the first of the range on
    sent = _running(gather)
    moved = sent[None, 1:] - sent[:-1, None]
    first = gather[:, None]
    added = root[:-1, 1:] + first + waited
    return _of_ranges(added + OVERLAP_SLOWDOWN * np.maximum(0.0, moved - first - waited))


def _running(each: Table) -> Table:
    """[..., i]: the sum of the first i."""
    found = np.zeros((*each.shape[:-1], each.shape[-1] + 1))
    np.cumsum(each, axis=-1, out=found[..., 1:])
    return found


def _of_ranges(values: Table) -> Table:
    """table[i, j] of values[i, j - 1], by the first and the last block; infinite where the range is empty."""
    size = values.shape[-1] + 1
    found = np.full((*values.shape[:-2], size, size), np.inf)
    found[..., :-1, 1:] = np.where(np.tri(size - 1, k=-1, dtype=bool), np.inf, values)
    return found


def _reduced(compute: Table, reduce: Table, root: Table) -> tuple[Table, Table]:
    """`backward_tables` where nothing is gathered.

    The queue ends with a block's reduction and those of all before it in the chain, which come later; it may have been
    idle until that block was computed.
    """
    works, sent = _running(compute), _running(reduce)
    ahead = sent[1:] - works[..., :-1]  # of the queue, by the block from which on it is never idle
    size = compute.shape[-1]
    here = np.tri(size, k=-1, dtype=bool)  # no range: the last block is before the first
    most = np.maximum.accumulate(np.where(here, -np.inf, ahead[..., None, :]), axis=-1)
    after = np.maximum(0.0, most - (sent[:-1] - works[..., :-1])[..., :, None]) + root[:-1, 1:]
    hidden = np.maximum(0.0, sent[None, 1:] - sent[:-1, None] + root[:-1, 1:] - after)
    return _of_ranges(OVERLAP_SLOWDOWN * hidden), _of_ranges(after)


def backward_tables(compute: Table, gather: Table, reduce: Table, root: Table) -> tuple[Table, Table]:
    """What gathering and reducing add to a backward of blocks i to j while it computes, and after its end.

    `root`: a range's seconds for what it reduces last. `compute` may have more dims in front, as for the forward.
    """
    if not gather.any():
        return _reduced(compute, reduce, root)
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
