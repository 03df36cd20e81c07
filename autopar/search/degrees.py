"""A plan from degrees that the user chose, laid out as Megatron does: nothing is searched but the shardings of ops."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from autopar.cluster.cluster import Cluster
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.errors import InputError
from autopar.graph.expert_params import unsplit_experts
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage, Variant, is_layer
from autopar.search.shardings import ShardingChooser


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """What `simulate` lets a user set. `schedule` None: interleaved with virtual stages, else 1f1b."""

    global_batch: int
    seq_len: int | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    optimizer: str = "adamw"
    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    cp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    zero: int = 0
    micro_batch: int = 1
    recompute: Recompute = Recompute.NONE
    offload_activations: bool = False
    offload_optimizer: bool = False
    schedule: Schedule | None = None
    sequence_parallel: bool = False
    compile: bool = False


def plan_from_degrees(
    graph: ModelGraph, cluster: Cluster, degrees: Degrees, *, chooser: ShardingChooser | None = None
) -> Plan:
    """The plan with these degrees; layers are dealt out evenly, the first stages take what is left over.

    InputError where the degrees don't make the cluster's devices or don't divide the batch. Nothing is checked against
    memory: the simulator says what fits. A tensor axis splits the layers even where repeating them would be faster;
    the plan's notes say so, and say where nothing can be split.
    """
    notes: list[str] = []
    d = degrees
    replicate, num_shards = d.dp_replicate, d.dp_shard
    if d.zero == 0 and num_shards > 1:
        notes.append(f"zero 0 keeps whole replicas: dp_shard {num_shards} is counted as dp_replicate")
        replicate, num_shards = replicate * num_shards, 1
    mesh = Mesh(dp_replicate=replicate, dp_shard=num_shards, tp=d.tp, cp=d.cp, ep=d.ep)
    num_micro_batches = _check(graph, cluster, d, mesh)
    schedule = d.schedule or (Schedule.INTERLEAVED if d.virtual_stages > 1 else Schedule.ONE_F_ONE_B)
    if d.virtual_stages > 1 and schedule is not Schedule.INTERLEAVED:
        raise InputError(f"virtual stages need the interleaved schedule, not {schedule}; leave --schedule out")
    chooser = chooser or ShardingChooser(graph, cluster, d.dtype, rows=d.micro_batch)
    sequence_parallel = d.sequence_parallel and d.tp > 1
    choice = chooser.choose(d.tp, sequence_parallel=sequence_parallel, split_products=True, cp=d.cp)
    if choice is None and d.cp > 1:
        raise InputError(
            f"context parallel over cp {d.cp} (and tp {d.tp}) does not divide what passes between the blocks of "
            f"{graph.name}; choose another cp, tp or sequence length"
        )
    if choice is None:
        raise InputError(
            f"sequence parallel over tp {d.tp} does not divide what passes between the blocks of {graph.name}; "
            f"choose another tp or sequence length, or leave --sequence-parallel out"
        )
    shardings = chooser.shardings(
        d.tp, d.micro_batch, sequence_parallel=sequence_parallel, split_products=True, cp=d.cp
    )
    cuts = even_cuts(graph, d.pp * d.virtual_stages)
    stages = tuple(
        Stage(
            first=first, last=last, devices=stage_devices(index % d.pp, mesh.size), mesh=mesh, zero=d.zero,
            recompute=d.recompute, virtual=index // d.pp, offload_optimizer=d.offload_optimizer,
        ).with_variants(
            [Variant(recompute=d.recompute, offload=d.offload_activations)]
            * sum(is_layer(block.name) for block in graph.blocks[first:last])
        )
        for index, (first, last) in enumerate(pairwise(cuts))
    )
    return Plan(
        model_name=graph.name, model_fingerprint=model_fingerprint(graph), cluster_name=cluster.name,
        cluster_fingerprint=cluster_fingerprint(cluster), num_devices=cluster.num_devices,
        global_batch=d.global_batch, seq_len=d.seq_len, dtype=d.dtype, param_dtype=d.param_dtype,
        optimizer=d.optimizer, micro_batch=d.micro_batch, num_micro_batches=num_micro_batches, schedule=schedule,
        sequence_parallel=sequence_parallel, stages=stages, shardings=shardings, compile=d.compile,
        notes=(*notes, *choice.notes), blocks=tuple(block.name for block in graph.blocks),
    )


def stage_devices(stage: int, size: int) -> tuple[int, ...]:
    """The ranks of a pipeline group: contiguous, in the cluster's order."""
    return tuple(range(stage * size, (stage + 1) * size))


def even_cuts(graph: ModelGraph, num_stages: int) -> tuple[int, ...]:
    """Block indices that cut the chain into stages with equally many layers, or one more in the first stages.

    The prologue goes with the first layer, the epilogue with the last, glue with the layer after it.
    """
    layers = [index for index, block in enumerate(graph.blocks) if is_layer(block.name)]
    if len(layers) < num_stages:
        raise InputError(
            f"{num_stages} pipeline stages for {len(layers)} layers of {graph.name}; choose at most {len(layers)}"
        )
    each, more = divmod(len(layers), num_stages)
    cuts, taken = [0], 0
    for stage in range(num_stages - 1):
        taken += each + (stage < more)
        after = layers[taken]  # the next stage's first layer, and the glue before it
        cuts.append(layers[taken - 1] + 1 if layers[taken - 1] + 1 < after else after)
    return (*cuts, len(graph.blocks))


def _check(graph: ModelGraph, cluster: Cluster, d: Degrees, mesh: Mesh) -> int:
    """The number of micro-batches, or InputError for degrees that don't fit together."""
    for name in ("global_batch", "tp", "pp", "virtual_stages", "cp", "ep", "dp_replicate", "dp_shard", "micro_batch"):
        if getattr(d, name) < 1:
            raise InputError(f"{name} is {getattr(d, name)}; it must be at least 1")
    if mesh.size * d.pp != cluster.num_devices:
        raise InputError(
            f"dp_replicate {mesh.dp_replicate} x dp_shard {mesh.dp_shard} x tp {d.tp} x cp {d.cp} x pp {d.pp} is "
            f"{mesh.size * d.pp} devices, and {cluster.name} has {cluster.num_devices}; make the degrees multiply to "
            f"{cluster.num_devices}"
        )
    ranks, axis = (mesh.dp_shard, "dp_shard") if d.zero else (mesh.dp, "dp_replicate")
    if ranks % d.ep:
        raise InputError(
            f"ep {d.ep} does not divide {axis} {ranks}, whose innermost ranks have the experts between them; choose a "
            "divisor"
        )
    if d.ep > 1 and (why := unsplit_experts(graph, d.ep)):
        raise InputError(f"{why}; choose another ep")
    rows = mesh.dp * d.micro_batch
    if d.global_batch % rows:
        below = d.global_batch // rows * rows
        near = f"{below} or {below + rows}" if below else str(rows)
        raise InputError(
            f"a global batch of {d.global_batch} does not divide into micro-batches of {d.micro_batch} on {mesh.dp} "
            f"data ranks; use {near}, or other degrees"
        )
    assert graph.blocks, "a model has at least one block"
    return d.global_batch // rows
