"""What a stage of any range of blocks takes at least, alone and with so many micro-batches in flight.

Times of a range are sums over its blocks, or closer, with communication behind compute unit by unit; loads add what the
variants of layers cost that fit into memory. The simulator times no stage below them (`bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import floor

import numpy as np
from numpy.typing import NDArray

from autopar.search.block_table import Behind, BlockTable, RangeTimes, Sorts, StageRanges, StageTable
from autopar.search.candidates import Candidate
from autopar.search.elimination import Table
from autopar.search.memory_bounds import MemoryBounds
from autopar.search.overlaps import backward_tables, forward_tables
from autopar.search.stage_kinds import StageKind
from autopar.search.stage_tables import StageTables
from autopar.simulate.overlap import OVERLAP_SLOWDOWN

MANY_OVERLAPS = 1024  # kept at once
FORWARD_PARTS = 8  # by which the forwards that are left, as a share of the backwards, are rounded down
SINGLE_DEPTHS = 8  # micro-batches in flight, beyond which numbers are taken together


def _nothing() -> Table:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Overlap:
    """By sort of range, what communication adds: at the start, to a forward, to a backward, after it, both of these.

    `..._beside`: whatever layers do. Under ZeRO 3 alone, or without it alone, where there is a default.
    """

    start: Table
    both: Table
    forward: Table = field(default_factory=_nothing)
    during: Table = field(default_factory=_nothing)
    after: Table = field(default_factory=_nothing)
    start_beside: Table = field(default_factory=_nothing)
    after_beside: Table = field(default_factory=_nothing)
    both_beside: Table = field(default_factory=_nothing)


class RangeLoads:
    """Times and loads of ranges, by sort; `sorts` are those of one stage and of several."""

    def __init__(self, tables: StageTables, memory: MemoryBounds, sorts: Sequence[Sorts]) -> None:
        self._tables, self._memory, self._sorts = tables, memory, sorts
        self._overlaps: dict[tuple[object, ...], tuple[BlockTable, _Overlap]] = {}

    def stage_ranges(
        self, c: Candidate, kind: StageKind, counts: Sequence[int], *, closer: bool, limit_s: float = np.inf
    ) -> StageRanges:
        """By sort of range what a stage takes with at least so many micro-batches in flight, ascending numbers.

        Infinite where a range does not fit into memory, and maybe where all micro-batches take `limit_s` or more. Not
        `closer`: as if all activations could be kept and all that can hide behind compute did.
        """
        table = self._tables.times(c, kind)
        times = self.times(c, kind, table) if closer else summed(table)
        through = times.forward_s + times.backward_s
        through = self._first(c, kind, counts, table.blocks, times, limit_s) if closer else through[None]
        later = self._later(c, kind, table.blocks, times)
        # Every second that variants add to a micro-batch can hide at most a second of it.
        hidden = np.where(np.isfinite(through), through - times.forward_s - times.backward_s, np.inf)
        return StageRanges(
            forward_s=times.forward_s, through_s=through, later_s=later[np.minimum(counts, len(later)) - 1],
            once_s=np.maximum(times.once_beside_s, times.once_s - hidden), once_beside_s=times.once_beside_s,
            start_beside_s=times.start_beside_s,
        )

    @property
    def ranges(self) -> NDArray[np.intp]:
        """[first, last]: the sort of blocks[first:last] in chains of several stages; one beyond the last where empty.
        """
        return self._sorts[True].ranges

    def _later(self, c: Candidate, kind: StageKind, blocks: BlockTable, times: RangeTimes) -> Table:
        """[in flight - 1, sort of range]: what is left after a stage's first backward with at least so many in flight.

        Warm-ups may be as deep as memory lets: the deeper they are the fewer forwards are left, and the more variants
        add. Numbers from `SINGLE_DEPTHS` on count as that one.
        """
        m = c.num_micro_batches
        if m == 1:
            return np.zeros((1, len(times.forward_s)))
        least, most = depths_up_to(m)
        added = self._memory.added_by_depth(c, kind, least, blocks)
        left = (m - 1) * (times.backward_s + times.hidden_share * added) + (m - most[:, None]) * times.forward_s
        return np.asarray(np.minimum.accumulate(left[::-1])[::-1][:SINGLE_DEPTHS])

    def _first(
        self, c: Candidate, kind: StageKind, counts: Sequence[int], blocks: BlockTable, table: RangeTimes,
        limit_s: float,
    ) -> Table:
        """[in flight, sort of range]: the last of `loads` with each of these many in flight."""
        m, in_flight = c.num_micro_batches, np.array(counts)[:, None]
        work = table.forward_s + table.backward_s
        room = self._memory.room(c, kind, in_flight, blocks)
        if room[1].all():
            return np.broadcast_to(work, room[1].shape)
        load = (m - 1) * table.backward_s + (m - in_flight) * table.forward_s
        below = load + work + table.once_s + (in_flight - 1) * table.plain_forward_s < limit_s
        added = self._memory.added(c, in_flight, blocks, room, (1.0, 1.0), below)
        plain = table.plain_forward_s + table.plain_backward_s
        return np.asarray(np.maximum(work + table.hidden_share * added, plain + added))

    def loads(
        self, c: Candidate, kind: StageKind, counts: Sequence[int], blocks: BlockTable, table: RangeTimes,
        limit_s: float = np.inf, wanted: NDArray[np.bool_] | None = None, chain_s: float = 0.0,
    ) -> list[tuple[Table, Table, Table]]:
        """The loads with each of these many micro-batches in flight, all at once: one each, or none of them one.

        Of those ranges that are wanted (of all, if None) and take less than the limit; others may be infinite.
        `chain_s`: what the first micro-batch takes at least through all stages.
        """
        m, in_flight = c.num_micro_batches, np.array(counts)[:, None]
        work = table.forward_s + table.backward_s
        load = (m - 1) * table.backward_s + (m - in_flight) * table.forward_s
        room = self._memory.room(c, kind, in_flight, blocks)
        if room[1].all():
            return [(own, own, work) for own in load]
        # Few weights, so that few frontiers are made: what copies add to forwards counts so much on all stages but the
        # last, which does as many forwards as backwards after its first.
        share = 1.0 if counts[0] == 1 else floor(FORWARD_PARTS * (m - max(counts)) / (m - 1)) / FORWARD_PARTS
        own = work + table.once_s + (in_flight - 1) * table.plain_forward_s  # beside that, all that a stage does
        below = load + np.maximum(own, chain_s) < limit_s
        if wanted is not None:
            below &= wanted
        added = self._memory.added(c, in_flight, blocks, room, (share, 1.0), below)
        added = (m - 1) * added if m > 1 else np.where(np.isfinite(added), 0.0, np.inf)
        plain = (m - 1) * table.plain_backward_s + (m - in_flight) * table.plain_forward_s
        later = np.maximum(load + table.hidden_share * added, plain + added)
        if counts[0] != 1 or m == 1:
            added = self._memory.added(c, in_flight, blocks, room, (1.0, 1.0), below)
        else:
            added = added / (m - 1)
        plain = table.plain_forward_s + table.plain_backward_s
        first = np.maximum(work + table.hidden_share * added, plain + added)
        finite = np.isfinite(first)
        more = np.where(finite, first, 0.0) - np.where(finite, work, 0.0)
        return list(zip(later, np.where(finite, later + more, np.inf), first, strict=True))

    def times(self, c: Candidate, kind: StageKind, table: StageTable) -> RangeTimes:
        """The times by sort of range; with communication behind compute unit by unit, over several stages.

        A second that is added to the compute of a range adds at least as much to its time as it takes from the
        communication that is exposed, which is at most all but the slow-down; the rest of ZeRO 2's is hidden more.
        """
        behind, sorts = table.behind, table.blocks.sorts
        sums = summed(table)
        if behind is None or c.pp == 1:
            return sums
        start, forward, backward, after, start_beside, after_beside = self._overlap(c, kind, table.blocks, behind)
        return replace(
            sums, forward_s=sorts.sums(behind.forward_s) + forward,
            backward_s=sorts.sums(behind.backward_s) + backward,
            hidden_share=OVERLAP_SLOWDOWN if c.zero == 3 else 1.0, once_s=sorts.sums(behind.once_s) + start + after,
            once_beside_s=sorts.sums(behind.once_s) + start_beside + after_beside,
            start_beside_s=sorts.sums(behind.start_s) + start_beside,
        )

    def _overlap(self, c: Candidate, kind: StageKind, blocks: BlockTable, behind: Behind) -> list[Table]:
        """By sort of range, what communication adds: at the start, to a forward and a backward, at the end.

        And at the start and the end whatever layers do. ZeRO 1 and 2 communicate alike, at other times.
        """
        key = id(blocks), id(kind), c.num_shards, {2: 1}.get(c.zero, c.zero)
        if key not in self._overlaps:
            if len(self._overlaps) >= MANY_OVERLAPS:
                self._overlaps.clear()
            self._overlaps[key] = blocks, self._make_overlap(c, kind, blocks, behind)  # kept with their id
        found = self._overlaps[key][1]
        zero = np.zeros_like(found.start)
        if c.zero == 3:
            return [found.start, found.forward, found.both, zero, found.start, zero]
        if c.zero == 2:
            return [found.start, zero, found.during, found.after, found.start_beside, found.after_beside]
        return [found.start, zero, zero, found.both, found.start_beside, found.both_beside]

    def _make_overlap(self, c: Candidate, kind: StageKind, blocks: BlockTable, behind: Behind) -> _Overlap:
        sorts, sort = blocks.sorts, blocks.sorts.sort
        sizes, of_sort = np.unique(sorts.sums(np.where(blocks.kind >= 0, 0.0, blocks.numel)), return_inverse=True)
        gather, reduce = (
            np.append(np.array([of_size(c, kind, float(n)) if n else 0.0 for n in sizes])[of_sort], 0.0)[sorts.ranges]
            for of_size in (self._tables.gather_s, self._tables.reduce_s)
        )
        gathers, reductions, nothing = behind.gathers[sort], behind.reductions[sort], np.zeros(len(sort))
        least = blocks.forward_s[sort], blocks.backward_s[sort]
        most = least[0] + blocks.most_added[0][sort], least[1] + blocks.most_added[1][sort]
        zero = np.zeros(len(sorts.counts))
        if c.zero == 3:
            during, after = backward_tables(least[1], gathers, reductions, reduce)
            return _Overlap(
                start=sorts.least(gather), both=sorts.least(during + after),
                forward=sorts.least(forward_tables(least[0], gathers, np.zeros_like(gather))),
            )
        start = start_beside = zero
        if c.zero:
            start, start_beside = map(sorts.least, forward_tables(np.array([least[0], most[0]]), gathers, gather))
        during, after = backward_tables(np.array([least[1], most[1]]), nothing, reductions, reduce)
        return _Overlap(
            start=start, start_beside=start_beside, both=sorts.least(during[0] + after[0]),
            both_beside=sorts.least(during[1] + after[1]), during=sorts.least(during[0]), after=sorts.least(after[0]),
            after_beside=sorts.least(after[1]),
        )


@lru_cache(maxsize=256)
def depths_up_to(most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Numbers of micro-batches in flight in parts: the first and the last number of each; at first one by one."""
    firsts, lasts = [], [0]
    while lasts[-1] < most:
        first = lasts[-1] + 1
        firsts.append(first)
        lasts.append(first if first <= SINGLE_DEPTHS else min(most, first * 9 // 8))
    return np.array(firsts), np.array(lasts[1:])


def summed(table: StageTable) -> RangeTimes:
    """The times by sort of range as sums over blocks."""
    sums = table.blocks.sorts.sums
    return RangeTimes(
        forward_s=sums(table.forward_s), backward_s=sums(table.backward_s), hidden_share=table.hidden_share,
        plain_forward_s=sums(table.plain_forward_s), plain_backward_s=sums(table.plain_backward_s),
        once_s=sums(table.once_s), once_beside_s=sums(table.once_beside_s), start_beside_s=sums(table.start_beside_s),
    )
