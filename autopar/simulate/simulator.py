"""simulate: a plan on a cluster, as a Timeline with every device's time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.memory import GRADIENT_BYTES
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Schedule
from autopar.sharding.reshard import Collective
from autopar.sharding.rewrites import rewritten
from autopar.simulate.events import Execution, StageTimes, activation_steps, execute, peak_activation_bytes
from autopar.simulate.feasibility import (
    check_plan,
    host_lacks,
    host_notes,
    infeasible_reason,
    megatron_notes,
    model_notes,
    recompute_notes,
)
from autopar.simulate.links import link_times
from autopar.simulate.members import Member, member_costs, slowest_times
from autopar.simulate.one_f_one_b import QuickRun, run_one_f_one_b
from autopar.simulate.schedules import plan_actions
from autopar.simulate.single_memory import single_backwards, single_memory
from autopar.simulate.splitting import as_run
from autopar.simulate.stage_cost import StageCost
from autopar.simulate.timeline import ActionEvent, Breakdown, GroupTimeline, MemoryBytes, Timeline, drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Devices of one pipeline rank that are alike, and what each of the rank's stages costs them."""

    rank: int  # of the pipeline
    devices: tuple[int, ...]
    costs: dict[int, StageCost]  # by stage


def simulate(
    graph: ModelGraph, cluster: Cluster, plan: Plan, *, detail: bool = True, as_system: bool = False,
    max_events: int | None = None,
) -> Timeline:
    """The step that a plan takes. InputError for a plan that its graph or cluster cannot hold.

    Each kind of device of a stage is timed by itself, and the stage takes as long as the slowest of them; the
    schedule's action lists are then executed exactly. Without `detail` the timeline has no events and no memory over
    time, and what waits for links counts as bubble, for searches that want its other figures alone. `as_system`: what
    training systems make of these degrees instead of this trainer: all memory that there is may be used, and on GPUs
    Megatron's ways are counted (`autopar.simulate.async_products`) where there are stages or a tensor axis, and
    parameters are whole. `max_events`: where there are more, those of most groups are left out (`drawn`).
    """
    graph = rewritten(graph, plan.rewrites)
    check_plan(graph, cluster, plan)
    lists = None if not detail and _is_plain(plan) else as_run(graph, plan, plan_actions(plan))
    on_cpu = cluster.device(plan.stages[0].devices[0]).name.startswith("CPU")
    whole = as_system and not on_cpu and all(stage.zero < 3 for stage in plan.stages)  # parameters
    as_megatron = whole and (plan.num_stages > 1 or plan.stages[0].mesh.tp > 1)
    costs, times = pipeline_times(graph, cluster, plan, as_megatron=as_megatron, recomputes_all=whole)
    run = run_one_f_one_b(times, plan.num_micro_batches) if lists is None else execute(lists, times)
    tied = _tied_sums(graph, cluster, plan)
    reduced = _reduced(run.rank_end_s, costs, tied)
    groups = _groups(plan, costs, len(run.rank_end_s))
    ends = [reduced[group.rank] + sum(cost.optimizer_s for cost in group.costs.values()) for group in groups]
    step = max(ends)
    busy = [_busy_s(plan, group, tied) for group in groups]
    critical = busy.index(max(busy))
    without_s = None
    if lists is not None and detail and any(time.send_forward_s or time.send_backward_s for time in times):
        free = [replace(time, send_forward_s=0.0, send_backward_s=0.0) for time in times]
        quick = run_one_f_one_b(free, plan.num_micro_batches) if _is_plain(plan) else execute(lists, free)
        without_s = max(_reduced(quick.rank_end_s, costs, tied))
    breakdown = _breakdown(plan, groups[critical], max(reduced), without_s, step, tied)
    peaks = _peaks(run, groups)
    keeps_gradients = as_system and any(stage.zero < 3 for stage in plan.stages)
    shown = drawn(len(groups), critical, 2 * plan.num_stages * plan.num_micro_batches, max_events) if detail else set()
    timelines = tuple(
        _group_timeline(
            cluster, plan, group, run, peak, reduced[group.rank], end, detail=i in shown, all_at_once=keeps_gradients
        )
        for i, (group, peak, end) in enumerate(zip(groups, peaks, ends, strict=True))
    )
    host = _host_bytes(run, groups)
    reason = infeasible_reason(cluster, timelines, leaves_room=not as_system)
    reason = reason or host_lacks(cluster, [g.devices for g in groups], host)
    kinds = [(cluster.device(group.devices[0]), len(group.devices)) for group in groups]  # a group's are alike
    flops = sum(
        cost.forward_flops * len(member.lanes) / (plan.stages[i].mesh.cp * plan.stages[i].mesh.tp)
        for i, own in enumerate(costs) for member, cost in own.items()
    )
    return Timeline(
        step_time_s=step, tokens_per_step=plan.global_batch * (plan.seq_len or 1),
        num_devices=sum(number for _, number in kinds), model_flops=3 * flops * plan.num_micro_batches,
        peak_flops=sum(number * device.peak(plan.dtype) for device, number in kinds),
        bubble_fraction=breakdown.bubble / step, feasible=reason is None, infeasible_reason=reason,
        breakdown=breakdown, groups=timelines, critical=critical,
        events=tuple(
            event for i, group in enumerate(groups) if i in shown for event in _events(i, group, run, reduced, ends[i])
        ) if detail and isinstance(run, Execution) else (),
        notes=(
            *model_notes(graph, cluster, plan), *(megatron_notes(plan) if as_megatron else ()),
            *(recompute_notes(plan) if whole else ()), *host_notes(max(host)),
        ),
    )


