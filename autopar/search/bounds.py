"""Lower bounds of the simulated step time of a candidate over all its cuts; what fits is asked of `memory_bounds`.

The simulator times a stage from its blocks; here every part of that time is replaced by something not above it that
adds up over blocks. For stage s of p under 1F1B with m micro-batches, of which k = min(p - s, m) go forward before the
first comes back: the first backward on s waits for all forwards of micro-batch 0 and the backwards behind s; then s has
m backwards and m - k forwards to do; then the last micro-batch goes back to stage 0, which ends the step. So

    T >= start_0 + (sum over stages of f + b) + (m - 1) b_s + (m - k) f_s + end_0

for each s, and the best cut is found exactly for the largest of these (`balance`). Hidden data-parallel communication
costs at least its slow-down of the compute, and at least what does not fit behind it (`simulate/overlap.py`). The links
between stages count for the first micro-batch, with the least that any cut sends. A property test compares these bounds
with the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.measured import op_table
from autopar.cost_models.op_kinds import element_bytes
from autopar.graph.model_graph import ModelGraph
from autopar.search.balance import range_sums, smallest_bottleneck, smallest_sum, windows_of
from autopar.search.block_table import Behind, BlockTable, RangeTimes, Sorts, StageRanges, StageTable, StageTimes
from autopar.search.candidates import Candidate, PlanRequest, Work
from autopar.search.elimination import Table
from autopar.search.loops import PipelineBound, cut_time_s, rounds_between
from autopar.search.memory_bounds import MemoryBounds
from autopar.search.overlaps import backward_tables, forward_tables
from autopar.search.shardings import ShardingChooser
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.search.stage_tables import StageTables
from autopar.sharding.joint import held_share
from autopar.simulate.block_cost import BlockCost
from autopar.simulate.class_costs import CostAxis
from autopar.simulate.overlap import OVERLAP_SLOWDOWN
from autopar.simulate.stage_cost import is_layer

Cuts = tuple[int, ...]
ENDLESS_ROWS = 1 << 30  # of a micro-batch, to see what a row takes where nothing else counts
ENDLESS_ERROR = 1e-5  # relative; what is left there of launches and unfilled waves is less
MANY_OVERLAPS = 1024  # kept at once
MANY_CUTS = 1024  # kept at once
SINGLE_DEPTHS = 8  # micro-batches in flight, beyond which numbers are taken together
PARTS = 16  # into which the cuts over unlike stages are parted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loads:
    """Tables over ranges of blocks, one for each stage.

    `later`: what micro-batches after the first take, infinite where the range does not fit; `first`: what the first
    takes; `later_with_first`: `later` and what variants add to the first. `once`, by the end of stage 0's range: what
    it does once a step, and the first micro-batch's time on links; `once_alone`: the same, where what variants add to
    the first micro-batch on stage 0 is not counted. `chain_s`: the first micro-batch's time through all blocks where
    all stages are alike, but for what variants add. `own`: what a stage does in a step, whatever others do: it counts
    where the step's end is long.
    """

    later: list[Table]
    later_with_first: list[Table]
    first: list[Table]
    own: list[Table]
    once: Table
    once_alone: Table
    chain_s: float | None


class Bounds:
    """Bounds candidates of one model on one cluster; keeps the block costs that candidates share."""

    def __init__(
        self, graph: ModelGraph, layout: StageLayout, request: PlanRequest, chooser: ShardingChooser
    ) -> None:
        self._graph, self._layout, self._request, self._chooser = graph, layout, request, chooser
        layer = np.array([is_layer(block) for block in graph.blocks])
        # What crosses each border between blocks, as (class, index of output); borders that are alike count once.
        made = {name: (block.cls, i) for block in graph.blocks for i, name in enumerate(block.outputs)}
        crossing = (graph.boundary(at) for at in range(1, len(graph.blocks)))
        self._borders = tuple(dict.fromkeys(tuple(made[name] for name in names) for names in crossing))
        self._sorts = [Sorts.of(graph, layer, ends_apart=apart) for apart in (False, True)]
        self._tables = StageTables(request, chooser, self._sorts, int(layer.sum()))
        self._memory = MemoryBounds(request, int(layer.sum()))
        self._overlaps: dict[tuple[object, ...], tuple[BlockTable, list[Table]]] = {}
        self._limits: dict[tuple[object, ...], tuple[tuple[float, float], tuple[float, float]]] = {}
        self._sent: dict[tuple[object, ...], tuple[float, float]] = {}
        self._rough: dict[Work, float] = {}
        self._of_work: dict[Work, float] = {}
        self._of_cuts: dict[Cuts, Sorts] = {}
        self._cut_blocks: dict[tuple[int, Cuts], tuple[BlockTable, BlockTable]] = {}  # by the whole table's id
        self._last: tuple[tuple[Candidate, float], _Loads] | None = None

    def rough(self, c: Candidate) -> float:
        """A bound without the costs of blocks at the candidate's rows: all rows as quick as those of endless batches.

        No device does a row of a smaller batch in less: efficiencies of products rise with the rows, and what does not
        grow with them comes on top. Nor is a micro-batch quicker than one of hardly any rows, which still launches
        every kernel and reads every weight. 0 where that is not known: times or links are measured, or rows meet rows.
        """
        if (found := self._rough.get(work := c.work)) is None:
            found = self._rough[work] = self._make_rough(c)
        return found

    def _make_rough(self, c: Candidate) -> float:
        kinds = self._layout.kinds(c)
        key = (c.tp, c.cp, c.sequence_parallel, c.split_weights, c.pp > 1, frozenset(k.compute_kind for k in kinds))
        if key not in self._limits:
            self._limits[key] = self._row_limits(c, tuple(dict.fromkeys(kinds)))
        (forward, backward), (least_forward, least_backward) = self._limits[key]
        return shared_work(c, max(c.rows * forward, least_forward), max(c.rows * backward, least_backward))

    def of_work(self, c: Candidate) -> float:
        """A bound by what the blocks take at the candidate's rows, with nothing of data axes."""
        if (found := self._of_work.get(work := c.work)) is None:
            found = self._of_work[work] = self._make_of_work(c)
        return found

    def _make_of_work(self, c: Candidate) -> float:
        tables = [self._tables.blocks(c, kind) for kind in dict.fromkeys(self._layout.kinds(c))]
        number = tables[0].sorts.number
        forward = np.minimum.reduce([table.forward_s for table in tables])
        backward = np.minimum.reduce([table.backward_s for table in tables])
        return shared_work(c, float(forward @ number), float(backward @ number))

    def work_on(self, c: Candidate, kind: StageKind) -> float:
        """The same where all stages are of this kind."""
        costs = self._tables.block_costs(c, kind)
        each = [costs[block.cls] for block in self._graph.blocks]
        return shared_work(
            c, sum(cost.forward_compute_s + cost.forward_tp_comm_s for cost in each),
            sum(cost.backward_compute_s + cost.backward_tp_comm_s for cost in each),
        )

    def _row_limits(self, c: Candidate, kinds: Sequence[StageKind]) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds that a row of an endless batch takes through all blocks at least, forward and backward.

        And those that a micro-batch of hardly any rows takes.
        """
        rows = self._graph.rows
        if not self._graph.rows_are_tagged or any(
            info.numel % rows**2 == 0 for cls in self._chooser.classes for info in cls.tensors if info.numel
        ) or any(_is_measured(kind) for kind in kinds):
            return (0.0, 0.0), (0.0, 0.0)
        found = []
        for own, share in ((ENDLESS_ROWS, (1 - ENDLESS_ERROR) / ENDLESS_ROWS), (1 / ENDLESS_ROWS, 1 - ENDLESS_ERROR)):
            like = replace(c, micro_batch=max(1, round(own)), spread=max(1, round(1 / own)))
            tables = [self._tables.blocks(like, kind) for kind in kinds]
            number = tables[0].sorts.number
            found.append((
                share * float(np.minimum.reduce([t.forward_s for t in tables]) @ number),
                share * float(np.minimum.reduce([t.backward_s for t in tables]) @ number),
            ))
        return found[0], found[1]

    def quick(self, c: Candidate, limit_s: float = np.inf) -> float:
        """A bound without looking at cuts: all stages share the work evenly. Infinite where the layers cannot fit.

        Where the work alone is not below the limit, the bound by it; or that by the work and the data axes.
        """
        if limit_s < np.inf and (work_s := self.of_work(c)) >= limit_s:
            return work_s
        kinds = self._layout.kinds(c)
        if not self._memory.layers_fit(c, kinds, {kind: self._tables.blocks(c, kind) for kind in dict.fromkeys(kinds)}):
            return np.inf
        tables = {kind: self._tables.times(c, kind) for kind in dict.fromkeys(kinds)}
        m, most = c.num_micro_batches, min(c.pp, c.num_micro_batches)
        if c.pp == 1:
            if limit_s < np.inf:  # what variants of layers add comes on top
                alone = tables[kinds[0]]
                step = m * (alone.forward_s + alone.backward_s) + alone.once_beside_s
                if (alone_s := float(step @ alone.blocks.sorts.number)) >= limit_s:
                    return alone_s
            loads = self._loads(c)
            return float(loads.later[0][0] + loads.first[0][0] + loads.once[-1])
        number, first = self._sorts[True].number, self._sorts[True].sort[0]
        work = np.minimum.reduce([t.forward_s + t.backward_s for t in tables.values()])
        load = np.minimum.reduce([(m - 1) * t.backward_s + (m - most) * t.forward_s for t in tables.values()])
        through = float(work @ number) + max(float(load @ number) / c.pp, float(load.max()))
        through += float(tables[kinds[0]].once_beside_s[first])
        own = np.minimum.reduce([m * (t.forward_s + t.backward_s) + t.once_beside_s for t in tables.values()])
        return max(through, float(own @ number) / c.pp)

    def best_cut(self, c: Candidate, limit_s: float = np.inf) -> tuple[float, Cuts] | None:
        """A bound over all cuts that fit into memory, and the cut whose own bound is smallest; None where none fits.

        Or none of those that fit is below the limit: stages that take as long are not looked at.

        Where all stages are alike the first micro-batch's time is that of the chain, and the bound is the smallest over
        all cuts. Else the cuts are parted by their largest load, and each part has the time of its quickest cut.
        """
        all_loads, sorts = self._loads(c, limit_s), self._sorts[c.pp > 1]
        once = all_loads.once
        if all_loads.chain_s is not None:
            found = smallest_bottleneck(sorts.windows(all_loads.later_with_first), once)
            if found is None:
                return None
            least = smallest_bottleneck(sorts.windows(all_loads.own))
            assert least is not None, "the same ranges are allowed"
            return max(found.value + all_loads.chain_s, least.value), found.cuts
        loads, works, owns = (
            sorts.windows(each) for each in (all_loads.later, all_loads.first, all_loads.own)
        )
        found = smallest_bottleneck(loads, once)
        if found is None:
            return None
        least, alone = smallest_bottleneck(loads), smallest_bottleneck(owns)
        assert least is not None and alone is not None, "the same ranges are allowed"
        most = float(np.max(loads, initial=0.0, where=np.isfinite(loads)))
        parts = np.geomspace(max(least.value, 1e-3 * most), most, PARTS)[1:] if most > 0 else [0.0]
        limits = [least.value, *(float(part) for part in parts)]
        own = {cuts: self._of_loads(all_loads, sorts, cuts) for cuts in (found.cuts, least.cuts)}
        bound = np.inf
        for lower, upper in pairwise(limits):
            quickest = smallest_sum(np.where(loads <= upper * (1 + 1e-12), works, np.inf))
            if quickest is not None:
                bound = min(bound, lower + quickest.value + float(once[1:].min()))
                own.setdefault(quickest.cuts, self._of_loads(all_loads, sorts, quickest.cuts))
        cuts = min(own, key=lambda cuts: (own[cuts], cuts))
        return max(bound, alone.value, found.value + float(works.min(axis=(1, 2)).sum())), cuts

    def closer(
        self, c: Candidate, bound: float, cuts: Sequence[Cuts] = (), limit_s: float = np.inf
    ) -> tuple[float, dict[Cuts, float]]:
        """A bound over all cuts from closer times of ranges where stages are alike, else the given one.

        Infinite where no cut that fits is below the limit. And the bounds of the cuts that are given, and of the one
        that promises most by these times.
        """
        if c.pp == 1 or len(set(self._layout.kinds(c))) > 1:
            return bound, dict.fromkeys(cuts, bound)
        pipeline = self._pipeline(c, self._make_loads(c, closer=True, limit_s=limit_s), self._sorts[True])
        found = pipeline.least(limit_s)
        every = cuts if found.cuts is None else (found.cuts, *cuts)
        return max(bound, found.bound_s), {own: pipeline.time_s(own) for own in every}

    def closer_of_cut(self, c: Candidate, cuts: Cuts) -> float:
        """The bound of one cut from closer times where stages are alike."""
        if c.pp == 1 or len(set(self._layout.kinds(c))) > 1:
            return self.of_cut(c, cuts)
        loads, sorts = self._make_loads(c, closer=True, cuts=cuts), self._sorts_of(cuts)
        works, laters, owns = (np.array(sorts.of_ranges(each, cuts)) for each in (loads.first, loads.later, loads.own))
        return cut_time_s(works, laters, owns, float(loads.once[cuts[1]]), rounds_between(c.pp, c.num_micro_batches))

    @staticmethod
    def _pipeline(c: Candidate, loads: _Loads, sorts: Sorts) -> PipelineBound:
        assert loads.chain_s is not None, "stages are alike"
        works, laters, owns = (sorts.windows(each) for each in (loads.first, loads.later, loads.own))
        return PipelineBound(
            works=works, laters=laters, owns=owns, once=loads.once, once_alone=loads.once_alone,
            chain_s=loads.chain_s, num_micro_batches=c.num_micro_batches,
        )

    def of_cut(self, c: Candidate, cuts: Cuts) -> float:
        """The bound of one cut; infinite where it does not fit into memory."""
        if c.pp == 1:
            loads, sorts = self._loads(c), self._sorts[False]
        else:
            loads, sorts = self._make_loads(c, cuts=cuts), self._sorts_of(cuts)
        return self._of_loads(loads, sorts, cuts)

    @staticmethod
    def _of_loads(loads: _Loads, sorts: Sorts, cuts: Cuts) -> float:
        worst, through = max(sorts.of_ranges(loads.later, cuts)), sum(sorts.of_ranges(loads.first, cuts))
        return max(*sorts.of_ranges(loads.own, cuts), worst + float(loads.once[cuts[1]]) + through)

    def _loads(self, c: Candidate, limit_s: float = np.inf) -> _Loads:
        key = c, limit_s
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        found = self._make_loads(c, limit_s=limit_s)
        self._last = (key, found)
        return found

    def _sorts_of(self, cuts: Cuts) -> Sorts:
        """The sorts of the ranges of one cut alone."""
        if cuts not in self._of_cuts:
            if len(self._of_cuts) >= MANY_CUTS:
                self._of_cuts.clear()
                self._cut_blocks.clear()
            self._of_cuts[cuts] = self._sorts[True].of_cut(cuts)
        return self._of_cuts[cuts]

    def _blocks_of(self, blocks: BlockTable, cuts: Cuts) -> BlockTable:
        """The blocks with the ranges of one cut alone."""
        sorts = self._sorts_of(cuts)
        key = id(blocks), cuts
        if key not in self._cut_blocks:
            self._cut_blocks[key] = blocks, replace(blocks, sorts=sorts)
        return self._cut_blocks[key][1]

    def _make_loads(
        self, c: Candidate, *, closer: bool = False, cuts: Cuts | None = None, limit_s: float = np.inf
    ) -> _Loads:
        """The tables of a candidate; `closer`: with communication behind compute unit by unit; of one cut if given.

        A range that takes `limit_s` or more, or that its stage cannot have, may count as if it did not fit.
        """
        kinds = self._layout.kinds(c)
        tables = {kind: self._tables.times(c, kind) for kind in dict.fromkeys(kinds)}
        if cuts is not None:
            tables = {
                kind: replace(table, blocks=self._blocks_of(table.blocks, cuts)) for kind, table in tables.items()
            }
        times = {
            kind: self._range_times(c, kind, table) if closer else _summed(table) for kind, table in tables.items()
        }
        m = c.num_micro_batches
        wanted: dict[tuple[StageKind, bool], dict[int, list[int]]] = {}  # the stages, by what they have in flight
        for stage, kind in enumerate(kinds):
            in_flight = min(c.pp - stage, m)
            wanted.setdefault((kind, in_flight == 1), {}).setdefault(in_flight, []).append(stage)
        alike, of_first = tables[kinds[0]], times[kinds[0]]
        chain_s = None if len(tables) > 1 else float(
            (alike.forward_s + alike.backward_s) @ alike.blocks.sorts.number
        )
        made: dict[tuple[StageKind, int], tuple[Table, Table, Table]] = {}
        for (kind, _), stages in wanted.items():
            blocks = tables[kind].blocks
            reached = None if cuts is not None else blocks.sorts.reached(c.pp)
            of_any = None if reached is None else np.array([reached[own].any(axis=0) for own in stages.values()])
            each = self._stage_loads(c, kind, tuple(stages), blocks, times[kind], limit_s, of_any, chain_s or 0.0)
            made |= {(kind, in_flight): own for in_flight, own in zip(stages, each, strict=True)}
        every = [made[kind, min(c.pp - stage, m)] for stage, kind in enumerate(kinds)]
        return _Loads(
            later=[later for later, _, _ in every], later_with_first=[both for _, both, _ in every],
            first=[first for _, _, first in every],
            own=[
                self._own(times[kind], every[stage][0], every[stage][2], min(c.pp - stage, m))
                for stage, kind in enumerate(kinds)
            ],
            once=self._once(c, alike.blocks, of_first, every[0][2] if closer else None),
            once_alone=self._once(c, alike.blocks, replace(of_first, once_beside_s=of_first.once_s), None),
            chain_s=chain_s,
        )

    def stage_ranges(
        self, c: Candidate, kind: StageKind, counts: Sequence[int], *, closer: bool, limit_s: float = np.inf
    ) -> StageRanges:
        """For all ranges what a stage takes with at least so many micro-batches in flight, ascending numbers.

        Infinite where a range does not fit into memory, and maybe where all micro-batches take `limit_s` or more. Not
        `closer`: as if all activations could be kept and all that can hide behind compute did.
        """
        table, sorts = self._tables.times(c, kind), self._sorts[c.pp > 1]
        times = self._range_times(c, kind, table) if closer else _summed(table)
        through = [times.forward_s + times.backward_s]
        if closer:
            alone = 1 if counts[0] == 1 else 0
            parts = [own for own in (counts[:alone], counts[alone:]) if own]
            through = [
                first for own in parts
                for _, _, first in self._stage_loads(c, kind, own, table.blocks, times, limit_s)
            ]
        later = self._later(c, kind, table.blocks, times)
        return StageRanges(
            forward_s=sorts.table(times.forward_s), through_s=np.stack([sorts.table(own) for own in through]),
            later_s=np.stack([sorts.table(later[min(count, len(later)) - 1]) for count in counts]),
            once_beside_s=sorts.table(times.once_beside_s), start_beside_s=sorts.table(times.start_beside_s),
        )

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

    def _stage_loads(
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
        # Few weights, so that the frontiers are made once: what copies add to forwards counts on the last stage.
        own = work + table.once_s + (in_flight - 1) * table.plain_forward_s  # beside that, all that a stage does
        below = load + np.maximum(own, chain_s) < limit_s
        if wanted is not None:
            below &= wanted
        added = self._memory.added(c, in_flight, blocks, room, (1.0 if counts[0] == 1 else 0.0, 1.0), below)
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

    def _own(self, table: RangeTimes, later: Table, first: Table, in_flight: int) -> Table:
        """For all ranges: what a stage does in a step. `later` lacks the forwards that the warm-up does."""
        alone = table.forward_s + table.backward_s + table.once_s  # what variants add hides no more of `once_s`
        return later + np.maximum(first + table.once_beside_s, alone) + (in_flight - 1) * table.plain_forward_s

    def _once(self, c: Candidate, blocks: BlockTable, table: RangeTimes, first: Table | None) -> Table:
        """By the end of stage 0's range: what stage 0 does once a step, and the first micro-batch's time on links.

        Every second that variants add to a micro-batch can hide at most a second of it. `first`: what the first
        micro-batch takes on stage 0, with what variants add, where all of that is counted beside this.
        """
        kind = self._layout.kinds(c)[0]
        sorts, in_flight = blocks.sorts, np.array(min(c.pp, c.num_micro_batches))
        keeps_all = sorts.from_start(self._memory.room(c, kind, in_flight, blocks)[1].astype(np.float64)) == 1
        if first is None:
            least = table.once_beside_s
        else:
            more = np.where(np.isfinite(first), first - table.forward_s - table.backward_s, np.inf)
            least = np.maximum(table.once_beside_s, table.once_s - more)
        once, beside = sorts.from_start(table.once_s), sorts.from_start(least)
        sends_s = self._layout.sends_s(c, *self._least_sent(c))
        return np.asarray(np.where(keeps_all, np.maximum(once, beside), beside) + sends_s)

    def _range_times(self, c: Candidate, kind: StageKind, table: StageTable) -> RangeTimes:
        """The times by sort of range; with communication behind compute unit by unit, over several stages.

        A second that is added to the compute of a range adds at least as much to its time as it takes from the
        communication that is exposed, which is at most all but the slow-down; the rest of ZeRO 2's is hidden more.
        """
        behind, sorts = table.behind, table.blocks.sorts
        summed = _summed(table)
        if behind is None or c.pp == 1:
            return summed
        key = id(table.blocks), id(kind), c.zero
        if key not in self._overlaps:
            if len(self._overlaps) >= MANY_OVERLAPS:
                self._overlaps.clear()
            self._overlaps[key] = table.blocks, self._overlap(c, kind, table.blocks, behind)  # kept with their id
        start, forward, backward, after, start_beside, after_beside = self._overlaps[key][1]
        return replace(
            summed, forward_s=sorts.sums(behind.forward_s) + forward,
            backward_s=sorts.sums(behind.backward_s) + backward,
            hidden_share=OVERLAP_SLOWDOWN if c.zero == 3 else 1.0, once_s=sorts.sums(behind.once_s) + start + after,
            once_beside_s=sorts.sums(behind.once_s) + start_beside + after_beside,
            start_beside_s=sorts.sums(behind.start_s) + start_beside,
        )

    def _overlap(self, c: Candidate, kind: StageKind, blocks: BlockTable, behind: Behind) -> list[Table]:
        """By sort of range, what communication adds: at the start, to a forward and a backward, at the end.

        And at the start and the end whatever layers do.
        """
        sorts, sort = blocks.sorts, blocks.sorts.sort
        outside = range_sums(np.where(blocks.kind >= 0, 0.0, blocks.numel)[sort])
        sizes, of_range = np.unique(np.where(np.isfinite(outside), outside, 0.0), return_inverse=True)
        of_range = of_range.reshape(outside.shape)
        gather = np.array([self._tables.gather_s(c, kind, float(n)) if n else 0.0 for n in sizes])[of_range]
        reduce = np.array([self._tables.reduce_s(c, kind, float(n)) if n else 0.0 for n in sizes])[of_range]
        gathers, reductions, nothing = behind.gathers[sort], behind.reductions[sort], np.zeros(len(sort))
        least = blocks.forward_s[sort], blocks.backward_s[sort]
        most = least[0] + blocks.most_added[0][sort], least[1] + blocks.most_added[1][sort]
        zero = np.zeros(len(sorts.counts))
        if c.zero == 3:
            start = sorts.least(gather)
            forward = sorts.least(forward_tables(least[0], gathers, np.zeros_like(gather)))
            during, after = backward_tables(least[1], gathers, reductions, reduce)
            return [start, forward, sorts.least(during + after), zero, start, zero]
        start = start_beside = zero
        if c.zero:
            start, start_beside = map(sorts.least, forward_tables(np.array([least[0], most[0]]), gathers, gather))
        during, after = backward_tables(np.array([least[1], most[1]]), nothing, reductions, reduce)
        if c.zero == 2:
            return [start, zero, sorts.least(during[0]), sorts.least(after[0]), start_beside, sorts.least(after[1])]
        return [start, zero, zero, sorts.least(during[0] + after[0]), start_beside, sorts.least(during[1] + after[1])]

    def smallest_need(self, c: Candidate) -> float:
        """The bytes that the fullest device holds, over its limit, under the cut and the variants that need least."""
        needs = [
            self.least_memory_table(c, kind, min(c.pp - stage, c.num_micro_batches)) / kind.memory_limit_bytes
            for stage, kind in enumerate(self._layout.kinds(c))
        ]
        found = smallest_bottleneck(windows_of(needs))
        return np.inf if found is None else found.value

    def memory_table(self, c: Candidate, kind: StageKind, in_flight: int) -> Table:
        """Bytes that a stage of blocks[first:last] holds at its peak if it keeps all activations, for all ranges."""
        return self._sorts[c.pp > 1].table(self._memory.all_kept(c, np.array(in_flight), self._tables.blocks(c, kind)))

    def least_memory_table(self, c: Candidate, kind: StageKind, in_flight: int) -> Table:
        """The same for the variants that need least."""
        return self._sorts[c.pp > 1].table(self._memory.least(c, in_flight, self._tables.blocks(c, kind)))

    def block_costs(
        self, c: Candidate, kind: StageKind, expert_axis: CostAxis | None = None
    ) -> dict[str, BlockCost]:
        """The cost of a block of each class on a stage of this kind."""
        return self._tables.block_costs(c, kind, expert_axis)

    def stage_table(self, c: Candidate, kind: StageKind) -> StageTimes:
        """Times of each block on a stage of this kind under the candidate."""
        found, sort = self._tables.times(c, kind), self._sorts[c.pp > 1].sort
        return StageTimes(
            forward_s=found.forward_s[sort], backward_s=found.backward_s[sort], once_beside_s=found.once_beside_s[sort],
            start_beside_s=found.start_beside_s[sort],
        )

    def _least_sent(self, c: Candidate) -> tuple[float, float]:
        """Bytes that one device sends to the next stage for a micro-batch, and gets back, at the leanest border."""
        if c.pp == 1:
            return 0.0, 0.0
        key = (c.tp, c.cp, c.sequence_parallel, c.split_weights, c.rows)
        if key not in self._sent:
            self._sent[key] = self._find_least_sent(c)
        return self._sent[key]

    def _find_least_sent(self, c: Candidate) -> tuple[float, float]:
        graph, sharding = self._graph, self._tables.shardings(c)
        sizes: dict[tuple[str, int], tuple[float, float]] = {}
        for cls in self._chooser.classes:
            width = element_bytes(cls, graph.captured_dtype, self._request.dtype)
            for i, name in enumerate(cls.outputs):
                info = cls.tensor[name]
                sizes_of = [size for _, size in c.mesh.inner]
                share = held_share(tuple(own.outputs[i] for own in sharding[cls.name]), sizes_of)
                size = info.numel * graph.scale(info.numel, c.rows) * width[name] * share
                sizes[cls.name, i] = size, size if info.requires_grad else 0.0
        sent = [
            (sum(sizes[key][0] for key in border), sum(sizes[key][1] for key in border)) for border in self._borders
        ]
        return min(forward for forward, _ in sent), min(backward for _, backward in sent)


@lru_cache(maxsize=256)
def depths_up_to(most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Numbers of micro-batches in flight in parts: the first and the last number of each; at first one by one."""
    firsts, lasts = [], [0]
    while lasts[-1] < most:
        first = lasts[-1] + 1
        firsts.append(first)
        lasts.append(first if first <= SINGLE_DEPTHS else min(most, first * 9 // 8))
    return np.array(firsts), np.array(lasts[1:])


def shared_work(c: Candidate, forward_s: float, backward_s: float) -> float:
    """What a step takes at least, where a micro-batch takes so long through all blocks and stages share that evenly."""
    m, most = c.num_micro_batches, min(c.pp, c.num_micro_batches)
    later = ((m - 1) * backward_s + (m - most) * forward_s) / c.pp
    return max(forward_s + backward_s + later, m * (forward_s + backward_s) / c.pp)


def _summed(table: StageTable) -> RangeTimes:
    """The times by sort of range as sums over blocks."""
    sums = table.blocks.sorts.sums
    return RangeTimes(
        forward_s=sums(table.forward_s), backward_s=sums(table.backward_s), hidden_share=table.hidden_share,
        plain_forward_s=sums(table.plain_forward_s), plain_backward_s=sums(table.plain_backward_s),
        once_s=sums(table.once_s), once_beside_s=sums(table.once_beside_s), start_beside_s=sums(table.start_beside_s),
    )


def _is_measured(kind: StageKind) -> bool:
    """Whether times of this kind of stage come from measurements, which need not grow evenly with the rows."""
    groups = [group for group in (kind.tp_group, *(axis.group for axis in kind.context)) if group is not None]
    return op_table(kind.device) is not None or any(group.link.fits or group.network.fits for group in groups)
