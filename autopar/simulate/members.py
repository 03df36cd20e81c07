"""The kinds of devices that run one stage: those of one type with as many rows have the same time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cluster.cluster import Cluster, DeviceType
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Stage
from autopar.simulate.events import StageTimes
from autopar.simulate.stage_cost import StageCost, stage_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Devices of a stage that are alike."""

    device: DeviceType
    rows: float  # of a micro-batch, on each of them
    lanes: tuple[int, ...]  # their places in `stage.devices`


def stage_members(cluster: Cluster, plan: Plan, stage: Stage) -> tuple[Member, ...]:
    """The kinds of devices of a stage, in the order of their first device."""
    found: dict[tuple[str, float], list[int]] = {}
    rows, inner = plan.rows_of(stage), stage.mesh.cp * stage.mesh.tp
    if cluster.is_uniform and min(rows) == max(rows):
        lanes = tuple(range(len(stage.devices)))
        return (Member(device=cluster.device(stage.devices[0]), rows=float(rows[0]), lanes=lanes),)
    for lane, rank in enumerate(stage.devices):
        found.setdefault((cluster.device(rank).name, float(rows[lane // inner])), []).append(lane)
    return tuple(
        Member(device=cluster.device(stage.devices[lanes[0]]), rows=number, lanes=tuple(lanes))
        for (_, number), lanes in found.items()
    )


def member_costs(
    graph: ModelGraph, cluster: Cluster, plan: Plan, index: int, *, as_megatron: bool = False,
    recomputes_all: bool = False,
) -> dict[Member, StageCost]:
    """What `plan.stages[index]` costs each kind of its devices."""
    return {
        member: stage_cost(
            graph, cluster, plan, index, device=member.device, rows=member.rows, as_megatron=as_megatron,
            recomputes_all=recomputes_all,
        )
        for member in stage_members(cluster, plan, plan.stages[index])
    }


def slowest_times(costs: Sequence[StageCost], send_forward_s: float, send_backward_s: float) -> StageTimes:
    """A stage's times: its devices wait for one another, so each part takes as long as on the slowest."""
    return StageTimes(
        forward_s=max(cost.forward_s for cost in costs), backward_s=max(cost.backward_s for cost in costs),
        input_backward_s=max(cost.backward_s - cost.weight_backward_s for cost in costs),
        weight_backward_s=max(cost.weight_backward_s for cost in costs),
        send_forward_s=send_forward_s, send_backward_s=send_backward_s,
        gather_s=max(cost.step_start_s for cost in costs), reduce_s=max(cost.step_end_s for cost in costs),
    )
