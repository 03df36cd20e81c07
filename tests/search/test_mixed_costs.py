"""What groups of unlike nodes are said to cost is never above what the simulator makes of them."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest
from test_mixed import GRAPH, unlike_nodes
from test_runs import bound_of, every_plan
from toy_graphs import cluster

from autopar.cluster.cluster import Cluster
from autopar.search.best_first import Engine
from autopar.search.mixed_costs import ClusterPools, MixedCosts, Setting
from autopar.search.mixed_plans import Part, mixed_plan
from autopar.search.plan_schedules import other_schedule
from autopar.search.planner import PlanRequest
from autopar.search.runs import RunStage, StageTimes
from autopar.simulate.simulator import simulate

NAMES = [own.name for own in fields(StageTimes)]


def with_memory(machine: Cluster, share: float) -> Cluster:
    """The same nodes with a share of their memory."""
    return replace(machine, nodes=tuple(
        replace(node, device=replace(node.device, memory_bytes=int(node.device.memory_bytes * share)))
        for node in machine.nodes
    ))


def three_kinds() -> Cluster:
    """A node of four slow devices between faster ones."""
    nodes = cluster(per_node=2, speeds=(0.4, 0.25, 1.0)).nodes
    return Cluster(name="three", nodes=tuple(
        replace(node, num_devices=number) for node, number in zip(nodes, (1, 4, 2), strict=True)
    ))


@pytest.mark.parametrize(("machine", "global_batch", "share"), [
    (unlike_nodes(), 16, 1.0), (unlike_nodes(), 16, 0.006), (unlike_nodes(bandwidth=2e8), 12, 0.01),
    (three_kinds(), 12, 1.0), (three_kinds(), 24, 0.005),
])
def test_no_bound_of_stages_is_above_their_simulated_step(machine: Cluster, global_batch: int, share: float) -> None:
    """Under 1F1B and with deeper warm-ups, with any of the settings that are said to be useful."""
    machine, draw, seen, deeper = with_memory(machine, share), random.Random(0), 0, 0
    engine, pools = Engine(GRAPH, machine, PlanRequest(global_batch=global_batch)), ClusterPools(machine)
    for count in (1, 2, 3, 4, 6, 12):
        costs = MixedCosts(engine, pools, count, ())
        plans = every_plan(costs)
        for stages in draw.sample(plans, min(25, len(plans))):
            parts = tuple(part for stage in stages for part in [drawn(costs, pools, stage, draw)] if part is not None)
            if len(parts) < len(stages):
                continue
            ways = [choice(costs, stage, part.setting) for stage, part in zip(stages, parts, strict=True)]
            bound = bound_of(costs, stages, ways)
            assert bound >= bound_of(costs, stages) * (1 - 1e-9)
            plan = mixed_plan(engine, costs, parts)
            lean = mixed_plan(engine, costs, parts, deeper=count)
            ordered = (other_schedule(GRAPH, machine, own, split_backward=False) for own in (plan, lean))
            for own in (plan, lean, *ordered):
                timeline = simulate(GRAPH, machine, own, detail=False) if own is not None else None
                if timeline is not None and timeline.feasible:
                    assert bound <= timeline.step_time_s * (1 + 1e-9)
                    seen, deeper = seen + 1, deeper + bool(own.actions)
    assert seen > 20 and deeper > 5, (seen, deeper)


def choice(costs: MixedCosts, stage: RunStage, setting: Setting) -> StageTimes:
    """One of the choices of a stage's group that takes no more than the setting at any time."""
    level, sort = stage.in_flight - 1, int(costs.ranges[stage.first, stage.last])
    whole = costs.times_of(stage.group, setting, math.inf)
    return next(
        own for own in costs.choices(stage.group, math.inf)
        if all(getattr(own, name)[level, sort] <= getattr(whole, name)[level, sort] for name in NAMES)
    )


def drawn(costs: MixedCosts, pools: ClusterPools, stage: RunStage, draw: random.Random) -> Part | None:
    """The stage under one of its useful settings; None where none fits."""
    pool, size = costs.groups[stage.group]
    found = costs.best_settings(stage.group, stage.in_flight, stage.first, stage.last)
    if not found:
        return None
    ranks = pools.ranks(pool, stage.start, size)
    return Part(stage.first, stage.last, draw.choice(found[:4]), ranks, stage.group)