def _is_plain(plan: Plan) -> bool:
    """Whether it runs 1F1B as it is, in steps of several micro-batches."""
    return (
        plan.schedule is Schedule.ONE_F_ONE_B and not plan.actions and plan.num_micro_batches > 1
        and not any(stage.virtual for stage in plan.stages)
    )


def pipeline_times(
    graph: ModelGraph, cluster: Cluster, plan: Plan, *, as_megatron: bool = False, recomputes_all: bool = False,
) -> tuple[list[dict[Member, StageCost]], list[StageTimes]]:
    """Of each stage what it costs each kind of its devices, and its times; `graph` is as the plan rewrites it."""
    costs = [
        member_costs(graph, cluster, plan, i, as_megatron=as_megatron, recomputes_all=recomputes_all)
        for i in range(plan.num_stages)
    ]
    links = [link_times(graph, cluster, plan, i) for i in range(plan.num_stages - 1)]
    times = [
        slowest_times(list(own.values()), links[i][0] if i < len(links) else 0.0, links[i - 1][1] if i else 0.0)
        for i, own in enumerate(costs)
    ]
    return costs, times


def _groups(plan: Plan, costs: Sequence[Mapping[Member, StageCost]], num_ranks: int) -> tuple[_Group, ...]:
    """The kinds of devices of each pipeline rank; chunks of one rank have one layout, so that their kinds agree."""
    found = []
    for rank in range(num_ranks):
        for k, member in enumerate(costs[rank]):
            own = {i: list(costs[i].values())[k] for i in range(rank, plan.num_stages, num_ranks)}
            devices = plan.stages[rank].devices
            if len(member.lanes) < len(devices):
                devices = tuple(devices[lane] for lane in member.lanes)
            found.append(_Group(rank=rank, devices=devices, costs=own))
    return tuple(found)


TiedSum = tuple[tuple[int, ...], float]  # the stages that hold a copy, seconds


def _tied_sums(graph: ModelGraph, cluster: Cluster, plan: Plan) -> tuple[TiedSum, ...]:
    """The sums, once a step, of the gradients of parameters that several stages hold a copy of, by those stages."""
    holders: dict[str, set[int]] = {}
    for i, stage in enumerate(plan.stages):
        for block in graph.blocks[stage.first : stage.last]:
            for name in block.params:
                holders.setdefault(name, set()).add(i)
    found: dict[tuple[int, ...], float] = {}
    for name, holding in holders.items():
        stages = tuple(sorted(holding))
        if len(stages) > 1:
            first = plan.stages[stages[0]]
            ranks = tuple(dict.fromkeys(plan.stages[i].devices[0] for i in stages))
            size = GRADIENT_BYTES * graph.param[name].numel / (first.mesh.dp_shard if first.zero else 1)
            time_s = collective_time_s(
                Collective.ALL_REDUCE, size, cluster.group(ranks), groups_per_node=first.mesh.tp * first.mesh.dp_shard
            )
            found[stages] = found.get(stages, 0.0) + time_s
    return tuple(sorted(found.items()))


