"""What the blocks of a chain cost and hold on one device; blocks that are alike share an entry, and so do ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import ModelGraph
from autopar.search.balance import every_start, few_starts
from autopar.search.elimination import Table
from autopar.search.variants import Level, Options


@dataclass(frozen=True, slots=True, eq=False)
class Where:
    """The windows (see `balance`) of stages: where each begins, and where in rows of values, one a stage, they are."""

    starts: NDArray[np.intp]
    size: int
    flat: NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sorts:
    """Which blocks are alike: of one class, holding the same of their parameters, and not at an end of the chain.

    `sort[i]` is the entry of block i. Ranges with equally many blocks of every entry are alike too: `counts[r, e]` says
    how many of entry e a range of sort r has, and `ranges[first, last]` is the sort of blocks[first:last], one beyond
    the last where that range is empty or not looked at.
    """

    sort: NDArray[np.intp]
    classes: tuple[str, ...]  # of each entry
    is_layer: tuple[bool, ...]
    held: tuple[tuple[bool, ...], ...]  # which of its parameters no earlier block that may be in its stage holds too
    first_outside: int | None  # the entry of the first block that is no layer
    counts: Table
    ranges: NDArray[np.intp]
    _every: dict[int, Where] = field(init=False, default_factory=dict)  # by stages
    _reached: dict[int, NDArray[np.bool_]] = field(init=False, default_factory=dict)

    @cached_property
    def number(self) -> Table:
        """How many blocks each entry has in the whole chain."""
        return np.bincount(self.sort, minlength=len(self.classes)).astype(np.float64)

    @property
    def ends(self) -> list[int]:
        """The entries of the chain's first and last block."""
        return [int(self.sort[0]), int(self.sort[-1])]

    def sums(self, each: Table) -> Table:
        """Of each sort of range the sum over its blocks."""
        return np.asarray(self.counts @ each)

    def maxima(self, each: Table) -> Table:
        """Of each sort of range the largest of its blocks' values, which are at least 0."""
        return np.asarray(np.where(self.counts > 0, each, 0.0).max(axis=1))

    def table(self, of_sort: Table) -> Table:
        """table[first, last]: the value of the range's sort; infinity where there is none."""
        return np.asarray(np.append(of_sort, np.inf)[self.ranges])

    def windows(self, of_sorts: Sequence[Table], where: Where | None = None) -> Table:
        """The windows (see `balance`) of one table a stage, by the values of its sorts of ranges; all of it, or where.
        """
        p = len(of_sorts)
        values = np.full((p, len(self.counts) + 1), np.inf)
        values[:, :-1] = of_sorts
        return np.take(values, self.every(p).flat if where is None else where.flat)

    def every(self, num_stages: int) -> Where:
        """All that so many stages can have."""
        if num_stages not in self._every:
            size = max(0, len(self.sort) + 1 - num_stages)
            self._every[num_stages] = self._where(every_start(num_stages), size)
        return self._every[num_stages]

    def where(self, of_sorts: Sequence[Table]) -> Where | None:
        """Where in windows stages are whose ranges all have finite values; None where there are none."""
        p = len(of_sorts)
        finite = np.isfinite(of_sorts) & self.reached(p)
        if not finite.any(axis=1).all():
            return None
        length = self.counts.sum(axis=1).astype(np.intp)
        shortest = np.where(finite, length, len(self.sort)).min(axis=1)
        starts, size = few_starts(shortest, np.where(finite, length, 0).max(axis=1), len(self.sort))
        return self._where(starts, size) if size else None

    def _where(self, starts: NDArray[np.intp], size: int) -> Where:
        inside = np.arange(size)
        firsts, lasts = (np.minimum(own[:, None] + inside, len(self.sort)) for own in (starts[:-1], starts[1:]))
        rows = np.arange(len(firsts))[:, None, None] * (len(self.counts) + 1)
        return Where(starts, size, self.ranges[firsts[:, :, None], lasts[:, None, :]] + rows)

    def reached(self, num_stages: int) -> NDArray[np.bool_]:
        """reached[stage, sort]: whether the stage can have such a range; the first begins the chain, the last ends it.
        """
        if num_stages not in self._reached:
            found = np.zeros((num_stages, len(self.counts) + 1), dtype=np.bool_)
            for stage, ranges in enumerate(self.every(num_stages).flat):
                own = ranges if stage else ranges[:1]
                found.reshape(-1)[own if stage < num_stages - 1 else own[:, -1:]] = True
            self._reached[num_stages] = found[:, :-1]
        return self._reached[num_stages]

    def of_ranges(self, of_sorts: Sequence[Table], cuts: Sequence[int]) -> list[float]:
        """Of each stage of a cut the value of its range."""
        return [float(each[self.ranges[span]]) for each, span in zip(of_sorts, pairwise(cuts), strict=True)]

    def least(self, table: Table) -> Table:
        """Of each sort of range the least value of its ranges in table[first, last]."""
        found = np.full(len(self.counts) + 1, np.inf)  # the last is of ranges that are not looked at
        order, firsts, sorts = self._by_sort
        found[sorts] = np.minimum.reduceat(table.reshape(-1)[order], firsts)
        return found[:-1]

    @cached_property
    def _by_sort(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Where in a flat table ranges are, by their sorts; where in that each sort begins; which sorts there are."""
        pairs = np.ravel_multi_index(np.triu_indices(len(self.ranges), 1), self.ranges.shape)
        own = self.ranges.reshape(-1)[pairs]
        order = np.argsort(own, kind="stable")
        sorts, firsts = np.unique(own[order], return_index=True)
        return pairs[order], firsts, sorts

    def from_start(self, of_sort: Table) -> Table:
        """The values of the ranges from the chain's start to each block; 0 for the empty one."""
        found: Table = np.append(of_sort, np.inf)[self.ranges[0]]
        found[0] = 0.0
        return found

    def of_cut(self, cuts: Sequence[int]) -> Sorts:
        """The same of the ranges of one cut alone."""
        spans = list(pairwise(cuts))
        own = list(dict.fromkeys(int(self.ranges[span]) for span in spans))
        ranges = np.full_like(self.ranges, len(own))
        for span in spans:
            ranges[span] = own.index(int(self.ranges[span]))
        return replace(self, counts=self.counts[own], ranges=ranges)

    @staticmethod
    def of(graph: ModelGraph, layer: NDArray[np.bool_], *, ends_apart: bool) -> Sorts:
        """The sorts of a graph's blocks and ranges.

        `ends_apart`: the chain's first and last block are in different stages; else the only range is the whole chain.
        """
        last = len(graph.blocks) - 1
        outside = None if layer.all() else int(np.argmin(layer))
        holder: dict[str, int] = {}
        entries: dict[tuple[object, ...], int] = {}
        sort: list[int] = []
        held: list[tuple[bool, ...]] = []
        for index, block in enumerate(graph.blocks):
            own = tuple(
                name not in holder or (ends_apart and index == last and holder[name] == 0) for name in block.params
            )
            holder.update(dict.fromkeys(block.params, index))
            key = (block.cls, bool(layer[index]), own, index if index in (0, last, outside) else -1)
            if key not in entries:
                held.append(own)
            sort.append(entries.setdefault(key, len(entries)))
        firsts = [sort.index(entry) for entry in range(len(entries))]
        counts, ranges = _ranges(np.array(sort), len(entries), every=ends_apart)
        return Sorts(
            sort=np.array(sort), classes=tuple(graph.blocks[i].cls for i in firsts), held=tuple(held),
            is_layer=tuple(bool(layer[i]) for i in firsts), counts=counts, ranges=ranges,
            first_outside=None if outside is None else sort[outside],
        )


def _ranges(sort: NDArray[np.intp], num_entries: int, *, every: bool) -> tuple[Table, NDArray[np.intp]]:
    """The counts of each sort of range, and the sort of every range, or of the whole chain alone."""
    size = len(sort) + 1
    if not every:
        ranges = np.ones((size, size), dtype=np.intp)
        ranges[0, -1] = 0
        return np.bincount(sort, minlength=num_entries)[None, :].astype(np.float64), ranges
    running = np.zeros((size, num_entries), dtype=np.intp)
    running[1:] = np.cumsum(sort[:, None] == np.arange(num_entries)[None, :], axis=0)
    first, last = np.triu_indices(size, 1)
    counts, of_pair = np.unique(running[last] - running[first], axis=0, return_inverse=True)
    ranges = np.full((size, size), len(counts), dtype=np.intp)
    ranges[first, last] = of_pair.reshape(-1)
    return counts.astype(np.float64), ranges


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTable:
    """The entries of a chain's blocks for one device of one kind at one size of micro-batch."""

    sorts: Sorts
    forward_s: Table
    backward_s: Table
    weights_s: Table  # the part of the backward for gradients of parameters alone
    saved_bytes: Table
    boundary_bytes: Table
    transient_bytes: Table
    buffer_bytes: Table
    numel: Table  # local parameters; one that an earlier block may hold in the same stage counts there alone
    kinds: tuple[Options, ...]  # of layers
    kind: NDArray[np.intp]  # of each entry, -1 where it is no layer
    levels: tuple[Level, ...]

    @cached_property
    def beside_layers(self) -> tuple[Table, Table, Table]:
        """For all ranges: bytes held by blocks that are no layers, the most beside them, and the stage's own input."""
        is_layer, sorts = self.kind >= 0, self.sorts
        entry = sorts.maxima(np.where(is_layer, self.boundary_bytes, 0.0))
        return (
            sorts.sums(np.where(is_layer, 0.0, self.saved_bytes)),
            sorts.maxima(np.where(is_layer, 0.0, self.transient_bytes)),
            np.where(sorts.counts[:, sorts.ends[0]] > 0, 0.0, entry),
        )

    @cached_property
    def all_kept(self) -> tuple[Table, Table]:
        """For all ranges: bytes that a micro-batch holds and the most beside them, where all activations are kept."""
        return self.sorts.sums(self.saved_bytes), self.sorts.maxima(self.transient_bytes)

    @cached_property
    def least_held(self) -> Table:
        """The fewest bytes that each layer can hold of a micro-batch."""
        fewest = [min(option.held_bytes for option in options) for options in self.kinds]
        return np.array([fewest[kind] if kind >= 0 else np.inf for kind in self.kind])

    @cached_property
    def most_added(self) -> tuple[Table, Table]:
        """The most seconds that a variant adds to each block's forward, and to its backward."""
        forward = [max(option.forward_s for option in options) for options in self.kinds]
        backward = [max(option.backward_s for option in options) for options in self.kinds]
        return (
            np.array([forward[kind] if kind >= 0 else 0.0 for kind in self.kind]),
            np.array([backward[kind] if kind >= 0 else 0.0 for kind in self.kind]),
        )

    @cached_property
    def numbers(self) -> list[NDArray[np.intp]]:
        """For each kind, how many of its layers each range of blocks has."""
        return [self.sorts.counts[:, self.kind == kind].sum(axis=1).astype(np.intp) for kind in range(len(self.kinds))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """By entry, on a stage of one kind and with all activations kept: times not above the simulator's.

    A second that recomputation or offload adds to a micro-batch adds at least `hidden_share` of it to `forward_s` or
    `backward_s`, and all of it to the plain ones, which count only the slow-down by hidden communication. `once_s`, of
    a step, holds where nothing is added, `once_beside_s` whatever is; of this `start_beside_s` comes before the first
    forward, and the rest, too, is not above what comes after the last backward.
    """

    forward_s: Table
    backward_s: Table
    plain_forward_s: Table
    plain_backward_s: Table
    hidden_share: float
    once_s: Table
    once_beside_s: Table
    blocks: BlockTable
    start_beside_s: Table
    behind: Behind | None = None  # None: there is no communication, or nothing hides it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behind:
    """By entry, what a stage's ranges need to be timed with communication behind compute.

    `gathers` and `reductions` of layers alone; `forward_s`, `backward_s` and `once_s`, of which `start_s` comes before
    the first forward, are without what they add.
    """

    gathers: Table
    reductions: Table
    forward_s: Table
    backward_s: Table
    once_s: Table
    start_s: Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeTimes:
    """The times of a stage table by sort of range, not above the simulator's; `hidden_share` as there."""

    forward_s: Table
    backward_s: Table
    plain_forward_s: Table
    plain_backward_s: Table
    hidden_share: float
    once_s: Table
    once_beside_s: Table
    start_beside_s: Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageRanges:
    """Of a stage by sort of range, not above the simulator's: a forward, that and its backward, and once a step.

    `through_s` and `later_s`, what is left to do after the first backward, have a table for each number of
    micro-batches in flight, or one for all; so has `once_s`, which holds beside `through_s`. `once_beside_s` and
    `start_beside_s` as in `StageTable`.
    """

    forward_s: Table
    through_s: Table
    later_s: Table
    once_s: Table
    once_beside_s: Table
    start_beside_s: Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTimes:
    """Times of a stage table, one for each block of the chain."""

    forward_s: Table
    backward_s: Table
    once_beside_s: Table
    start_beside_s: Table
