"""Other orders of a plan's micro-batches: warm-ups as deep as memory lets, and weights' gradients put off."""

from __future__ import annotations

import math
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.graph.model_graph import ModelGraph
from autopar.plan.actions import actions_to_csv
from autopar.plan.plan import Plan, Schedule
from autopar.search.schedule_search import search_schedule
from autopar.sharding.rewrites import rewritten
from autopar.simulate.simulator import pipeline_times
from autopar.simulate.splitting import unsplit_reason

MAX_ACTIONS = 20_000  # of a plan with an order of its own, all ranks together
MAX_LISTED = 600  # actions up to which list schedules are tried


def other_schedule(graph: ModelGraph, cluster: Cluster, plan: Plan, *, split_backward: bool = True) -> Plan | None:
    """The plan in the quickest order found for the times of its stages, None where 1F1B is that.

    Memory is held with what its layers keep; what the plan then takes, the simulator says. `split_backward` allows
    orders that put off gradients of weights, where every stage can.
    """
    count = plan.num_stages * plan.num_micro_batches
    if plan.num_stages == 1 or any(stage.virtual for stage in plan.stages) or 3 * count > MAX_ACTIONS:
        return None
    graph = rewritten(graph, plan.rewrites)
    costs, times = pipeline_times(graph, cluster, plan)
    caps, ends = [], []
    for own in costs:
        rooms = [
            (member.device.usable_memory_bytes - cost.static.total - cost.extra_bytes, cost.held_bytes)
            for member, cost in own.items()
        ]
        most = min((room / held if held > 0 else math.inf) for room, held in rooms)
        caps.append(int(max(1, min(most, plan.num_micro_batches))))
        ends.append(max(cost.step_tp_s + cost.optimizer_s for cost in own.values()))
    split = split_backward and not any(unsplit_reason(graph, plan, stage) for stage in plan.stages)
    found = search_schedule(
        times, plan.num_micro_batches, caps, split_backward=split, end_s=ends, exact=False,
        listed=2 * count <= MAX_LISTED,
    )
    if found.name == "1f1b":
        return None
    if found.name == "zb":
        return replace(plan, schedule=Schedule.ZERO_BUBBLE)
    return replace(plan, actions=tuple(actions_to_csv(found.lists).splitlines()))
