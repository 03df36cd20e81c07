"""Whether a plan can be simulated, whether it fits into memory, and what to tell of its figures."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.cluster.cluster import Cluster, DeviceType
from autopar.cost_models.memory import HOST_LINK_EFFICIENCY, allocatable_bytes, check_optimizer
from autopar.cost_models.op_kinds import is_known
from autopar.errors import InputError, PlanMismatchError
from autopar.graph.expert_params import unsplit_experts
from autopar.graph.kernels import KERNELS
from autopar.graph.model_graph import DTYPE_BYTES, ModelGraph
from autopar.plan.plan import Plan, Recompute
from autopar.simulate.measured_share import measured_share
from autopar.simulate.stage_cost import is_layer
from autopar.simulate.timeline import GIB, GroupTimeline


def check_plan(graph: ModelGraph, cluster: Cluster, plan: Plan) -> None:
    """InputError for a plan that its graph or cluster cannot hold."""
    if not plan.stages:
        raise InputError("the plan has no stages")
    check_optimizer(plan.optimizer)
    for name in (plan.dtype, plan.param_dtype):
        if name not in DTYPE_BYTES:
            raise InputError(f"dtype {name!r} is not known; use bfloat16, float16 or float32")
    at = 0
    for i, stage in enumerate(plan.stages):
        if stage.first != at or stage.last <= stage.first:
            raise PlanMismatchError(f"stage {i} has blocks {stage.first} to {stage.last}, which do not follow the last")
        at = stage.last
        if len(stage.devices) != stage.mesh.size:
            raise PlanMismatchError(f"stage {i} has {len(stage.devices)} devices for a mesh of {stage.mesh.size}")
        if stage.mesh.ep > 1 and (why := unsplit_experts(graph, stage.mesh.ep)):
            raise InputError(f"stage {i} has ep {stage.mesh.ep}: {why}")
        if max(stage.devices) >= cluster.num_devices:
            raise PlanMismatchError(f"stage {i} uses rank {max(stage.devices)} of a cluster of {cluster.num_devices}")
        layers = sum(map(is_layer, graph.blocks[stage.first : stage.last]))
        if stage.variants and sum(count for _, count in stage.variants) != layers:
            raise PlanMismatchError(f"the variants of stage {i} are not counts of its {layers} layers")
        known = {(choice.axis, choice.cls) for choice in stage.shardings or plan.shardings}
        for name, size in stage.mesh.inner:
            if any((name, block.cls) not in known for block in graph.blocks[stage.first : stage.last]):
                raise PlanMismatchError(f"stage {i} has a {name} axis of {size} but blocks without a sharding for it")
    if at != len(graph.blocks):
        raise PlanMismatchError(f"the plan covers {at} blocks, the model has {len(graph.blocks)}")
    if len(plan.stages) % (1 + max(stage.virtual for stage in plan.stages)):
        raise PlanMismatchError("every pipeline group needs the same number of chunks")


def infeasible_reason(
    cluster: Cluster, groups: Sequence[GroupTimeline], *, leaves_room: bool = True
) -> str | None:
    """Why the plan does not fit, of the device that lacks the most; None where it fits.

    `leaves_room`: the share of the memory that plans leave for fragmentation is not used up.
    """
    def usable_bytes(device: DeviceType) -> float:
        return device.usable_memory_bytes if leaves_room else allocatable_bytes(device)

    everywhere = min(map(usable_bytes, {id(node.device): node.device for node in cluster.nodes}.values()))
    worst: tuple[float, str] | None = None
    for group in groups:
        if group.memory.total <= everywhere:
            continue
        for rank in {cluster.node_of[rank]: rank for rank in group.ranks}.values():
            device = cluster.device(rank)
            usable = usable_bytes(device)
            lacking = group.memory.total - usable
            if lacking > 0 and (worst is None or lacking > worst[0]):
                parts = {
                    "parameters": group.memory.parameters, "gradients": group.memory.gradients,
                    "optimizer state": group.memory.optimizer, "activations": group.memory.activations,
                    "buffers": group.memory.buffers,
                }
                most = max(parts, key=lambda name: parts[name])
                worst = lacking, (
                    f"rank {rank} ({device.name}, stage {group.stage}) needs {group.memory.total / GIB:.1f} GiB and "
                    f"has {usable / GIB:.1f}; most of it is {most} ({parts[most] / GIB:.1f} GiB)"
                )
    return worst[1] if worst else None


def host_lacks(cluster: Cluster, devices: Sequence[Sequence[int]], host: Sequence[float]) -> str | None:
    """Why what is offloaded does not fit into host memory; None where it does, or where its size is unknown.

    `host`: the bytes that each of the `devices`, in groups that are alike, keeps there.
    """
    for size, ranks in zip(host, devices, strict=True):
        for rank in ranks[:1] if cluster.is_uniform else ranks:
            device = cluster.device(rank)
            if device.host_memory_bytes is not None and size > device.host_memory_bytes:
                return (
                    f"rank {rank} ({device.name}) keeps {size / GIB:.1f} GiB in host memory, and its share of that is "
                    f"{device.host_memory_bytes / GIB:.1f}"
                )
    return None


def megatron_notes(plan: Plan) -> tuple[str, ...]:
    """What is counted as Megatron does it (`autopar.simulate.async_products`)."""
    notes = []
    if any(stage.zero == 0 and stage.mesh.dp > 1 for stage in plan.stages):
        notes.append("as in Megatron, gradients of whole replicas are reduced after the last backward")
    if any(stage.mesh.tp > 1 for stage in plan.stages):
        notes.append("as in Megatron, a vocabulary that the tensor axis does not divide is padded")
    if plan.sequence_parallel:
        notes.append("as in Megatron, products gather split sequences again in the backward and add up gradients")
    return tuple(notes)


def recompute_notes(plan: Plan) -> tuple[str, ...]:
    """How training systems' own checkpoint functions recompute (`autopar.simulate.recomputed`)."""
    words = {word for stage in plan.stages for word in (stage.recompute, *(own.recompute for own, _ in stage.variants))}
    return () if words == {Recompute.NONE} else ("as in Megatron, what is recomputed is run to its end",)


def host_notes(size_bytes: float) -> tuple[str, ...]:
    """What offload takes of the host's memory."""
    if not size_bytes:
        return ()
    return (
        f"offload: up to {size_bytes / GIB:.3g} GiB of host memory for each device; copies at "
        f"{HOST_LINK_EFFICIENCY:g} of the host link's rate, each device by itself",
    )


def model_notes(graph: ModelGraph, cluster: Cluster, plan: Plan) -> tuple[str, ...]:
    """What the simulation of this plan does not model, or counts at a guess."""
    notes = []
    if any(op.target in KERNELS for cls in graph.classes for op in cls.ops):
        notes.append("norms, gated activations and the loss are counted as the kernels that training systems have")
    unknown = sorted({op.target for cls in graph.classes for op in cls.ops if not is_known(op.target)})
    if unknown:
        notes.append(f"ops without a cost rule, counted by their bytes alone: {', '.join(unknown)}")
    types = {node.device.name: node.device for node in cluster.nodes}
    notes += [
        f"{device.name} has no {plan.dtype} rate: its products are counted at the float32 rate"
        for device in types.values() if plan.dtype not in dict(device.peak_flops)
    ]
    share = measured_share(graph, cluster, plan)
    return (*notes, *((str(share),) if share is not None else ()))