def _reduced(
    rank_end_s: Sequence[float], costs: Sequence[Mapping[Member, StageCost]], tied: Sequence[TiedSum]
) -> list[float]:
    """When each pipeline rank has all its gradients: sums over the tensor axis, then over stages, which wait."""
    num_ranks = len(rank_end_s)
    ends = [
        end + sum(max(cost.step_tp_s for cost in own.values()) for own in costs[rank::num_ranks])
        for rank, end in enumerate(rank_end_s)
    ]
    for stages, time_s in tied:
        ranks = {stage % num_ranks for stage in stages}
        together = max(ends[rank] for rank in ranks) + time_s
        for rank in ranks:
            ends[rank] = together
    return ends


def _busy_s(plan: Plan, group: _Group, tied: Sequence[TiedSum]) -> float:
    """Seconds of a step in which a device computes or takes part in its own stages' communication."""
    m = plan.num_micro_batches
    work = sum(m * (cost.forward_s + cost.backward_s) + cost.step_once_s for cost in group.costs.values())
    return work + _tied_s(group, tied)


def _tied_s(group: _Group, tied: Sequence[TiedSum]) -> float:
    return sum(time_s for stages, time_s in tied if not set(stages).isdisjoint(group.costs))


def _breakdown(
    plan: Plan, group: _Group, reduced_s: float, without_s: float | None, step: float, tied: Sequence[TiedSum]
) -> Breakdown:
    """Where the step goes on the devices that work longest. Waiting that would vanish with free links is pp_comm.

    `reduced_s`: when all gradients are there; `without_s`: the same with free links, None where that is not known.
    """
    m, own = plan.num_micro_batches, group.costs.values()
    compute = m * sum(cost.forward_compute_s + cost.backward_compute_s for cost in own)
    tp_comm = sum(m * (cost.forward_tp_s + cost.backward_tp_s) + cost.step_tp_s for cost in own)
    dp_comm = _tied_s(group, tied) + sum(
        m * (cost.forward_dp_s + cost.backward_dp_s) + cost.step_start_s + cost.step_end_s for cost in own
    )
    optimizer = sum(cost.optimizer_s for cost in own)
    # Collectives of one chunk may hide behind another's work: then what is counted here is more than the step.
    hidden = compute + tp_comm + dp_comm + optimizer - step
    dp_comm -= hidden if hidden > 1e-9 * step else 0.0  # less is rounding
    idle = step - compute - tp_comm - dp_comm - optimizer
    idle = idle if idle > 1e-9 * step else 0.0  # what is left by rounding is no waiting
    pp_comm = 0.0 if without_s is None else min(idle, max(0.0, reduced_s - without_s))
    return Breakdown(
        compute=compute, tp_comm=tp_comm, dp_comm=dp_comm, pp_comm=pp_comm, bubble=idle - pp_comm, optimizer=optimizer
    )


def _by_stage(group: _Group, num_stages: int, name: str) -> list[float]:
    """One figure of a group's stages, 0 for those that it does not run."""
    return [getattr(group.costs[i], name) if i in group.costs else 0.0 for i in range(num_stages)]


def _num_stages(groups: Sequence[_Group]) -> int:
    return 1 + max(stage for group in groups for stage in group.costs)


def _peaks(run: Execution | QuickRun, groups: Sequence[_Group]) -> list[float]:
    """The most bytes of activations that a device of each group holds."""
    if isinstance(run, QuickRun):
        return [
            run.peak_bytes(group.rank, sum(cost.held_bytes for cost in group.costs.values()),
                           sum(cost.extra_bytes for cost in group.costs.values()))
            for group in groups
        ]
    n = _num_stages(groups)
    return [
        peak_activation_bytes(
            [run.lists[group.rank]], _by_stage(group, n, "held_bytes"), _by_stage(group, n, "extra_bytes")
        )[0]
        for group in groups
    ]


def _host_bytes(run: Execution | QuickRun, groups: Sequence[_Group]) -> list[float]:
    """The most bytes that a device of each group keeps in host memory."""
    n = _num_stages(groups)
    return [
        (
            run.peak_bytes(group.rank, sum(cost.host_bytes for cost in group.costs.values()), 0.0)
            if isinstance(run, QuickRun) else
            peak_activation_bytes([run.lists[group.rank]], _by_stage(group, n, "host_bytes"))[0]
        ) + sum(cost.host_state_bytes for cost in group.costs.values())
        for group in groups
    ]


