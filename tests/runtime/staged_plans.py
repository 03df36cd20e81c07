"""Plans whose stages are laid out one by one, for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from local_machines import slow_cluster

from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.strategy import ClassSharding

ONE = Mesh()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One stage: how many blocks, on which mesh, with which rows of a micro-batch on its data ranks (() if equal)."""

    blocks: int
    mesh: Mesh = ONE
    zero: int = 0
    rows: tuple[int, ...] = ()
    recompute: Recompute = Recompute.NONE
    sequence_parallel: bool = False


_SHARDINGS: dict[tuple[int, int, int, int, bool], tuple[ClassSharding, ...]] = {}


def shardings_of(graph: ModelGraph, mesh: Mesh, rows: int, *, sequence_parallel: bool) -> tuple[ClassSharding, ...]:
    """Shardings of all classes on the inner axes of a mesh, as a plan with `rows` rows holds them."""
    key = (id(graph), mesh.cp, mesh.tp, rows, sequence_parallel)
    if key not in _SHARDINGS:
        wanted = Degrees(
            global_batch=rows, micro_batch=rows, cp=mesh.cp, tp=mesh.tp, dtype="float64", param_dtype="float64",
            optimizer="sgd", sequence_parallel=sequence_parallel,
        )
        _SHARDINGS[key] = plan_from_degrees(graph, slow_cluster(mesh.cp * mesh.tp), wanted).shardings
    return _SHARDINGS[key]


def staged_plan(
    graph: ModelGraph, layouts: list[Layout], *, global_batch: int = 8, num_micro_batches: int = 2,
    schedule: Schedule = Schedule.ONE_F_ONE_B, num_chunks: int = 1, actions: tuple[str, ...] = (),
) -> Plan:
    """A plan with these stages, on ranks in order. With chunks, only the first of them take new ranks."""
    whole = global_batch // num_micro_batches
    first = layouts[0]
    micro_batch = whole // first.mesh.dp if not first.rows else max(first.rows)
    groups = len(layouts) // num_chunks
    stages: list[Stage] = []
    at = rank = 0
    for index, layout in enumerate(layouts):
        mesh = layout.mesh
        if index < groups:
            devices, rank = tuple(range(rank, rank + mesh.size)), rank + mesh.size
        else:
            devices = stages[index % groups].devices
        rows = layout.rows or (whole // mesh.dp,) * mesh.dp
        own = ()
        if mesh.inner:
            own = shardings_of(graph, mesh, micro_batch, sequence_parallel=layout.sequence_parallel)
        stages.append(Stage(
            first=at, last=at + layout.blocks, devices=devices, mesh=mesh, zero=layout.zero,
            recompute=layout.recompute, virtual=index // groups, shardings=own,
            rows=() if rows == (micro_batch,) * mesh.dp else rows,
        ))
        at += layout.blocks
    assert at == len(graph.blocks)
    cluster = slow_cluster(rank)
    base = plan_from_degrees(graph, cluster, Degrees(
        global_batch=rank * micro_batch, micro_batch=micro_batch, dp_replicate=rank, dtype="float64",
        param_dtype="float64", optimizer="sgd",
    ))
    return replace(
        base, global_batch=global_batch, num_micro_batches=num_micro_batches, schedule=schedule, actions=actions,
        stages=tuple(stages), sequence_parallel=any(layout.sequence_parallel for layout in layouts),
    )
