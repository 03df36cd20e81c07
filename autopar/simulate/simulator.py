"""simulate: a plan on a cluster, as a Timeline with every device's time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.memory import GRADIENT_BYTES, HOST_LINK_EFFICIENCY, check_optimizer
from autopar.cost_models.op_kinds import is_known
from autopar.errors import InputError, PlanMismatchError
from autopar.graph.model_graph import DTYPE_BYTES, ModelGraph
from autopar.plan.actions import compute_actions
from autopar.plan.plan import Plan
from autopar.sharding.reshard import Collective
from autopar.sharding.rewrites import rewritten
from autopar.simulate.events import Execution, StageTimes, execute, peak_activation_bytes
from autopar.simulate.schedules import ActionLists, plan_actions
from autopar.simulate.stage_cost import StageCost, is_layer, link_times, stage_cost
from autopar.simulate.timeline import GIB, ActionEvent, Breakdown, GroupTimeline, MemoryBytes, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """The pipeline ranks of a plan and what they run: rank r has stages r, r + p, r + 2p, ..."""

    num_ranks: int
    num_chunks: int
    lists: ActionLists

    def stages_of(self, rank: int) -> range:
        return range(rank, self.num_ranks * self.num_chunks, self.num_ranks)


def simulate(graph: ModelGraph, cluster: Cluster, plan: Plan) -> Timeline:
    """The step that a plan takes. InputError for a plan that its graph or cluster cannot hold.

    Each stage is timed on its slowest device; the schedule's action lists are then executed exactly.
    """
    graph = rewritten(graph, plan.rewrites)
    _check(graph, cluster, plan)
    num_chunks = 1 + max(stage.virtual for stage in plan.stages)
    num_ranks = plan.num_stages // num_chunks
    lists = compute_actions(plan_actions(plan))
    ranks = _Ranks(num_ranks=num_ranks, num_chunks=num_chunks, lists=lists)
    costs = [stage_cost(graph, cluster, plan, i) for i in range(plan.num_stages)]
    links = [link_times(graph, cluster, plan, i) for i in range(plan.num_stages - 1)]
    times = [
        cost.times(links[i][0] if i < len(links) else 0.0, links[i - 1][1] if i else 0.0)
        for i, cost in enumerate(costs)
    ]
    starts = [sum(costs[i].step_start_s for i in ranks.stages_of(r)) for r in range(num_ranks)]
    run = execute(lists, times, start_s=starts)
    tied = _tied_gradients_s(graph, cluster, plan)
    ends = [
        run.rank_end_s[r] + tied + sum(
            costs[i].step_end_s + costs[i].step_tp_s + costs[i].optimizer_s for i in ranks.stages_of(r)
        )
        for r in range(num_ranks)
    ]
    step = max(ends)
    critical = ends.index(step)
    breakdown = _breakdown(plan, ranks, costs, times, run, starts, step, critical, tied)
    groups = _groups(cluster, plan, ranks, costs, run, starts, ends)
    host = _host_bytes(ranks, costs)
    reason = _infeasible_reason(cluster, plan, groups) or _host_lacks(cluster, plan, host)
    flops = sum(cost.forward_flops * plan.stages[i].mesh.dp for i, cost in enumerate(costs))
    devices = [cluster.device(rank) for stage in plan.stages[:num_ranks] for rank in stage.devices]
    return Timeline(
        step_time_s=step, tokens_per_step=plan.global_batch * (plan.seq_len or 1), num_devices=len(devices),
        model_flops=3 * flops * plan.num_micro_batches, peak_flops=sum(device.peak(plan.dtype) for device in devices),
        bubble_fraction=breakdown.bubble / step, feasible=reason is None, infeasible_reason=reason,
        breakdown=breakdown, groups=groups, events=_events(ranks, costs, run, starts, ends),
        notes=(*_notes(graph, cluster, plan), *_host_notes(max(host))),
    )


def _check(graph: ModelGraph, cluster: Cluster, plan: Plan) -> None:
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
        if max(stage.devices) >= cluster.num_devices:
            raise PlanMismatchError(f"stage {i} uses rank {max(stage.devices)} of a cluster of {cluster.num_devices}")
        layers = sum(map(is_layer, graph.blocks[stage.first : stage.last]))
        if stage.variants and sum(count for _, count in stage.variants) != layers:
            raise PlanMismatchError(f"the variants of stage {i} are not counts of its {layers} layers")
        known = {(choice.axis, choice.cls) for choice in plan.shardings}
        for name, size in stage.mesh.inner:
            if any((name, block.cls) not in known for block in graph.blocks[stage.first : stage.last]):
                raise PlanMismatchError(f"stage {i} has a {name} axis of {size} but blocks without a sharding for it")
    if at != len(graph.blocks):
        raise PlanMismatchError(f"the plan covers {at} blocks, the model has {len(graph.blocks)}")
    if len(plan.stages) % (1 + max(stage.virtual for stage in plan.stages)):
        raise PlanMismatchError("every pipeline group needs the same number of chunks")


def _tied_gradients_s(graph: ModelGraph, cluster: Cluster, plan: Plan) -> float:
    """Seconds of summing, once a step, the gradients of parameters that several stages hold a copy of."""
    holders: dict[str, set[int]] = {}
    for i, stage in enumerate(plan.stages):
        for block in graph.blocks[stage.first : stage.last]:
            for name in block.params:
                holders.setdefault(name, set()).add(i)
    total = 0.0
    for name, stages in holders.items():
        if len(stages) > 1:
            ranks = tuple(dict.fromkeys(plan.stages[i].devices[0] for i in sorted(stages)))
            mesh = plan.stages[min(stages)].mesh
            size = GRADIENT_BYTES * graph.param[name].numel / (mesh.dp_shard if plan.stages[min(stages)].zero else 1)
            total += collective_time_s(
                Collective.ALL_REDUCE, size, cluster.group(ranks), groups_per_node=mesh.tp * mesh.dp_shard
            )
    return total


def _breakdown(
    plan: Plan, ranks: _Ranks, costs: Sequence[StageCost], times: Sequence[StageTimes], run: Execution,
    starts: Sequence[float], step: float, critical: int, tied: float,
) -> Breakdown:
    """Where the critical rank's time goes. Waiting that would vanish with free links counts as pp_comm."""
    m, own = plan.num_micro_batches, [costs[i] for i in ranks.stages_of(critical)]
    compute = m * sum(cost.forward_compute_s + cost.backward_compute_s for cost in own)
    tp_comm = sum(m * (cost.forward_tp_s + cost.backward_tp_s) + cost.step_tp_s for cost in own)
    dp_comm = tied + sum(
        m * (cost.forward_dp_s + cost.backward_dp_s) + cost.step_start_s + cost.step_end_s for cost in own
    )
    optimizer = sum(cost.optimizer_s for cost in own)
    idle = max(0.0, step - compute - tp_comm - dp_comm - optimizer)
    pp_comm = 0.0
    if idle > 0 and any(time.send_forward_s or time.send_backward_s for time in times):
        free = [replace(time, send_forward_s=0.0, send_backward_s=0.0) for time in times]
        without = execute(ranks.lists, free, start_s=starts).rank_end_s[critical]
        pp_comm = min(idle, max(0.0, run.rank_end_s[critical] - without))
    return Breakdown(
        compute=compute, tp_comm=tp_comm, dp_comm=dp_comm, pp_comm=pp_comm, bubble=idle - pp_comm, optimizer=optimizer
    )


