"""A plan beside itself with one choice changed for all stages: another boundary between blocks, another tensor axis."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.errors import AutoparError
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Mesh, Plan
from autopar.plan.verify import verify_plan
from autopar.search.candidates import divisors, node_size
from autopar.search.shardings import ShardingChooser
from autopar.simulate.simulator import simulate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPlan:
    """The plan with one choice changed, simulated; `step_time_s` is None where it does not fit or cannot be."""

    name: str
    step_time_s: float | None
    why_not: str = ""


def other_plans(graph: ModelGraph, cluster: Cluster, plan: Plan) -> tuple[OtherPlan, ...]:
    """The plan with and without sequence parallelism, and with a tensor axis of twice and of half the ranks.

    Cuts, schedule, recomputation and micro-batch stay; the data ranks become so many that every device is used.
    None where stages have different meshes.
    """
    meshes = {stage.mesh for stage in plan.stages}
    if len(meshes) != 1:
        return ()
    (mesh,) = meshes
    chooser = ShardingChooser(
        graph, cluster, plan.dtype, rows=plan.micro_batch, rewrites=plan.certificate is not None, compile=plan.compile
    )
    found = []
    for tp, sequence_parallel in _settings(mesh, plan, chooser):
        name = f"tp {tp}" + (", with sequence parallelism" if sequence_parallel else "")
        if tp == mesh.tp and not sequence_parallel:
            name += ", without sequence parallelism"
        if tp > node_size(cluster):
            found.append(OtherPlan(name=name, step_time_s=None, why_not="a node has fewer devices"))
            continue
        other = _resized(mesh, tp, plan.stages[0].zero)
        found.append(_simulated(graph, cluster, plan, other, sequence_parallel, chooser, name))
    return tuple(found)


def _settings(mesh: Mesh, plan: Plan, chooser: ShardingChooser) -> Iterator[tuple[int, bool]]:
    """(tp, sequence parallel) beside the plan's own."""
    if mesh.tp > 1 and chooser.has_hidden_states:
        yield mesh.tp, not plan.sequence_parallel
    for tp in (mesh.tp // 2, 2 * mesh.tp):
        if tp == 1:
            yield 1, False
        elif tp:
            yield tp, False
            if chooser.has_hidden_states:
                yield tp, True


def _resized(mesh: Mesh, tp: int, zero: int) -> Mesh | None:
    """The mesh with another tensor axis and data ranks that make up for it; None where they do not divide.

    Added data ranks share the states of a replica where ZeRO is on.
    """
    if tp == mesh.tp:
        return mesh
    if tp < mesh.tp:
        more = mesh.tp // tp
        if zero:
            return replace(mesh, tp=tp, dp_shard=mesh.dp_shard * more)
        return replace(mesh, tp=tp, dp_replicate=mesh.dp_replicate * more)
    fewer = tp // mesh.tp
    if mesh.dp_shard % fewer == 0:
        return replace(mesh, tp=tp, dp_shard=mesh.dp_shard // fewer)
    if mesh.dp_replicate % fewer == 0:
        return replace(mesh, tp=tp, dp_replicate=mesh.dp_replicate // fewer)
    return None


def _simulated(
    graph: ModelGraph, cluster: Cluster, plan: Plan, mesh: Mesh | None, sequence_parallel: bool,
    chooser: ShardingChooser, name: str,
) -> OtherPlan:
    """The better of both ways to weigh what weights cost."""
    if mesh is None:
        return OtherPlan(name=name, step_time_s=None, why_not="there are too few data ranks to give up")
    if plan.global_batch % mesh.dp:
        return OtherPlan(name=name, step_time_s=None, why_not=f"{mesh.dp} data ranks do not divide the batch")
    rows = plan.global_batch // mesh.dp
    micro_batch = max(size for size in divisors(rows) if size <= plan.micro_batch)
    best: float | None = None
    why = "no block allows it"
    for split_weights in (True, False) if mesh.tp > 1 else (True,):
        choice = chooser.choose(mesh.tp, sequence_parallel=sequence_parallel, split_weights=split_weights, cp=mesh.cp)
        if choice is None:
            continue
        stages = tuple(
            replace(stage, mesh=mesh, zero=stage.zero if mesh.dp_shard * mesh.cp > 1 else 0, peak_memory_bytes=None,
                    memory_limit_bytes=None)
            for stage in plan.stages
        )
        other = replace(
            plan, stages=stages, micro_batch=micro_batch, num_micro_batches=rows // micro_batch,
            sequence_parallel=sequence_parallel, certificate=None, rewrites=choice.rewrites,
            shardings=chooser.shardings(
                mesh.tp, micro_batch, sequence_parallel=sequence_parallel, split_weights=split_weights, cp=mesh.cp
            ),
        )
        try:
            verify_plan(other, graph, cluster)
            timeline = simulate(graph, cluster, other, detail=False)
        except AutoparError as error:
            log.info("%s: %s", name, error)
            why = str(error).splitlines()[0]
            continue
        if not timeline.feasible:
            why = "does not fit into memory with the same recomputation"
        elif best is None or timeline.step_time_s < best:
            best = timeline.step_time_s
    return OtherPlan(name=name, step_time_s=best, why_not="" if best is not None else why)