def _group_timeline(
    cluster: Cluster, plan: Plan, group: _Group, run: Execution | QuickRun, activations: float, reduced: float,
    end: float, *, detail: bool, all_at_once: bool,
) -> GroupTimeline:
    """One group's memory and times; `all_at_once`: gradients are there from the step's beginning on."""
    own, devices = list(group.costs.values()), group.devices
    if isinstance(run, QuickRun):
        start_s = run.start_s[group.rank]
    else:
        start_s = run.starts[group.rank][0] if run.starts[group.rank] else 0.0
    # In steps of several micro-batches there are none, and a quick run is one.
    singles = {} if all_at_once or isinstance(run, QuickRun) else single_backwards(run, group.rank, group.costs)
    if singles and isinstance(run, Execution):
        stepping = sum(cost.optimizer_step_bytes for cost in own)
        memory, over_time = single_memory(run, group.rank, singles, stepping, reduced)
        return GroupTimeline(
            stage=group.rank, ranks=devices, types=(cluster.device(devices[0]).name,) * len(devices), memory=memory,
            start_s=start_s, end_s=end,
            memory_steps=(*over_time, (end, over_time[0][1])) if detail else (),
            busy_s=sum(cost.forward_s + cost.backward_s for cost in own),
        )
    # Chunks take turns with their buffers. Reductions at the end of the step and the optimizer's temporaries come when
    # most activations are gone: what exceeds those counts.
    stepping = max(sum(cost.optimizer_step_bytes for cost in own), *(cost.step_end_bytes for cost in own))
    buffers = max(cost.static.buffers for cost in own)
    memory = MemoryBytes(
        parameters=sum(cost.static.parameters for cost in own), gradients=sum(cost.static.gradients for cost in own),
        optimizer=sum(cost.static.optimizer for cost in own), activations=activations,
        buffers=buffers + max(0.0, stepping - activations),
    )
    steps: tuple[tuple[float, float], ...] = ()
    if detail and isinstance(run, Execution):
        n = 1 + max(group.costs)
        always = memory.parameters + memory.gradients + memory.optimizer + buffers
        found = activation_steps(
            run, group.rank, _by_stage(group, n, "held_bytes"), _by_stage(group, n, "extra_bytes")
        )
        found += [(reduced, stepping), (end, 0.0)] if stepping > 0 else []
        steps = tuple((time, always + size) for time, size in found)
    return GroupTimeline(
        stage=group.rank, ranks=devices, types=(cluster.device(devices[0]).name,) * len(devices), memory=memory,
        start_s=start_s, end_s=end, memory_steps=steps,
        busy_s=plan.num_micro_batches * sum(cost.forward_s + cost.backward_s for cost in own),
    )


def _events(
    index: int, group: _Group, run: Execution, reduced: Sequence[float], end_s: float
) -> list[ActionEvent]:
    """Everything that one device of a group does in a step."""
    rank = group.rank

    def event(kind: str, stage: int, micro_batch: int, start: float, end: float) -> ActionEvent:
        return ActionEvent(
            group=index, kind=kind, stage=stage, micro_batch=micro_batch, start_s=start, end_s=end
        )

    spans = {
        (kind, stage): span for stage, cost in group.costs.items() for kind, span in (
            ("F", cost.forward_s), ("B", cost.backward_s), ("I", cost.backward_s - cost.weight_backward_s),
            ("W", cost.weight_backward_s),
        )
    }
    kinds = {"UNSHARD": "gather", "REDUCE_GRAD": "reduce"}
    found = [
        event(kinds[str(action.kind)], action.stage, -1, start, end) for action, start, end in run.collectives[rank]
    ]
    # A device that is faster than its stage's slowest begins with it and waits for it at the end.
    found += [
        event(str(action.kind), action.stage, action.micro_batch, start,
              min(end, start + spans[str(action.kind), action.stage]))
        for action, start, end in zip(run.lists[rank], run.starts[rank], run.ends[rank], strict=True)
    ]
    found += [
        event(str(action.kind), action.stage, action.micro_batch, start, end)
        for action, start, end in run.messages(rank)
    ]
    if reduced[rank] > run.rank_end_s[rank]:
        found.append(event("reduce", rank, -1, run.rank_end_s[rank], reduced[rank]))
    if end_s > reduced[rank]:
        found.append(event("optimizer", rank, -1, reduced[rank], end_s))
    return found