def _groups(
    cluster: Cluster, plan: Plan, ranks: _Ranks, costs: Sequence[StageCost], run: Execution,
    starts: Sequence[float], ends: Sequence[float],
) -> tuple[GroupTimeline, ...]:
    activations = peak_activation_bytes(
        ranks.lists, [cost.held_bytes for cost in costs], [cost.extra_bytes for cost in costs]
    )
    groups = []
    for r in range(ranks.num_ranks):
        own = [costs[i] for i in ranks.stages_of(r)]
        devices = plan.stages[r].devices
        groups.append(GroupTimeline(
            stage=r, ranks=devices, types=tuple(cluster.device(rank).name for rank in devices),
            memory=MemoryBytes(
                parameters=sum(cost.static.parameters for cost in own),
                gradients=sum(cost.static.gradients for cost in own),
                optimizer=sum(cost.static.optimizer for cost in own),
                activations=activations[r],
                # Chunks take turns with their buffers. The optimizer step's temporaries come when activations are
                # gone: what exceeds those counts.
                buffers=max(cost.static.buffers for cost in own)
                + max(0.0, sum(cost.optimizer_step_bytes for cost in own) - activations[r]),
            ),
            start_s=run.starts[r][0] - starts[r] if run.starts[r] else 0.0, end_s=ends[r], busy_s=run.busy_s[r],
        ))
    return tuple(groups)


