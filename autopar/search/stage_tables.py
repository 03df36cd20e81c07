"""What blocks take on a stage: their costs at a candidate's rows, and their times with its data axes and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopar.cluster.cluster import DeviceType
from autopar.cost_models.compute import memory_bandwidth
from autopar.cost_models.measured import op_table
from autopar.cost_models.memory import GRADIENT_BYTES, offloaded_step_s, optimizer_step_bytes
from autopar.graph.model_graph import DTYPE_BYTES
from autopar.search.block_table import Behind, BlockTable, Sorts, StageTable
from autopar.search.candidates import Candidate, PlanRequest
from autopar.search.elimination import Table
from autopar.search.shardings import ShardingChooser
from autopar.search.stage_kinds import Group, StageKind
from autopar.search.variants import layer_options, levels
from autopar.sharding.reshard import Collective
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.class_costs import CostAxis
from autopar.simulate.overlap import OVERLAP_SLOWDOWN


class StageTables:
    """Tables of a model's blocks on stages of any kind; keeps those that candidates share.

    `sorts`: of chains of one stage, and of several.
    """

    def __init__(self, request: PlanRequest, chooser: ShardingChooser, sorts: Sequence[Sorts], num_layers: int) -> None:
        self._request, self._chooser, self._sorts, self._num_layers = request, chooser, sorts, num_layers
        self._blocks: dict[tuple[object, ...], BlockTable] = {}
        self._collectives: dict[tuple[int, Collective, float], float] = {}  # by a group's id; the layout keeps it

    def blocks(self, c: Candidate, kind: StageKind) -> BlockTable:
        """The blocks of the model at the candidate's rows on a stage of this kind."""
        key = (c.tp, c.cp, c.sequence_parallel, c.split_weights, c.rows, c.pp > 1, kind.compute_kind)
        if key not in self._blocks:
            self._blocks[key] = self._make_blocks(c, kind)
        return self._blocks[key]

    def block_costs(
        self, c: Candidate, kind: StageKind, expert_axis: CostAxis | None = None
    ) -> dict[str, BlockCost]:
        """The cost of a block of each class on a stage of this kind."""
        sharding = self.shardings(c)
        graph = self._chooser.graph(
            c.tp, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights, cp=c.cp
        )
        return {
            cls.name: block_cost(
                graph, graph.block_class[cls.name], sharding[cls.name], tp=c.tp, rows=c.rows, device=kind.device,
                tp_group=kind.tp_group, dtype=self._request.dtype, compile=self._request.compile, outer=kind.context,
                expert_axis=expert_axis,
            )
            for cls in self._chooser.classes
        }

    def _make_blocks(self, c: Candidate, kind: StageKind) -> BlockTable:
        costs = self.block_costs(c, kind)
        sorts = self._sorts[c.pp > 1]
        offload = self._request.offload
        options = {
            name: layer_options(cost, kind.device, self._num_layers, offload=offload) for name, cost in costs.items()
        }
        layers = [options[name] if own else None for name, own in zip(sorts.classes, sorts.is_layer, strict=True)]
        kinds = tuple(dict.fromkeys(layer for layer in layers if layer is not None))
        each = [costs[name] for name in sorts.classes]
        return BlockTable(
            sorts=sorts,
            forward_s=np.array([x.forward_compute_s + x.forward_tp_comm_s for x in each]),
            backward_s=np.array([x.backward_compute_s + x.backward_tp_comm_s for x in each]),
            weights_s=np.array([x.weight_backward_s for x in each]),
            saved_bytes=np.array([x.saved_bytes for x in each]),
            boundary_bytes=np.array([x.boundary_bytes for x in each]),
            transient_bytes=np.array([x.transient_bytes for x in each]),
            buffer_bytes=np.array([x.buffer_bytes for x in each]),
            numel=np.array([
                sum(n for n, own in zip(x.params, held, strict=True) if own)
                for x, held in zip(each, sorts.held, strict=True)
            ]),
            kinds=kinds, kind=np.array([kinds.index(layer) if layer is not None else -1 for layer in layers]),
            levels=tuple(levels(kinds)),
        )

    def shardings(self, c: Candidate) -> dict[str, tuple[ClassSharding, ...]]:
        """Of each class the choice on each inner axis."""
        found = self._chooser.shardings(
            c.tp, c.micro_batch, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights, cp=c.cp
        )
        by_axis = {(choice.axis, choice.cls): choice for choice in found}
        return {
            cls.name: tuple(by_axis[axis, cls.name] for axis, _ in c.mesh.inner) for cls in self._chooser.classes
        }

    def times(self, c: Candidate, kind: StageKind) -> StageTable:
        """Times and bytes of blocks on a stage of this kind under the candidate."""
        blocks = self.blocks(c, kind)
        forward, backward = blocks.forward_s, blocks.backward_s
        moved = optimizer_step_bytes(1.0, zero=c.zero, num_shards=c.num_shards, optimizer=self._request.optimizer)
        bandwidth = memory_bandwidth(kind.device)
        once = moved / bandwidth * blocks.numel
        if c.offload_optimizer and not c.free_offload:
            once = once + blocks.numel * offloaded_step_s(
                1.0, zero=c.zero, num_shards=c.num_shards, optimizer=self._request.optimizer, device=kind.device
            )
        made = StageTable(
            forward_s=forward, backward_s=backward, plain_forward_s=forward, plain_backward_s=backward,
            hidden_share=1.0, once_s=once, once_beside_s=once, start_beside_s=np.zeros_like(once), blocks=blocks,
        )
        if c.dp * c.cp > 1:
            made = self._data_parallel(c, kind, made, *blocks.most_added)
        if (adding := self.adding_s(c, kind, blocks)) is not None:
            behind = made.behind and replace(made.behind, backward_s=made.behind.backward_s + adding)
            made = replace(
                made, backward_s=made.backward_s + adding, plain_backward_s=made.plain_backward_s + adding,
                behind=behind,
            )
        return made

    def adding_s(self, c: Candidate, kind: StageKind, blocks: BlockTable) -> Table | None:
        """What adding up gradients in float32 takes of each block's backward; None where they are not added up."""
        if c.zero >= 2 or c.num_micro_batches == 1:
            return None
        wide = DTYPE_BYTES[self._request.dtype] + 2 * GRADIENT_BYTES
        return np.asarray(wide * blocks.numel / memory_bandwidth(kind.device))

    def _data_parallel(
        self, c: Candidate, kind: StageKind, alone: StageTable, most_forward: Table, most_backward: Table
    ) -> StageTable:
        """Times with gathering and reducing, as in `simulate/stage_cost.py`. `most_...`: what variants add at most."""
        numel, forward, backward = alone.blocks.numel, alone.forward_s, alone.backward_s
        wide, bandwidth = DTYPE_BYTES[self._request.dtype], memory_bandwidth(kind.device)
        # What lies outside layers moves as one; over several stages that is at least the chain's first or last block.
        sorts, layer = alone.blocks.sorts, alone.blocks.kind >= 0
        units = np.where(layer, numel, 0.0)
        if c.pp > 1:
            units[sorts.ends] = numel[sorts.ends]
        elif sorts.first_outside is not None:
            units[sorts.first_outside] = (numel * sorts.number)[~layer].sum()
        sizes = units.tolist()
        gathers = np.array([self.gather_s(c, kind, n) for n in sizes])
        reductions = np.array([self.reduce_s(c, kind, n) for n in sizes])
        copy_out = 2 * wide * numel / bandwidth
        copy_in = (wide + GRADIENT_BYTES) * numel / bandwidth
        none = np.zeros_like(numel)
        if waits(kind.device):
            if c.zero == 3:
                in_layers = np.where(layer, gathers, 0.0)
                forward, backward = forward + in_layers + copy_out, backward + in_layers + reductions + copy_out
                return replace(
                    alone, forward_s=forward, backward_s=backward + copy_in, plain_forward_s=forward,
                    plain_backward_s=backward + copy_in,
                )
            every = reductions + copy_in if c.zero == 2 else none
            start = alone.once_s + (gathers + copy_out if c.zero else none)
            step = start + (reductions + copy_in if c.zero < 2 else none)
            return replace(
                alone, backward_s=backward + every, plain_backward_s=backward + every, once_s=step, once_beside_s=step,
                start_beside_s=start - alone.once_s,
            )
        once_s, start_s = alone.once_s, none
        if c.zero == 3:
            forward_s, backward_s = forward + copy_out, backward + copy_out + copy_in
        else:
            forward_s, backward_s = forward, backward + (copy_in if c.zero == 2 else none)
            start_s = copy_out if c.zero else none
            once_s = once_s + start_s + (copy_in if c.zero < 2 else none)
        alone = replace(alone, behind=Behind(
            gathers=np.where(layer, gathers, 0.0), reductions=np.where(layer, reductions, 0.0), forward_s=forward_s,
            backward_s=backward_s, once_s=once_s, start_s=start_s,
        ))
        if c.zero == 3:
            in_layers = np.where(layer, gathers, 0.0)
            number = sorts.number
            behind = exposed(forward, in_layers, number), exposed(backward, in_layers + reductions, number)
            slowed = OVERLAP_SLOWDOWN * in_layers, OVERLAP_SLOWDOWN * (in_layers + reductions)
            all_slowed = all(np.array_equal(a, b) for a, b in zip(behind, slowed, strict=True))
            return replace(
                alone, forward_s=forward + behind[0] + copy_out, backward_s=backward + behind[1] + copy_out + copy_in,
                plain_forward_s=forward + slowed[0] + copy_out,
                plain_backward_s=backward + slowed[1] + copy_out + copy_in,
                hidden_share=1.0 if all_slowed else OVERLAP_SLOWDOWN,
            )

        def before(forward: Table) -> Table:
            return exposed(forward, gathers, sorts.number) + copy_out if c.zero else none

        def once(forward: Table, backward: Table) -> Table:
            end = exposed(backward, reductions, sorts.number)
            return alone.once_s + before(forward) + end + (copy_in if c.zero < 2 else none)

        # Under ZeRO 2 every micro-batch reduces behind its backward; what is left at the end counts once.
        more = copy_in if c.zero == 2 else none
        return replace(
            alone, backward_s=backward + more, plain_backward_s=backward + more, once_s=once(forward, backward),
            once_beside_s=once(forward + most_forward, backward + most_backward),
            start_beside_s=before(forward + most_forward),
        )

    def gather_s(self, c: Candidate, kind: StageKind, numel: float) -> float:
        """Seconds of gathering so many of this rank's parameters for a forward."""
        if not c.zero:
            return 0.0
        return self._collective_s(kind.shard, Collective.ALL_GATHER, DTYPE_BYTES[self._request.dtype] * numel)

    def reduce_s(self, c: Candidate, kind: StageKind, numel: float) -> float:
        """Seconds of reducing the gradients of so many."""
        if c.zero == 0:
            return self._collective_s(kind.whole, Collective.ALL_REDUCE, GRADIENT_BYTES * numel)
        return self._collective_s(kind.shard, Collective.REDUCE_SCATTER, GRADIENT_BYTES * numel) + self._collective_s(
            kind.copies, Collective.ALL_REDUCE, GRADIENT_BYTES * numel / c.num_shards
        )

    def _collective_s(self, group: Group, kind: Collective, size_bytes: float) -> float:
        key = id(group), kind, size_bytes
        if key not in self._collectives:
            self._collectives[key] = group.time_s(kind, size_bytes)
        return self._collectives[key]


def waits(device: DeviceType) -> bool:
    """Whether nothing runs beside data-parallel communication, as on a CPU on which nothing was measured."""
    return device.name.startswith("CPU") and op_table(device) is None


def exposed(compute: Table, communication: Table, number: Table) -> Table:
    """What hidden communication adds at least: its slow-down of the compute, or what does not fit behind it.

    Each of the two holds for the sums over any range of blocks; the one that says more of the whole chain is given.
    `number`: the blocks of each entry.
    """
    slowed = OVERLAP_SLOWDOWN * communication
    lacking = communication - (1 - OVERLAP_SLOWDOWN) * compute
    return slowed if slowed @ number >= lacking @ number else lacking
