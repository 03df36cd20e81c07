"""How much of a plan's model the sharding rules cover."""

from __future__ import annotations

from collections import Counter

from autopar.cluster.cluster import Cluster
from autopar.graph.model_graph import ModelGraph
from autopar.plan.coverage import Coverage, TargetShare
from autopar.plan.plan import Plan
from autopar.search.shardings import slowest_device, tp_group
from autopar.sharding.rewrites import rewritten
from autopar.sharding.rules import has_rule
from autopar.simulate.class_costs import ClassCosts


def plan_coverage(graph: ModelGraph, cluster: Cluster, plan: Plan) -> Coverage:
    """The coverage of the ops of the chain's blocks, timed on the slowest device of the cluster.

    The parameter-free ops of `graph.shared` (masks, positions) are left out: every stage computes them whole.
    """
    graph = rewritten(graph, plan.rewrites)
    tp = max(stage.mesh.tp for stage in plan.stages)
    device, group = slowest_device(cluster), tp_group(cluster, tp) if tp > 1 else None
    rows = plan.micro_batch if graph.rows_are_tagged else graph.rows
    num_ops = num_ruled = num_repeated = 0
    lacking: dict[str, float] = {}  # seconds by target
    repeated: dict[str, float] = {}
    total = 0.0
    for name, num_blocks in Counter(block.cls for block in graph.blocks).items():
        cls, choice = graph.block_class[name], plan.sharding.get(name)
        costs = ClassCosts(graph, cls, tp=tp, rows=rows, device=device, tp_group=group, dtype=plan.dtype)
        for op in cls.ops:
            strategy = choice.strategy[op.name] if choice is not None and tp > 1 else None
            time = costs.op_time(op, strategy)
            time_s = num_blocks * (time.forward_s + time.backward_s)
            total += time_s
            num_ops += 1
            if not has_rule(op.target):
                lacking[op.target] = lacking.get(op.target, 0.0) + time_s
                continue
            num_ruled += 1
            if strategy is not None and not strategy.factor and time_s:
                num_repeated += 1
                repeated[op.target] = repeated.get(op.target, 0.0) + time_s
    return Coverage(
        num_ops=num_ops, num_ruled=num_ruled, tp=tp, num_repeated=num_repeated,
        without_rule=_shares(lacking, total), repeated=_shares(repeated, total),
    )


def _shares(seconds: dict[str, float], total: float) -> tuple[TargetShare, ...]:
    """The targets with their shares of the total, the largest first, then by name."""
    ordered = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    return tuple(TargetShare(target, time_s / total if total else 0.0) for target, time_s in ordered)
