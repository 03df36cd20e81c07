"""Lower bounds of the simulated step time of a candidate over all its cuts; what fits is asked of `memory_bounds`.

The simulator times a stage from its blocks; here every part of that time is replaced by something not above it that
adds up over blocks. For stage s of p under 1F1B with m micro-batches, of which k = min(p - s, m) go forward before the
first comes back: the first backward on s waits for all forwards of micro-batch 0 and the backwards behind s; then s has
m backwards and m - k forwards to do; then the last micro-batch goes back to stage 0, which ends the step. So

    T >= start_0 + (sum over stages of f + b) + (m - 1) b_s + (m - k) f_s + end_0

for each s, and the best cut is found exactly for the largest of these (`balance`). Hidden data-parallel communication
costs at least its slow-down of the compute, and at least what does not fit behind it (`simulate/overlap.py`). The links
between stages count for the first micro-batch, with the least that any cut sends, and the gradients that the chain's
ends share are added up after all that both have done. A property test compares these bounds
with the simulator.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from autopar.cost_models.op_kinds import element_bytes
from autopar.graph.model_graph import ModelGraph
from autopar.search.balance import smallest_bottleneck, smallest_sum, windows_of
from autopar.search.block_table import BlockTable, RangeTimes, Sorts, StageTimes
from autopar.search.candidates import Candidate, PlanRequest
from autopar.search.elimination import Table
from autopar.search.loops import PipelineBound, cut_time_s
from autopar.search.memory_bounds import MemoryBounds
from autopar.search.order_estimates import OrderEstimates
from autopar.search.range_loads import RangeLoads, summed
from autopar.search.shardings import ShardingChooser
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.search.stage_tables import StageTables
from autopar.search.work_bounds import WorkBounds
from autopar.sharding.joint import held_share
from autopar.simulate.block_cost import BlockCost
from autopar.simulate.class_costs import CostAxis
from autopar.simulate.stage_cost import is_layer

Cuts = tuple[int, ...]
Kind = TypeVar("Kind", bound=Hashable)
MANY_CUTS = 1024  # kept at once
PARTS = 16  # into which the cuts over unlike stages are parted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loads:
    """Tables over ranges of blocks, one for each stage.

    `later`: what micro-batches after the first take, infinite where the range does not fit; `first`: what the first
    takes; `with_ends`: the same with what the stage does once a step; `later_with_first`: `later` and what variants add
    to the first. `sends`, by stage: what the links behind it take for a micro-batch, both ways. `once`, by the end of
    stage 0's range: what it does once a step, and the first micro-batch's time on links; `once_alone`: the same, where
    what variants add to the first micro-batch on stage 0 is not counted. `chain_s`: the first micro-batch's time
    through all blocks where all stages are alike, but for what variants add. `own`: what a stage does in a step,
    whatever others do: it counts where the step's end is long.
    """

    later: list[Table]
    later_with_first: list[Table]
    first: list[Table]
    with_ends: list[Table]
    own: list[Table]
    sends: Table
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
        self._tied_numel = _tied_numel(graph)
        self._sorts = [Sorts.of(graph, layer, ends_apart=apart) for apart in (False, True)]
        self._tables = StageTables(request, chooser, self._sorts, int(layer.sum()))
        self._memory = MemoryBounds(request, int(layer.sum()))
        self.work = WorkBounds(graph, layout, chooser, self._tables)
        self.ranges = RangeLoads(self._tables, self._memory, self._sorts)
        self.orders = OrderEstimates(
            layout, request, self._tables, self._memory, self.ranges, self.work, self._sorts[True], self._sends_s
        )
        self._sent: dict[tuple[object, ...], tuple[float, float]] = {}
        self._of_cuts: dict[Cuts, Sorts] = {}
        self._cut_blocks: dict[tuple[int, Cuts], tuple[BlockTable, BlockTable]] = {}  # by the whole table's id
        self._last: tuple[tuple[Candidate, float], _Loads] | None = None

    def quick(self, c: Candidate, limit_s: float = np.inf) -> float:
        """A bound without looking at cuts: all stages share the work evenly. Infinite where the layers cannot fit.

        Where the work alone is not below the limit, the bound by it; or that by the work and the data axes.
        """
        if limit_s < np.inf and (work_s := self.work.of_work(c)) >= limit_s:
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
        later = {kind: (m - 1) * t.backward_s + (m - most) * t.forward_s for kind, t in tables.items()}
        longest = float(np.minimum.reduce(list(later.values())).max())
        through = float(work @ number) + max(spread_s(later, kinds, number), longest)
        through += float(tables[kinds[0]].once_beside_s[first]) + self._layout.tied_s(c, self._tied_numel)
        owns = {kind: m * (t.forward_s + t.backward_s) + t.once_beside_s for kind, t in tables.items()}
        return max(through, spread_s(owns, kinds, number))

    def best_cut(self, c: Candidate, limit_s: float = np.inf) -> tuple[float, Cuts] | None:
        """A bound over all cuts that fit into memory, and the cut whose own bound is smallest; None where none fits.

        Or none of those that fit is below the limit: stages that take as long are not looked at.

        Where all stages are alike the first micro-batch's time is that of the chain, and the bound is the smallest over
        all cuts. Else the cuts are parted by their largest load, and each part has the time of its quickest cut.
        """
        all_loads, sorts = self._loads(c, limit_s), self._sorts[c.pp > 1]
        once = all_loads.once
        if all_loads.chain_s is not None:
            where = sorts.where(all_loads.later_with_first)
            if where is None:
                return None
            found = smallest_bottleneck(sorts.windows(all_loads.later_with_first, where), once, where.starts)
            if found is None:
                return None
            least = smallest_bottleneck(sorts.windows(all_loads.own, where))
            assert least is not None, "the same ranges are allowed"
            return max(found.value + all_loads.chain_s, least.value), found.cuts
        where = sorts.where(all_loads.later)
        if where is None:
            return None
        loads, works, owns = (
            sorts.windows(each, where) for each in (all_loads.later, all_loads.first, all_loads.own)
        )
        found = smallest_bottleneck(loads, once, where.starts)
        if found is None:
            return None
        least, alone = (smallest_bottleneck(each, starts=where.starts) for each in (loads, owns))
        assert least is not None and alone is not None, "the same ranges are allowed"
        most = float(np.max(loads, initial=0.0, where=np.isfinite(loads)))
        parts = np.geomspace(max(least.value, 1e-3 * most), most, PARTS)[1:] if most > 0 else [0.0]
        limits = [least.value, *(float(part) for part in parts)]
        own = {cuts: self._of_loads(all_loads, sorts, cuts) for cuts in (found.cuts, least.cuts)}
        bound = np.inf
        for lower, upper in pairwise(limits):
            quickest = smallest_sum(np.where(loads <= upper * (1 + 1e-12), works, np.inf), where.starts)
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
        that promises most by these times; they may be infinite where a stage alone takes the limit. Of a candidate that
        stands for several less is looked at.
        """
        if c.pp == 1 or len(set(self._layout.kinds(c))) > 1:
            return bound, dict.fromkeys(cuts, bound)
        pipeline = self._pipeline(c, self._make_loads(c, closer=True, limit_s=limit_s), self._sorts[True])
        if pipeline is None:
            return np.inf, {}
        found = pipeline.least(limit_s, in_parts=not c.free_offload)
        every = cuts if found.cuts is None or c.free_offload else (found.cuts, *cuts)
        return max(bound, found.bound_s), {own: pipeline.time_s(own) for own in every}

    def closer_of_cut(self, c: Candidate, cuts: Cuts) -> float:
        """The bound of one cut from closer times where stages are alike."""
        if c.pp == 1 or len(set(self._layout.kinds(c))) > 1:
            return self.of_cut(c, cuts)
        loads, sorts = self._make_loads(c, closer=True, cuts=cuts), self._sorts_of(cuts)
        tables = (loads.first, loads.with_ends, loads.later, loads.own)
        works, with_ends, laters, owns = (np.array(sorts.of_ranges(each, cuts)) for each in tables)
        once_s = float(loads.once[cuts[1]] - loads.sends[0])
        return cut_time_s(works, with_ends, laters, owns, loads.sends, once_s, c.num_micro_batches)

    @staticmethod
    def _pipeline(c: Candidate, loads: _Loads, sorts: Sorts) -> PipelineBound | None:
        """None where no cut fits."""
        assert loads.chain_s is not None, "stages are alike"
        where = sorts.where(loads.later)
        if where is None:
            return None
        tables = (loads.first, loads.with_ends, loads.later, loads.own)
        works, with_ends, laters, owns = (sorts.windows(each, where) for each in tables)
        return PipelineBound(
            works=works, with_ends=with_ends, laters=laters, owns=owns, sends=loads.sends,
            once=loads.once - loads.sends[0], once_alone=loads.once_alone - loads.sends[0],
            chain_s=loads.chain_s, num_micro_batches=c.num_micro_batches, starts=where.starts,
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
            kind: self.ranges.times(c, kind, table) if closer else summed(table) for kind, table in tables.items()
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
            each = self.ranges.loads(c, kind, tuple(stages), blocks, times[kind], limit_s, of_any, chain_s or 0.0)
            made |= {(kind, in_flight): own for in_flight, own in zip(stages, each, strict=True)}
        every = [made[kind, min(c.pp - stage, m)] for stage, kind in enumerate(kinds)]
        tied_s = self._layout.tied_s(c, self._tied_numel)
        with_ends = [self._with_ends(times[kind], every[stage][2]) for stage, kind in enumerate(kinds)]
        with_ends[0], with_ends[-1] = with_ends[0] + tied_s, with_ends[-1] + tied_s
        return _Loads(
            later=[later for later, _, _ in every], later_with_first=[both for _, both, _ in every],
            first=[first for _, _, first in every], with_ends=with_ends,
            own=[
                every[stage][0] + with_ends[stage] + (min(c.pp - stage, m) - 1) * times[kind].plain_forward_s
                for stage, kind in enumerate(kinds)
            ],
            sends=self._sends_s(c),
            once=self._once(c, alike.blocks, of_first, every[0][2] if closer else None) + tied_s,
            once_alone=self._once(c, alike.blocks, replace(of_first, once_beside_s=of_first.once_s), None) + tied_s,
            chain_s=chain_s,
        )

    @staticmethod
    def _with_ends(table: RangeTimes, first: Table) -> Table:
        """For all ranges: what a stage does for the first micro-batch and once a step."""
        alone = table.forward_s + table.backward_s + table.once_s  # what variants add hides no more of `once_s`
        return np.maximum(first + table.once_beside_s, alone)

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
        return np.asarray(np.where(keeps_all, np.maximum(once, beside), beside) + self._sends_s(c)[0])

    def _sends_s(self, c: Candidate) -> Table:
        """[stage]: what the links behind it take at least for one micro-batch, both ways."""
        return self._layout.sends_s(c, *self._least_sent(c))

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

    def block_table(self, c: Candidate, kind: StageKind) -> BlockTable:
        """What blocks take and hold on a stage of this kind under the candidate, without data axes."""
        return self._tables.blocks(c, kind)

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


def _tied_numel(graph: ModelGraph) -> int:
    """The parameters that the first and the last block share, and no other has."""
    found: dict[str, list[int]] = {}
    for at, block in enumerate(graph.blocks):
        for name in block.params:
            found.setdefault(name, []).append(at)
    ends = [0, len(graph.blocks) - 1]
    return sum(graph.param[name].numel for name, held in found.items() if held == ends and ends[0] < ends[1])


def spread_s(times: Mapping[Kind, Table], kinds: Sequence[Kind], number: Table) -> float:
    """The longest of the stages takes no less, were the blocks spread over stages of these kinds at will.

    `times`: of a kind what each entry takes, of which there are so many (`number`). A second of a stage is priced by
    the share of all blocks that its kind does in it; each block is done where it costs least, and the stages together
    have so many priced seconds a second. Or all kinds have one price.
    """
    even = float(np.minimum.reduce(list(times.values())) @ number) / len(kinds)
    if len(times) == 1:
        return even
    whole = {kind: float(own @ number) for kind, own in times.items()}
    if min(whole.values()) <= 0:
        return even
    priced = np.minimum.reduce([own / whole[kind] for kind, own in times.items()])
    return max(even, float(priced @ number) / sum(1 / whole[kind] for kind in kinds))
