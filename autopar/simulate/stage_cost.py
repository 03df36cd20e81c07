"""Time and bytes of one stage: what a micro-batch takes, what a step adds, and what each device holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from autopar.cluster.cluster import Cluster, DeviceType, GroupShape
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.compute import memory_bandwidth, memory_time_s
from autopar.cost_models.measured import measured_pass_s, measured_unit_s
from autopar.cost_models.memory import (
    GRADIENT_BYTES,
    StaticBytes,
    offloaded_step_s,
    optimizer_step_bytes,
    reduction_bytes,
    static_bytes,
    step_temporary_bytes,
    unit_buffer_bytes,
    workspace_bytes,
)
from autopar.graph.model_graph import DTYPE_BYTES, Block, BlockClass, ModelGraph
from autopar.plan.plan import Plan, Recompute, Stage, Variant
from autopar.sharding.reshard import Collective
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.class_costs import ClassCosts, CostAxis
from autopar.simulate.numels import Numels, held_numels
from autopar.simulate.overlap import Exposed, backward_exposed, forward_exposed
from autopar.simulate.single_backward import SingleBackward, single_backward
from autopar.simulate.variant_cost import VariantCost, variant_cost

COMPARED_BYTES = 2.0**26  # of a collective by which unlike groups are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage on its slowest device. Times of a micro-batch, unless their name says `step`.

    `forward_dp_s` and `backward_dp_s` are the exposed part of gathering and reducing in every micro-batch;
    `step_start_s` (gathering once) comes before the first forward, `step_end_s` (what is left of reducing) after the
    last backward, then `step_tp_s` (gradients that are sums over the tensor axis), then `optimizer_s`.
    """

    forward_compute_s: float  # with what copies to the host add
    backward_compute_s: float  # with recomputation, and what copies from the host add
    weight_backward_s: float  # the part of it for gradients of parameters alone
    forward_tp_s: float
    backward_tp_s: float  # with recomputation's
    forward_dp_s: float
    backward_dp_s: float
    step_start_s: float
    step_end_s: float
    step_tp_s: float
    optimizer_s: float
    held_bytes: float  # of activations, from a micro-batch's forward to its backward
    extra_bytes: float  # while a backward runs: what recomputation brings back, temporaries
    static: StaticBytes
    optimizer_step_bytes: float  # temporaries of the optimizer step, when no activation is held
    reduction_bytes: float  # buffers of the first reduction in the last backward, under ZeRO 0 and 1
    host_bytes: float  # of activations in host memory, from a micro-batch's forward to its backward
    host_state_bytes: float  # of optimizer state in host memory
    forward_flops: float  # of the model, over the tensor axis, without recomputation
    param_numel: float
    single: SingleBackward | None = None  # in a step of one micro-batch: what cannot be there at once

    @property
    def step_end_bytes(self) -> float:
        """The most that the end of the step needs beside the static bytes.

        The last micro-batch alone is there when the first layer's gradients are reduced; all of it counts.
        """
        reducing = self.reduction_bytes + self.held_bytes if self.reduction_bytes else 0.0
        return max(self.optimizer_step_bytes, reducing)

    def peak_bytes(self, in_flight: int) -> float:
        """Bytes at the peak under 1F1B, with so many micro-batches in flight."""
        if self.single is not None:
            stepping = self.single.after.total + self.optimizer_step_bytes
            return self.single.always.total + max(self.single.peak.total, stepping)
        return self.static.total + max(in_flight * self.held_bytes + self.extra_bytes, self.step_end_bytes)

    @property
    def forward_s(self) -> float:
        return self.forward_compute_s + self.forward_tp_s + self.forward_dp_s

    @property
    def backward_s(self) -> float:
        return self.backward_compute_s + self.backward_tp_s + self.backward_dp_s

    @property
    def step_once_s(self) -> float:
        """Seconds a step beside its micro-batches."""
        return self.step_start_s + self.step_end_s + self.step_tp_s + self.optimizer_s


