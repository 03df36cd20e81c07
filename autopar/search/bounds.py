"""Lower bounds of the simulated step time of a candidate over all its cuts, and what its stages hold in memory.

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
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autopar.cost_models.compute import memory_bandwidth
from autopar.cost_models.memory import GRADIENT_BYTES, optimizer_step_bytes, static_bytes
from autopar.cost_models.op_kinds import element_bytes
from autopar.graph.model_graph import DTYPE_BYTES, ModelGraph
from autopar.plan.plan import Recompute
from autopar.search.balance import range_maxima, range_sums, smallest_bottleneck, smallest_sum
from autopar.search.candidates import Candidate, PlanRequest
from autopar.search.elimination import Table
from autopar.search.shardings import ShardingChooser
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.sharding.reshard import Collective
from autopar.sharding.state import Kind
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import captured_dtype
from autopar.simulate.overlap import OVERLAP_SLOWDOWN
from autopar.simulate.stage_cost import is_layer

Cuts = tuple[int, ...]
PARTS = 16  # into which the cuts over unlike stages are parted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTable:
    """One entry a block of the chain, for one device of one kind at one size of micro-batch."""

    forward_s: Table
    backward_s: Table
    again_s: Table  # what full recomputation adds to the backward
    saved_bytes: Table
    boundary_bytes: Table
    transient_bytes: Table
    buffer_bytes: Table
    numel: Table  # local parameters; one that an earlier block may hold in the same stage counts there alone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """Per block, on a stage of one kind: times not above the simulator's, and memory as the simulator counts it."""

    forward_s: Table
    backward_s: Table
    start_s: Table
    end_s: Table
    held_bytes: Table
    extra_bytes: Table
    blocks: BlockTable


