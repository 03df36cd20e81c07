"""The plan verifier: what a legal plan is, as a list of checks. Each yields what it found wrong, one line a problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autopar.cluster.cluster import Cluster
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.errors import InputError, PlanMismatchError
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.model_graph import ModelGraph
from autopar.plan.actions import check_actions, parse_actions, stage_ranks
from autopar.plan.plan import Plan, Schedule, Stage, is_layer
from autopar.plan.sharding_checks import illegal_strategies, sharding_problems
from autopar.sharding.rewrite import rewrite_text
from autopar.sharding.rewrites import rewritten
from autopar.sharding.state import Kind, R, State, shard

OPTIMIZERS = ("adamw", "adam", "sgd")
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class _Subject:
    plan: Plan
    graph: ModelGraph | None


def verify_plan(plan: Plan, graph: ModelGraph | None, cluster: Cluster | None = None) -> None:
    """Return if the plan is legal, and is for this model and cluster where they are given.

    PlanMismatchError names both sides where a fingerprint differs; InputError names the first rule that is broken.
    """
    if graph is not None and (found := model_fingerprint(graph)) != plan.model_fingerprint:
        raise PlanMismatchError(
            f"the plan was made for model {plan.model_name} ({plan.model_fingerprint}), and this model is "
            f"{graph.name} ({found}); plan again for {graph.name}"
        )
    if cluster is not None and (found := cluster_fingerprint(cluster)) != plan.cluster_fingerprint:
        raise PlanMismatchError(
            f"the plan was made for cluster {plan.cluster_name} ({plan.cluster_fingerprint}), and this cluster is "
            f"{cluster.name} ({found}); plan again for {cluster.name}"
        )
    for problem in problems(plan, graph):
        raise InputError(f"not a legal plan: {problem}; correct the plan file or plan again")


def problems(plan: Plan, graph: ModelGraph | None) -> Iterator[str]:
    """Every broken rule of the plan, one line each; `graph` is as captured."""
    if graph is not None and plan.rewrites:
        layers = {block.cls for block in graph.blocks if is_layer(block.name)}
        others = {block.cls for block in graph.blocks if not is_layer(block.name)} | {graph.shared.cls}
        if wrong := next((item for item in plan.rewrites if item.cls not in layers or item.cls in others), None):
            yield f"{rewrite_text(wrong)}: only the classes of layers are rewritten"
            return
        try:
            graph = rewritten(graph, plan.rewrites)
        except InputError as error:
            yield str(error)
            return
    for check in CHECKS:
        yield from check(_Subject(plan, graph))


def _words(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    if plan.dtype not in DTYPES:
        yield f"dtype {plan.dtype!r} is none of {', '.join(DTYPES)}"
    if plan.param_dtype not in DTYPES:
        yield f"param_dtype {plan.param_dtype!r} is none of {', '.join(DTYPES)}"
    if plan.optimizer not in OPTIMIZERS:
        yield f"optimizer {plan.optimizer!r} is none of {', '.join(OPTIMIZERS)}"


def _blocks_covered_in_order(subject: _Subject) -> Iterator[str]:
    at = 0
    for index, stage in enumerate(subject.plan.stages):
        if stage.first != at:
            yield f"stage {index} begins at block {stage.first}, and block {at} comes next"
        if stage.last <= stage.first:
            yield f"stage {index} holds no block (first {stage.first}, last {stage.last})"
        at = stage.last
    names = subject.plan.blocks
    if subject.graph is not None:
        total = len(subject.graph.blocks)
        if names and names != tuple(block.name for block in subject.graph.blocks):
            yield "its block names are not those of the model's chain"
    elif names:
        total = len(names)
    else:
        return
    if at != total:
        yield f"the stages end at block {at}, and the model has {total} blocks"


def _devices_used_once(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    groups = _groups(plan)
    if groups == 0:
        yield f"{plan.num_stages} stages have the chunk numbers {[stage.virtual for stage in plan.stages]}"
        return
    seen: dict[int, int] = {}
    for index, stage in enumerate(plan.stages):
        if stage.virtual:
            if stage.devices != plan.stages[index % groups].devices:
                yield f"stage {index} is chunk {stage.virtual} of stage {index % groups} on other devices"
            continue
        for rank in stage.devices:
            if rank in seen:
                yield f"device {rank} is used by stage {seen[rank]} and by stage {index}"
            if not 0 <= rank < plan.num_devices:
                yield f"stage {index} uses device {rank}, and the cluster has devices 0 to {plan.num_devices - 1}"
            seen[rank] = index
    unused = [rank for rank in range(plan.num_devices) if rank not in seen]
    if unused:
        yield f"device {unused[0]} is in no stage ({len(unused)} of {plan.num_devices} are unused)"


def _groups(plan: Plan) -> int:
    """Pipeline groups: as many as stages with chunk number 0; 0 where the chunk numbers don't go round."""
    groups = sum(stage.virtual == 0 for stage in plan.stages)
    good = groups > 0 and all(stage.virtual == index // groups for index, stage in enumerate(plan.stages))
    return groups if good else 0


def _meshes_match(subject: _Subject) -> Iterator[str]:
    for index, stage in enumerate(subject.plan.stages):
        mesh = stage.mesh
        if mesh.size != len(stage.devices):
            yield (
                f"stage {index} has {len(stage.devices)} devices, and its mesh dp_replicate {mesh.dp_replicate} x "
                f"dp_shard {mesh.dp_shard} x tp {mesh.tp} x cp {mesh.cp} takes {mesh.size}"
            )
        if mesh.dp * mesh.cp % mesh.ep:
            yield f"stage {index} has ep {mesh.ep}, which does not divide its {mesh.dp * mesh.cp} data ranks"
        if stage.zero == 0 and mesh.dp_shard != 1:
            yield f"stage {index} has zero 0, which keeps whole replicas, and dp_shard {mesh.dp_shard}"


def _layer_counts_add_up(subject: _Subject) -> Iterator[str]:
    plan, graph = subject.plan, subject.graph
    names = tuple(block.name for block in graph.blocks) if graph is not None else plan.blocks
    for index, stage in enumerate(plan.stages):
        given = sum(count for _, count in stage.variants)
        if not stage.variants or not names:
            continue
        layers = sum(map(is_layer, names[stage.first : stage.last]))
        if given != layers or any(count < 1 for _, count in stage.variants):
            yield f"the variants of stage {index} are counts of {given} layers, and it has {layers}"


def _batch_adds_up(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    for index, stage in enumerate(plan.stages):
        rows = plan.micro_batch * plan.num_micro_batches * stage.mesh.dp
        if rows != plan.global_batch:
            yield (
                f"micro_batch {plan.micro_batch} x num_micro_batches {plan.num_micro_batches} x dp {stage.mesh.dp} of "
                f"stage {index} is {rows} rows, and the global batch is {plan.global_batch}"
            )


def _schedule_fits(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    interleaved = any(stage.virtual for stage in plan.stages)
    if interleaved and plan.schedule is not Schedule.INTERLEAVED:
        yield f"stages have chunk numbers, and the schedule is {plan.schedule}"


def _actions_run(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    if not plan.actions:
        return
    groups = _groups(plan)
    if len(plan.actions) != groups:
        yield f"it has {len(plan.actions)} lists of actions for {groups} pipeline ranks"
        return
    try:
        lists = [parse_actions(row.split(",")) for row in plan.actions]
        check_actions(lists, plan.num_stages, plan.num_micro_batches)
    except InputError as error:
        yield f"its action lists cannot run: {error}"
        return
    for stage, rank in sorted(stage_ranks(lists).items()):
        if rank != stage % groups:
            yield f"list {rank} runs stage {stage}, which is on the devices of stage {stage % groups}"


def _shardings_complete(subject: _Subject) -> Iterator[str]:
    plan, graph = subject.plan, subject.graph
    names = [(choice.axis, choice.cls) for choice in plan.shardings]
    for axis, name in sorted({name for name in names if names.count(name) > 1}):
        yield f"block class {name} has {names.count((axis, name))} shardings for the {axis} axis"
    if graph is None:
        return
    for stage in plan.stages:
        for block in graph.blocks[stage.first : stage.last]:
            for axis, size in stage.mesh.inner:
                if (axis, block.cls) not in names:
                    yield f"block {block.name} runs under {axis} {size}, and its class {block.cls} has no sharding"
                    return
    for choice in plan.shardings:
        if choice.cls not in graph.block_class:
            yield f"a sharding names block class {choice.cls}, which the model does not have"
            return
        if choice.axis == "cp" and any(state.kind is Kind.SHARDED for state in choice.params):
            yield f"the cp axis splits a parameter of class {choice.cls}, and only the tensor axis may"
    for mesh in dict.fromkeys(stage.mesh for stage in plan.stages if stage.mesh.inner):
        for name in dict.fromkeys(choice.cls for choice in plan.shardings):
            choices, cls, sizes = plan.class_shardings(name, mesh), graph.block_class[name], [n for _, n in mesh.inner]
            tagged, rows = (graph.rows, plan.micro_batch) if graph.rows_are_tagged else (1, 1)
            found = list(sharding_problems(choices, cls, sizes, tagged_rows=tagged, rows=rows))
            yield from found or illegal_strategies(choices, cls, sizes, tagged_rows=tagged, rows=rows)


def _boundaries_agree(subject: _Subject) -> Iterator[str]:
    plan, graph = subject.plan, subject.graph
    if graph is None or not plan.shardings:
        return
    for axis in dict.fromkeys(choice.axis for choice in plan.shardings):
        choices = {choice.cls: choice for choice in plan.shardings if choice.axis == axis}
        left: dict[str, tuple[str, State]] = {}
        for block in graph.blocks:
            choice = choices.get(block.cls)
            if choice is None:
                continue
            for name, state in zip(block.inputs, choice.inputs, strict=True):
                producer, have = left.get(name, ("the batch", R))
                if have != state:
                    yield f"{name} leaves {producer} as {have} and enters {block.name} as {state}"
            cls = graph.block_class[block.cls]
            for own, name, state in zip(cls.outputs, block.outputs, choice.outputs, strict=True):
                left[name] = (block.name, state)
                rank = len(cls.tensor[own].shape)
                allowed = (R, shard(1)) if rank < 4 else (R, shard(2))  # whole, by the sequence, or images by height
                if state not in allowed:
                    words = " and ".join(map(str, allowed))
                    yield f"{name} leaves {block.name} as {state}, and only {words} may pass between blocks"
        if (final := left.get(graph.loss)) and final[1] != R:
            yield f"the loss leaves {final[0]} as {final[1]}"


def _one_inner_mesh(subject: _Subject) -> Iterator[str]:
    stages: tuple[Stage, ...] = subject.plan.stages
    for axis in ("cp", "tp"):
        sizes = sorted({getattr(stage.mesh, axis) for stage in stages})
        if len(sizes) > 1:
            yield f"stages have different {axis} sizes {sizes}, and one sharding a class serves one size"


CHECKS = (
    _words, _blocks_covered_in_order, _devices_used_once, _meshes_match, _layer_counts_add_up, _batch_adds_up,
    _schedule_fits, _actions_run, _one_inner_mesh, _shardings_complete, _boundaries_agree,
)