def is_layer(block: Block) -> bool:
    """Whether a block is one of the repeated layers: an FSDP unit, and what recomputes or offloads as one."""
    return block.name not in ("prologue", "epilogue") and not block.name.startswith("glue")


def slowest_device(cluster: Cluster, ranks: Sequence[int], dtype: str) -> DeviceType:
    if cluster.is_uniform:
        return cluster.device(ranks[0])
    nodes = dict.fromkeys(cluster.node_of[rank] for rank in ranks)
    return min((cluster.nodes[i].device for i in nodes), key=lambda device: device.peak(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sets of ranks that communicate, by their shapes, and how many such sets use one node's network."""

    shapes: tuple[tuple[GroupShape, int], ...]

    def time_s(self, kind: Collective, size_bytes: float) -> float:
        """The slowest's: all of a stage wait for it."""
        return max(
            collective_time_s(kind, size_bytes, shape, groups_per_node=per_node) for shape, per_node in self.shapes
        )


def _group(cluster: Cluster, plan: Plan, groups: Iterable[tuple[int, ...]]) -> _Group:
    """The groups of these ranks; the other devices that the plan uses on a node form groups of the same shape."""
    found: dict[tuple[GroupShape, int], None] = {}
    uniform = cluster.is_uniform
    for ranks in islice(groups, 1) if uniform else groups:
        shape = cluster.group(ranks)
        some = ranks[:1] if uniform else ranks  # nodes are alike
        used = min(plan.num_devices, max(cluster.nodes[cluster.node_of[rank]].num_devices for rank in some))
        found[shape, max(1, used // shape.per_node)] = None
    return _Group(shapes=tuple(found))


def tensor_group(cluster: Cluster, stage: Stage, device: DeviceType) -> GroupShape | None:
    """The shape of the stage's tensor groups that have such a device, of the slowest where they are unlike."""
    tp = stage.mesh.tp
    if tp == 1:
        return None
    if cluster.is_uniform:
        return cluster.group(stage.devices[:tp])
    groups = [stage.devices[at : at + tp] for at in range(0, len(stage.devices), tp)]
    own = [ranks for ranks in groups if any(cluster.device(rank) == device for rank in ranks)]
    shapes = dict.fromkeys(cluster.group(ranks) for ranks in own or groups)
    return max(shapes, key=lambda shape: collective_time_s(Collective.ALL_REDUCE, COMPARED_BYTES, shape))


def stage_cost(
    graph: ModelGraph, cluster: Cluster, plan: Plan, index: int, *, device: DeviceType | None = None,
    rows: float | None = None, as_megatron: bool = False, recomputes_all: bool = False,
) -> StageCost:
    """The cost of `plan.stages[index]`: on its slowest device with an even share of rows, or on this one with these.

    `as_megatron`: as Megatron runs it (`autopar.simulate.async_products`). `recomputes_all`: recomputation does not
    stop early (`autopar.simulate.recomputed`).
    """
    stage = plan.stages[index]
    mesh, blocks = stage.mesh, graph.blocks[stage.first : stage.last]
    device = device or slowest_device(cluster, stage.devices, plan.dtype)
    rows = rows or plan.global_batch / (mesh.dp * plan.num_micro_batches)
    tp_group = tensor_group(cluster, stage, device)
    outer, experts = context_axis(cluster, stage), expert_axis(cluster, stage)
    costs = [
        _cost_of(graph, plan, block, stage, rows, device, tp_group, outer, experts, as_megatron, recomputes_all)
        for block in blocks
    ]

    forward = sum(cost.forward_compute_s for cost in costs)
    backward = sum(cost.backward_compute_s for cost in costs)
    weights = sum(cost.weight_backward_s for cost in costs)
    forward_tp = sum(cost.forward_tp_comm_s for cost in costs)
    backward_tp = sum(cost.backward_tp_comm_s for cost in costs)
    added = added_by_variants(blocks, costs, stage, device)
    forward += sum(more.forward_s for more in added)
    backward += sum(more.backward_s for more in added)
    backward_tp += sum(more.backward_tp_s for more in added)
    held = sum(more.held_bytes for more in added)
    extra = max((more.extra_bytes for more in added), default=0.0)
    entry = 0.0
    if index and any(more.host_bytes for more in added):
        # What the stage received stays on the device until its backward ends.
        entry = max(cost.boundary_bytes for block, cost in zip(blocks, costs, strict=True) if is_layer(block))

    held += entry
    numels = held_numels(graph, plan, blocks, costs, stage)
    numel = sum(each.numel for each in numels)
    static = _static_bytes(plan, stage, numels)
    always = workspace_bytes(device) + sum(cost.buffer_bytes for cost in costs)
    static = replace(static, buffers=static.buffers + always)
    if stage.zero < 2 and plan.num_micro_batches > 1:
        # Gradients are added up in float32: one is read, the sum is read and written.
        added_numel = numel - sum({
            name: size for block, cost in zip(blocks, costs, strict=True)
            for name, size, in_place in zip(block.params, cost.params, cost.summed_in_place, strict=True) if in_place
        }.values())
        adding = measured_pass_s(device, "accumulate", added_numel, plan.dtype)
        if adding is None:
            adding = (DTYPE_BYTES[plan.dtype] + 2 * GRADIENT_BYTES) * added_numel / memory_bandwidth(device)
        backward += adding
        weights += adding
    data = _data_parallel(
        cluster, plan, stage, blocks, costs, added, numels, device, at_once=as_megatron and stage.zero == 0
    )
    moved = sum(
        optimizer_step_bytes(each.numel, zero=stage.zero, num_shards=each.num_shards, optimizer=plan.optimizer)
        for each in numels
    )
    optimizer = measured_step_s(blocks, costs, plan, stage, device)
    if optimizer is None:
        optimizer = memory_time_s(device, moved) if moved else 0.0
    step_bytes = sum(
        step_temporary_bytes(zero=stage.zero, num_shards=each.num_shards) * each.numel for each in numels
    )
    state_bytes = 0.0
    if stage.offload_optimizer:
        optimizer += sum(
            offloaded_step_s(
                each.numel, zero=stage.zero, num_shards=each.num_shards, optimizer=plan.optimizer, device=device
            ) for each in numels
        )
        step_bytes, state_bytes = sum(
            step_temporary_bytes(zero=stage.zero, num_shards=each.num_shards, optimizer=plan.optimizer)
            * max(each.unit, each.root) for each in numels
        ), static.optimizer
        static = replace(static, optimizer=0.0)
    single = None
    if plan.num_micro_batches == 1 and not as_megatron:
        gathered = unit_buffer_bytes(sum(each.unit for each in numels), zero=stage.zero, dtype=plan.dtype)
        single = single_backward(
            plan, stage, numels, [more.held_bytes for more in added], [more.extra_bytes for more in added],
            [is_layer(block) for block in blocks], entry, static, always + gathered,
        )
    return StageCost(
        forward_compute_s=forward, backward_compute_s=backward,
        weight_backward_s=weights,
        forward_tp_s=forward_tp, backward_tp_s=backward_tp,
        forward_dp_s=data.forward_s, backward_dp_s=data.backward_s, step_start_s=data.start_s, step_end_s=data.end_s,
        step_tp_s=collective_time_s(
            Collective.ALL_REDUCE, GRADIENT_BYTES * sum(each.partial for each in numels), tp_group
        ),
        optimizer_s=optimizer,
        held_bytes=held, extra_bytes=extra, static=static,
        optimizer_step_bytes=step_bytes,
        reduction_bytes=sum(
            reduction_bytes(each.unit, zero=stage.zero, num_shards=each.num_shards) for each in numels
        ),
        host_bytes=sum(more.host_bytes for more in added),
        host_state_bytes=state_bytes,
        forward_flops=sum(cost.forward_flops for cost in costs), param_numel=numel,
        single=single,
    )


def measured_step_s(
    blocks: Sequence[Block], costs: Sequence[BlockCost], plan: Plan, stage: Stage, device: DeviceType
) -> float | None:
    """Seconds of the optimizer's step as measured, parameter by parameter; None where it was not.

    Parameters in shards over data axes are distributed tensors, which torch steps more slowly than whole copies.
    """
    mesh = stage.mesh
    sharded = mesh.dp * mesh.cp > 1 and stage.zero > 0
    shards = mesh.dp_shard * mesh.cp if stage.zero else 1
    name = f"{plan.optimizer}{'_sharded' if sharded else ''}"
    total = 0.0
    seen: set[str] = set()
    for block, cost in zip(blocks, costs, strict=True):
        for param, numel, by_experts in zip(block.params, cost.params, cost.by_experts, strict=True):
            if param in seen:
                continue
            seen.add(param)
            own = shards // mesh.ep if by_experts and stage.zero else shards
            taken = measured_pass_s(device, name, numel / own, plan.param_dtype)
            if taken is None:
                return None
            total += taken
    return total


def class_costs_of(
    graph: ModelGraph, cls: BlockClass, cluster: Cluster, plan: Plan, stage: Stage, *, device: DeviceType, rows: float
) -> ClassCosts:
    """What the ops of a class cost where the stage runs it, on such a device with so many rows of a micro-batch."""
    mesh = stage.mesh
    return ClassCosts(
        graph, cls, tp=mesh.tp, rows=rows, device=device, dtype=plan.dtype, outer=context_axis(cluster, stage),
        tp_group=tensor_group(cluster, stage, device),
    )


def context_axis(cluster: Cluster, stage: Stage) -> tuple[CostAxis, ...]:
    """The axis before the tensor axis, where the stage has one."""
    mesh = stage.mesh
    if mesh.cp == 1:
        return ()
    ranks = tuple(stage.devices[i * mesh.tp] for i in range(mesh.cp))
    return (inner_axis(cluster, ranks),)


def expert_axis(cluster: Cluster, stage: Stage) -> CostAxis | None:
    """The data ranks that have the experts between them, where the stage has such."""
    mesh = stage.mesh
    if mesh.ep == 1:
        return None
    return inner_axis(cluster, tuple(stage.devices[i * mesh.cp * mesh.tp] for i in range(mesh.ep)))


def inner_axis(cluster: Cluster, ranks: tuple[int, ...]) -> CostAxis:
    """An axis whose first group these ranks are; all other devices of their nodes form groups of the same shape."""
    shape = cluster.group(ranks)
    on_node = max(cluster.nodes[cluster.node_of[rank]].num_devices for rank in ranks)
    return CostAxis(len(ranks), shape, max(1, on_node // shape.per_node))


def _cost_of(
    graph: ModelGraph, plan: Plan, block: Block, stage: Stage, rows: float, device: DeviceType,
    tp_group: GroupShape | None, outer: tuple[CostAxis, ...], experts: CostAxis | None, as_megatron: bool,
    recomputes_all: bool,
) -> BlockCost:
    return block_cost(
        graph, graph.block_class[block.cls], plan.class_shardings(block.cls, stage),
        tp=stage.mesh.tp, rows=rows, device=device, tp_group=tp_group, dtype=plan.dtype, compile=plan.compile,
        outer=outer, expert_axis=experts, as_megatron=as_megatron, recomputes_all=recomputes_all,
    )


def added_by_variants(
    blocks: Sequence[Block], costs: Sequence[BlockCost], stage: Stage, device: DeviceType
) -> list[VariantCost]:
    """What each block's variant adds; blocks that are no layers keep everything."""
    variants = iter(stage.layer_variants(sum(map(is_layer, blocks))))
    plain = Variant(recompute=Recompute.NONE)
    return [
        variant_cost(cost, next(variants) if is_layer(block) else plain, device)
        for block, cost in zip(blocks, costs, strict=True)
    ]


def _static_bytes(plan: Plan, stage: Stage, numels: Sequence[Numels]) -> StaticBytes:
    """What a device holds of all states, whatever the micro-batches."""
    each = [
        static_bytes(
            own.numel, zero=stage.zero, num_shards=own.num_shards, dtype=plan.dtype, param_dtype=plan.param_dtype,
            optimizer=plan.optimizer, unit_numel=own.unit, root_numel=own.root,
        ) for own in numels
    ]
    return StaticBytes(
        parameters=sum(own.parameters for own in each), gradients=sum(own.gradients for own in each),
        optimizer=sum(own.optimizer for own in each), buffers=sum(own.buffers for own in each),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DataTimes:
    forward_s: float
    backward_s: float
    start_s: float
    end_s: float


def _data_parallel(
    cluster: Cluster, plan: Plan, stage: Stage, blocks: Sequence[Block], costs: Sequence[BlockCost],
    added: Sequence[VariantCost], numels: Sequence[Numels], device: DeviceType, *, at_once: bool = False,
) -> _DataTimes:
    """What gathering parameters and reducing gradients adds, by ZeRO level (each layer a unit, the rest the root).

    `at_once`: all gradients are reduced together after the last backward, where they lie.
    """
    mesh, zero = stage.mesh, stage.zero
    if mesh.dp * mesh.cp == 1:
        return _DataTimes(forward_s=0.0, backward_s=0.0, start_s=0.0, end_s=0.0)
    groups = {own.by_experts: _data_groups(cluster, plan, stage, by_experts=own.by_experts) for own in numels}
    compute_bytes = DTYPE_BYTES[plan.dtype]
    bandwidth = memory_bandwidth(device)

    def gather_s(own: Numels, numel: float) -> float:
        return groups[own.by_experts].shard.time_s(Collective.ALL_GATHER, compute_bytes * numel) if zero else 0.0

    def reduce_s(own: Numels, numel: float) -> float:
        among = groups[own.by_experts]
        if zero == 0:
            return among.whole.time_s(Collective.ALL_REDUCE, GRADIENT_BYTES * numel)
        return among.shard.time_s(Collective.REDUCE_SCATTER, GRADIENT_BYTES * numel) + among.copies.time_s(
            Collective.ALL_REDUCE, GRADIENT_BYTES * numel / own.num_shards
        )

    # Units in order of the forward. What lies outside layers is one unit that is gathered first and reduced last.
    forward_s = [0.0] + [
        c.forward_compute_s + c.forward_tp_comm_s + more.forward_s for c, more in zip(costs, added, strict=True)
    ]
    backward_s = [0.0] + [
        c.backward_compute_s + c.backward_tp_comm_s + more.backward_s + more.backward_tp_s
        for c, more in zip(costs, added, strict=True)
    ]
    numel = sum(own.numel for own in numels)
    none = [0.0] * (1 + len(blocks))
    gathers, reductions = list(none), list(none)
    sizes: list[list[float]] = []
    for own in numels:
        layer = iter(own.units)
        sizes.append([own.root] + [next(layer) if is_layer(block) else 0.0 for block in blocks])
        each = {size: (gather_s(own, size), reduce_s(own, size)) for size in set(sizes[-1])}
        gathers = [before + each[size][0] for before, size in zip(gathers, sizes[-1], strict=True)]
        reductions = [before + each[size][1] for before, size in zip(reductions, sizes[-1], strict=True)]
    flipped = list(reversed(backward_s))
    hides = not device.name.startswith("CPU")
    if not hides:
        measured = _measured_units(plan, stage, numels, sizes, device)
        if measured is not None:
            return measured
    if at_once:
        return _DataTimes(
            forward_s=0.0, backward_s=0.0, start_s=0.0, end_s=sum(reduce_s(own, own.numel) for own in numels)
        )
    once_forward = forward_exposed(forward_s, gathers, hides=hides) if zero > 0 else Exposed(during_s=0.0, after_s=0.0)
    reducing = backward_exposed(flipped, none, list(reversed(reductions)), hides=hides)
    # Kernels that move gradients and gathered parameters about, beside the communication itself.
    copy_out_s = 2 * compute_bytes * numel / bandwidth
    copy_in_s = (compute_bytes + GRADIENT_BYTES) * numel / bandwidth
    if zero == 3:
        in_layers = [0.0, *gathers[1:]]  # the root stays gathered
        every_forward = forward_exposed(forward_s, in_layers, hides=hides)
        # The last layers' parameters are still there when the backward begins: the last unit's gather is in time.
        every_backward = backward_exposed(
            flipped, list(reversed(in_layers)), list(reversed(reductions)), hides=hides
        )
        return _DataTimes(
            forward_s=every_forward.during_s + copy_out_s,
            backward_s=every_backward.during_s + every_backward.after_s + copy_out_s + copy_in_s,
            start_s=gathers[0], end_s=0.0,
        )
    if zero == 2:
        return _DataTimes(
            forward_s=0.0, backward_s=reducing.during_s + copy_in_s, start_s=once_forward.during_s + copy_out_s,
            end_s=reducing.after_s,
        )
    return _DataTimes(
        forward_s=0.0, backward_s=0.0, start_s=once_forward.during_s + (copy_out_s if zero else 0.0),
        end_s=reducing.during_s + reducing.after_s + copy_in_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRanks:
    """The ranks that share out parameters with a stage's first, those with copies of its shard, and all of them."""

    shard: tuple[int, ...]
    copies: tuple[int, ...]
    whole: tuple[int, ...]


def data_ranks(stage: Stage, *, by_experts: bool = False) -> DataRanks:
    """The data ranks of the stage's first rank; `by_experts`: of those that have the same experts."""
    mesh = stage.mesh
    inner, apart = mesh.cp * mesh.tp, mesh.ep if by_experts else 1
    whole = stage.devices[:: mesh.tp] if apart == 1 else tuple(
        rank for i in range(0, mesh.dp, apart) for rank in stage.devices[i * inner : (i + 1) * inner : mesh.tp]
    )
    each = mesh.dp_shard * inner
    return DataRanks(
        shard=whole if stage.zero == 0 else whole[: max(1, mesh.dp_shard // apart) * mesh.cp],
        copies=tuple(stage.devices[i * each] for i in range(mesh.dp_replicate)), whole=whole,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DataGroups:
    """The groups of these ranks."""

    shard: _Group
    copies: _Group
    whole: _Group


def _data_groups(cluster: Cluster, plan: Plan, stage: Stage, *, by_experts: bool) -> _DataGroups:
    ranks, mesh = data_ranks(stage, by_experts=by_experts), stage.mesh
    size, inner = len(ranks.shard), mesh.cp * mesh.tp
    each = mesh.dp_shard * inner
    return _DataGroups(
        shard=_group(cluster, plan, (ranks.whole[at : at + size] for at in range(0, len(ranks.whole), size))),
        copies=_group(cluster, plan, (stage.devices[at::each] for at in range(0, each, inner))),
        whole=_group(cluster, plan, (ranks.whole,)),
    )


def _measured_units(
    plan: Plan, stage: Stage, numels: Sequence[Numels], sizes: Sequence[Sequence[float]], device: DeviceType
) -> _DataTimes | None:
    """`_data_parallel` from measured layers, where nothing runs beside anything else; None where none were measured.

    `sizes` has for each of `numels` the parameters of the root, and then those of each layer.
    """
    mesh, zero = stage.mesh, stage.zero
    if (mesh.dp_replicate > 1 and mesh.dp_shard * mesh.cp > 1) or plan.dtype != plan.param_dtype:
        return None
    gathers, reduced = [0.0] * len(sizes[0]), 0.0
    for own, units in zip(numels, sizes, strict=True):
        ranks = mesh.dp * mesh.cp // (mesh.ep if own.by_experts else 1)
        for at, size in enumerate(units if ranks > 1 else ()):
            time = measured_unit_s(device, size, ranks, sharded=zero > 0)
            if time is None:
                return None
            gathers[at] += time.forward_s
            reduced += time.backward_s
    if zero < 2:
        return _DataTimes(forward_s=0.0, backward_s=0.0, start_s=sum(gathers), end_s=reduced)
    if zero == 2:
        return _DataTimes(forward_s=0.0, backward_s=reduced, start_s=sum(gathers), end_s=0.0)
    again = sum(gathers[1:])  # the root stays gathered
    return _DataTimes(forward_s=again, backward_s=again + reduced, start_s=gathers[0], end_s=0.0)