class Bounds:
    """Bounds candidates of one model on one cluster; keeps the block costs that candidates share."""

    def __init__(
        self, graph: ModelGraph, layout: StageLayout, request: PlanRequest, chooser: ShardingChooser
    ) -> None:
        self._graph, self._layout, self._request, self._chooser = graph, layout, request, chooser
        self._layer = np.array([is_layer(block) for block in graph.blocks])
        # What crosses each border between blocks, as (class, index of output); borders that are alike count once.
        made = {name: (block.cls, i) for block in graph.blocks for i, name in enumerate(block.outputs)}
        crossing = (graph.boundary(at) for at in range(1, len(graph.blocks)))
        self._borders = tuple(dict.fromkeys(tuple(made[name] for name in names) for names in crossing))
        self._numel_first = [_first_holders(graph, ends_apart=apart) for apart in (False, True)]
        self._blocks: dict[tuple[object, ...], BlockTable] = {}
        self._last: tuple[Candidate, tuple[list[Table], list[Table], Table]] | None = None

    def quick(self, c: Candidate) -> float:
        """A bound without looking at cuts: all stages share the work evenly. Infinite where the layers cannot fit."""
        kinds = self._layout.kinds(c)
        tables = self._tables(c, kinds)
        m, most = c.num_micro_batches, min(c.pp, c.num_micro_batches)
        if not self._layers_fit(c, kinds, tables):
            return np.inf
        work = np.minimum.reduce([t.forward_s + t.backward_s for t in tables.values()])
        load = np.minimum.reduce([(m - 1) * t.backward_s + (m - most) * t.forward_s for t in tables.values()])
        once = tables[kinds[0]].start_s + tables[kinds[0]].end_s
        once_of_first = float(once.sum()) if c.pp == 1 else float(np.cumsum(once).min())
        return float(work.sum()) + max(float(load.sum()) / c.pp, float(load.max())) + once_of_first

    def best_cut(self, c: Candidate) -> tuple[float, Cuts] | None:
        """A bound over all cuts that fit into memory, and the cut whose own bound is smallest; None where none fits.

        Where all stages are alike the first micro-batch's time is that of the chain, and the bound is the smallest over
        all cuts. Else the cuts are parted by their largest load, and each part has the time of its quickest cut.
        """
        loads, works, once = self._loads(c)
        found = smallest_bottleneck(loads, once)
        if found is None:
            return None
        if len({id(work) for work in works}) == 1:
            return found.value + float(works[0][0, -1]), found.cuts
        least = smallest_bottleneck(loads)
        assert least is not None, "the same ranges are allowed"
        most = max(float(np.max(load, initial=0.0, where=np.isfinite(load))) for load in loads)
        parts = np.geomspace(max(least.value, 1e-3 * most), most, PARTS)[1:] if most > 0 else [0.0]
        limits = [least.value, *(float(part) for part in parts)]
        own = {found.cuts: self.of_cut(c, found.cuts), least.cuts: self.of_cut(c, least.cuts)}
        bound = np.inf
        for lower, upper in pairwise(limits):
            within = [
                np.where(load <= upper * (1 + 1e-12), work, np.inf) for load, work in zip(loads, works, strict=True)
            ]
            quickest = smallest_sum(within)
            if quickest is not None:
                bound = min(bound, lower + quickest.value + float(once[1:].min()))
                own.setdefault(quickest.cuts, self.of_cut(c, quickest.cuts))
        cuts = min(own, key=lambda cuts: (own[cuts], cuts))
        return max(bound, found.value + sum(float(np.min(work)) for work in works)), cuts

    def of_cut(self, c: Candidate, cuts: Cuts) -> float:
        """The bound of one cut; infinite where it does not fit into memory."""
        loads, works, once = self._loads(c)
        ranges = list(pairwise(cuts))
        worst = max(float(load[span]) for load, span in zip(loads, ranges, strict=True))
        return worst + float(once[cuts[1]]) + sum(float(work[span]) for work, span in zip(works, ranges, strict=True))

    def _tables(self, c: Candidate, kinds: Sequence[StageKind]) -> dict[StageKind, StageTable]:
        return {kind: self.stage_table(c, kind) for kind in dict.fromkeys(kinds)}

    def _loads(self, c: Candidate) -> tuple[list[Table], list[Table], Table]:
        """For each stage and range: what micro-batches after the first take, infinity where the range does not fit; and
        what the first takes. And by the end of stage 0's range: what it does once a step, with the time of the first
        micro-batch on the links between stages."""
        if self._last is not None and self._last[0] == c:
            return self._last[1]
        kinds = self._layout.kinds(c)
        tables = self._tables(c, kinds)
        m = c.num_micro_batches
        loads: dict[tuple[StageKind, int], Table] = {}
        works = {kind: range_sums(table.forward_s + table.backward_s) for kind, table in tables.items()}
        for stage, kind in enumerate(kinds):
            in_flight = min(c.pp - stage, m)
            if (kind, in_flight) not in loads:
                table = tables[kind]
                load = range_sums((m - 1) * table.backward_s + (m - in_flight) * table.forward_s)
                fits = self.memory_table(c, kind, table, in_flight) <= kind.memory_limit_bytes
                loads[kind, in_flight] = np.where(fits, load, np.inf)
        once = tables[kinds[0]].start_s + tables[kinds[0]].end_s
        made = (
            [loads[kind, min(c.pp - stage, m)] for stage, kind in enumerate(kinds)],
            [works[kind] for kind in kinds],
            np.concatenate([[0.0], np.cumsum(once)]) + self._layout.sends_s(c, *self._least_sent(c)),
        )
        self._last = (c, made)
        return made

    def smallest_need(self, c: Candidate) -> float:
        """The bytes that the fullest device holds, over its limit, under the cut that needs least."""
        kinds = self._layout.kinds(c)
        tables = self._tables(c, kinds)
        needs = [
            self.memory_table(c, kind, tables[kind], min(c.pp - stage, c.num_micro_batches)) / kind.memory_limit_bytes
            for stage, kind in enumerate(kinds)
        ]
        found = smallest_bottleneck(needs)
        return np.inf if found is None else found.value

    def memory_table(self, c: Candidate, kind: StageKind, table: StageTable, in_flight: int) -> Table:
        """Bytes that a stage of blocks[first:last] holds at its peak, for all ranges."""
        blocks = table.blocks
        per_numel, per_unit, per_root, step = self._static(c)
        numel = range_sums(blocks.numel)
        static = per_numel * numel + range_sums(np.where(self._layer, 0.0, per_root * blocks.numel))
        static += range_maxima(np.where(self._layer, per_unit * blocks.numel, 0.0)) + range_sums(blocks.buffer_bytes)
        activations = in_flight * range_sums(table.held_bytes) + range_maxima(table.extra_bytes)
        return np.asarray(static + np.maximum(activations, step * numel))

    def _static(self, c: Candidate) -> tuple[float, float, float, float]:
        """Bytes a parameter: of any, of the largest layer's, of those outside layers, and in the optimizer's step."""
        def total(numel: float, unit: float, root: float) -> float:
            return static_bytes(
                numel, zero=c.zero, num_shards=c.dp_shard, dtype=self._request.dtype,
                param_dtype=self._request.param_dtype, optimizer=self._request.optimizer, unit_numel=unit,
                root_numel=root,
            ).total

        shards = c.dp_shard if c.zero else 1
        return total(1, 0, 0), total(0, 1, 0), total(0, 0, 1), DTYPE_BYTES[self._request.param_dtype] / shards

    def _layers_fit(self, c: Candidate, kinds: tuple[StageKind, ...], tables: dict[StageKind, StageTable]) -> bool:
        """Whether the stages have room for all layers, each taken as the leanest of them; a necessary condition."""
        if not self._layer.any():
            return True
        per_numel = self._static(c)[0]
        in_flight = np.minimum(c.pp - np.arange(c.pp), c.num_micro_batches)
        room = 0.0
        for kind, table in tables.items():
            held = in_flight[[other is kind for other in kinds]]
            # Layers that differ in size or class are each a row; there are few of those.
            layers = np.unique(np.stack([table.blocks.numel, table.held_bytes])[:, self._layer], axis=1)
            smallest = (per_numel * layers[0][:, None] + layers[1][:, None] * held[None, :]).min(axis=0)
            if smallest.min() <= 0:
                return True
            beside = float(table.extra_bytes[self._layer].min())
            room += float(np.maximum(0.0, np.floor((kind.memory_limit_bytes - beside) / smallest)).sum())
        return room >= int(self._layer.sum())

    def stage_table(self, c: Candidate, kind: StageKind) -> StageTable:
        """Times and bytes of each block on a stage of this kind under the candidate."""
        blocks = self._block_table(c, kind)
        full = c.recompute is Recompute.FULL
        forward = blocks.forward_s
        backward = blocks.backward_s + (blocks.again_s if full else 0.0)
        recomputed = self._layer if full else np.zeros_like(self._layer)
        moved = optimizer_step_bytes(1.0, zero=c.zero, num_shards=c.dp_shard, optimizer=self._request.optimizer)
        bandwidth = memory_bandwidth(kind.device)
        start, end = np.zeros_like(forward), moved / bandwidth * blocks.numel
        if c.dp > 1:
            forward, backward, start, more = self._data_parallel(c, kind, blocks.numel, forward, backward)
            end = end + more
        if c.zero < 2 and c.num_micro_batches > 1:  # gradients are added up in float32
            width = DTYPE_BYTES[self._request.dtype] + 2 * GRADIENT_BYTES
            backward = backward + width * blocks.numel / bandwidth
        return StageTable(
            forward_s=forward, backward_s=backward, start_s=start, end_s=end, blocks=blocks,
            held_bytes=np.where(recomputed, blocks.boundary_bytes, blocks.saved_bytes),
            extra_bytes=blocks.transient_bytes + np.where(recomputed, blocks.saved_bytes, 0.0),
        )

    def _data_parallel(
        self, c: Candidate, kind: StageKind, numel: Table, forward: Table, backward: Table
    ) -> tuple[Table, Table, Table, Table]:
        """Forward, backward, start and end with gathering and reducing, as in `simulate/stage_cost.py`."""
        wide, bandwidth = DTYPE_BYTES[self._request.dtype], memory_bandwidth(kind.device)
        # What lies outside layers moves as one; over several stages that is at least the chain's first or last block.
        units = np.where(self._layer, numel, 0.0)
        if c.pp > 1:
            units[[0, -1]] = numel[[0, -1]]
        elif not self._layer.all():
            units[int(np.argmin(self._layer))] = numel[~self._layer].sum()

        def per_block(time_s: dict[float, float]) -> Table:
            return np.array([time_s[float(n)] for n in units])

        sizes = sorted({float(n) for n in units})
        gathers = per_block({n: kind.shard.time_s(Collective.ALL_GATHER, wide * n) if c.zero else 0.0 for n in sizes})
        if c.zero == 0:
            reductions = per_block({n: kind.whole.time_s(Collective.ALL_REDUCE, GRADIENT_BYTES * n) for n in sizes})
        else:
            reductions = per_block({
                n: kind.shard.time_s(Collective.REDUCE_SCATTER, GRADIENT_BYTES * n)
                + kind.copies.time_s(Collective.ALL_REDUCE, GRADIENT_BYTES * n / c.dp_shard)
                for n in sizes
            })
        copy_out = 2 * wide * numel / bandwidth
        copy_in = (wide + GRADIENT_BYTES) * numel / bandwidth
        none = np.zeros_like(numel)
        if c.zero == 3:
            in_layers = np.where(self._layer, gathers, 0.0)
            return (
                forward + exposed(forward, in_layers) + copy_out,
                backward + exposed(backward, in_layers + reductions) + copy_out + copy_in, none, none,
            )
        start = exposed(forward, gathers) + copy_out if c.zero else none
        if c.zero == 2:  # every micro-batch reduces behind its backward; what is left at the end counts once
            return forward, backward + copy_in, start, exposed(backward, reductions)
        return forward, backward, start, exposed(backward, reductions) + copy_in

    def _least_sent(self, c: Candidate) -> tuple[float, float]:
        """Bytes that one device sends to the next stage for a micro-batch, and gets back, at the leanest border."""
        if c.pp == 1:
            return 0.0, 0.0
        graph, sharding = self._graph, self._shardings(c)
        sizes: dict[tuple[str, int], tuple[float, float]] = {}
        for cls in self._chooser.classes:
            width = element_bytes(cls, captured_dtype(graph), self._request.dtype)
            for i, name in enumerate(cls.outputs):
                info = cls.tensor[name]
                split = cls.name in sharding and sharding[cls.name].outputs[i].kind is Kind.SHARDED
                size = info.numel * graph.scale(info.numel, c.micro_batch) * width[name] / (c.tp if split else 1)
                sizes[cls.name, i] = size, size if info.requires_grad else 0.0
        sent = [
            (sum(sizes[key][0] for key in border), sum(sizes[key][1] for key in border)) for border in self._borders
        ]
        return min(forward for forward, _ in sent), min(backward for _, backward in sent)

    def _shardings(self, c: Candidate) -> dict[str, ClassSharding]:
        found = self._chooser.shardings(
            c.tp, c.micro_batch, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights
        )
        return {choice.cls: choice for choice in found}

    def _block_table(self, c: Candidate, kind: StageKind) -> BlockTable:
        key = (c.tp, c.sequence_parallel, c.split_weights, c.micro_batch, c.pp > 1, kind.compute_kind)
        if key not in self._blocks:
            self._blocks[key] = self._make_blocks(c, kind)
        return self._blocks[key]

    def _make_blocks(self, c: Candidate, kind: StageKind) -> BlockTable:
        graph = self._graph
        sharding = self._shardings(c)
        costs = {
            cls.name: block_cost(
                graph, cls, sharding.get(cls.name), tp=c.tp, rows=c.micro_batch, device=kind.device,
                tp_group=kind.tp_group, dtype=self._request.dtype, compile=self._request.compile,
            )
            for cls in self._chooser.classes
        }
        chain = [costs[block.cls] for block in graph.blocks]
        held = self._numel_first[c.pp > 1]
        return BlockTable(
            forward_s=np.array([x.forward_compute_s + x.forward_tp_comm_s for x in chain]),
            backward_s=np.array([x.backward_compute_s + x.backward_tp_comm_s for x in chain]),
            again_s=np.where(self._layer, [x.forward_compute_s + x.forward_tp_comm_s for x in chain], 0.0),
            saved_bytes=np.array([x.saved_bytes for x in chain]),
            boundary_bytes=np.array([x.boundary_bytes for x in chain]),
            transient_bytes=np.array([x.transient_bytes for x in chain]),
            buffer_bytes=np.array([x.buffer_bytes for x in chain]),
            numel=np.array([
                sum(n for n, own in zip(x.params, owned, strict=True) if own)
                for x, owned in zip(chain, held, strict=True)
            ]),
        )


def exposed(compute: Table, communication: Table) -> Table:
    """What hidden communication adds at least: its slow-down of the compute, or what does not fit behind it.

    Each of the two holds for the sums over any range of blocks; the one that says more of the whole chain is given.
    """
    slowed = OVERLAP_SLOWDOWN * communication
    lacking = communication - (1 - OVERLAP_SLOWDOWN) * compute
    return slowed if slowed.sum() >= lacking.sum() else lacking


def _first_holders(graph: ModelGraph, *, ends_apart: bool) -> list[list[bool]]:
    """For each block and each of its parameters: whether no earlier block that may be in its stage holds it too.

    `ends_apart`: the chain's first and last block are in different stages.
    """
    seen: dict[str, int] = {}
    last = len(graph.blocks) - 1
    found = []
    for index, block in enumerate(graph.blocks):
        own = []
        for name in block.params:
            holder = seen.get(name)
            own.append(holder is None or (ends_apart and index == last and holder == 0))
            seen[name] = index
        found.append(own)
    return found
