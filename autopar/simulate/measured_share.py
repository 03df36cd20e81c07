"""How much of a plan's compute time was measured, op by op."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cluster.cluster import Cluster
from autopar.cost_models.measured import Source
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.simulate.members import stage_members
from autopar.simulate.stage_cost import class_costs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredShare:
    """Shares of the ops' predicted seconds, forward and backward, on the first device of each stage; together 1."""

    exact: float
    interpolated: float
    modelled: float

    def __str__(self) -> str:
        return (
            f"of the ops' time {self.exact:.0%} was measured at these sizes, {self.interpolated:.0%} lies between "
            f"measured sizes, {self.modelled:.0%} comes from the efficiency curves"
        )


def measured_share(graph: ModelGraph, cluster: Cluster, plan: Plan) -> MeasuredShare | None:
    """Where the compute time of `simulate` comes from; None where no op was measured.

    `graph` has the plan's rewrites already.
    """
    if all(node.device.measured is None for node in cluster.nodes):
        return None
    seconds = dict.fromkeys(Source, 0.0)
    for stage in plan.stages:
        member = stage_members(cluster, plan, stage)[0]
        known: dict[str, dict[Source, float]] = {}
        for block in graph.blocks[stage.first : stage.last]:
            if block.cls not in known:
                costs = class_costs_of(
                    graph, graph.block_class[block.cls], cluster, plan, stage, device=member.device, rows=member.rows
                )
                own = known[block.cls] = dict.fromkeys(Source, 0.0)
                shardings = plan.class_shardings(block.cls, stage) if len(costs.axes) else ()
                for op in costs.cls.ops:
                    strategy = tuple(item.strategy[op.name] for item in shardings) or None
                    time = costs.op_time(op, strategy)
                    own[costs.source(op, strategy)] += time.forward_s + time.backward_s
            for source, taken in known[block.cls].items():
                seconds[source] += taken
    total = sum(seconds.values())
    if not total:
        return None
    return MeasuredShare(
        exact=seconds[Source.EXACT] / total, interpolated=seconds[Source.INTERPOLATED] / total,
        modelled=seconds[Source.MODELLED] / total,
    )