def _infeasible_reason(cluster: Cluster, plan: Plan, groups: Sequence[GroupTimeline]) -> str | None:
    """Why the plan does not fit, of the device that lacks the most; None where it fits."""
    worst: tuple[float, str] | None = None
    for group in groups:
        for rank in {cluster.node_of[rank]: rank for rank in group.ranks}.values():
            device = cluster.device(rank)
            lacking = group.memory.total - device.usable_memory_bytes
            if lacking > 0 and (worst is None or lacking > worst[0]):
                parts = {
                    "parameters": group.memory.parameters, "gradients": group.memory.gradients,
                    "optimizer state": group.memory.optimizer, "activations": group.memory.activations,
                    "buffers": group.memory.buffers,
                }
                most = max(parts, key=lambda name: parts[name])
                worst = lacking, (
                    f"rank {rank} ({device.name}, stage {group.stage}) needs {group.memory.total / GIB:.1f} GiB and "
                    f"has {device.usable_memory_bytes / GIB:.1f}; most of it is {most} ({parts[most] / GIB:.1f} GiB)"
                )
    return worst[1] if worst else None


def _events(
    ranks: _Ranks, costs: Sequence[StageCost], run: Execution, starts: Sequence[float], ends: Sequence[float]
) -> tuple[ActionEvent, ...]:
    events = []
    for r, actions in enumerate(ranks.lists):
        own = [costs[i] for i in ranks.stages_of(r)]
        optimizer = sum(cost.optimizer_s for cost in own)
        begin, end = starts[r], run.rank_end_s[r]
        if begin > 0:
            events.append(ActionEvent(group=r, kind="gather", stage=r, micro_batch=-1, start_s=0.0, end_s=begin))
        events += [
            ActionEvent(
                group=r, kind=str(action.kind), stage=action.stage, micro_batch=action.micro_batch, start_s=start,
                end_s=finish,
            )
            for action, start, finish in zip(actions, run.starts[r], run.ends[r], strict=True)
        ]
        last = ends[r] - optimizer
        if last > end:
            events.append(ActionEvent(group=r, kind="reduce", stage=r, micro_batch=-1, start_s=end, end_s=last))
        if optimizer > 0:
            events.append(ActionEvent(group=r, kind="optimizer", stage=r, micro_batch=-1, start_s=last, end_s=ends[r]))
    return tuple(events)


def _host_bytes(ranks: _Ranks, costs: Sequence[StageCost]) -> tuple[float, ...]:
    """The most bytes that each rank's device keeps in host memory."""
    activations = peak_activation_bytes(ranks.lists, [cost.host_bytes for cost in costs])
    return tuple(
        activations[rank] + sum(costs[i].host_state_bytes for i in ranks.stages_of(rank))
        for rank in range(ranks.num_ranks)
    )


def _host_lacks(cluster: Cluster, plan: Plan, host: Sequence[float]) -> str | None:
    """Why what is offloaded does not fit into host memory; None where it does, or where its size is unknown."""
    for size, stage in zip(host, plan.stages, strict=False):
        for rank in stage.devices:
            device = cluster.device(rank)
            if device.host_memory_bytes is not None and size > device.host_memory_bytes:
                return (
                    f"rank {rank} ({device.name}) keeps {size / GIB:.1f} GiB in host memory, and its share of that is "
                    f"{device.host_memory_bytes / GIB:.1f}"
                )
    return None


def _host_notes(size_bytes: float) -> tuple[str, ...]:
    """What offload takes of the host's memory."""
    if not size_bytes:
        return ()
    return (
        f"offload: up to {size_bytes / GIB:.3g} GiB of host memory for each device; copies at "
        f"{HOST_LINK_EFFICIENCY:g} of the host link's rate, each device by itself",
    )


def _notes(graph: ModelGraph, cluster: Cluster, plan: Plan) -> tuple[str, ...]:
    notes = []
    if any(stage.mesh.ep > 1 for stage in plan.stages):
        notes.append("ep not modelled: every rank counts all experts and no all-to-all; such a plan cannot run")
    unknown = sorted({op.target for cls in graph.classes for op in cls.ops if not is_known(op.target)})
    if unknown:
        notes.append(f"ops without a cost rule, counted by their bytes alone: {', '.join(unknown)}")
    types = {node.device.name: node.device for node in cluster.nodes}
    notes += [
        f"{device.name} has no {plan.dtype} rate: its products are counted at the float32 rate"
        for device in types.values() if plan.dtype not in dict(device.peak_flops)
    ]
    return tuple(notes)
