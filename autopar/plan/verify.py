"""The plan verifier: what a legal plan is, as a list of checks. Each yields what it found wrong, one line a problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from autopar.cluster.cluster import Cluster
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.cluster.part import part_of, split_part
from autopar.errors import InputError, PlanMismatchError
from autopar.graph.expert_params import expert_params, unsplit_experts
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.model_graph import ModelGraph
from autopar.plan.actions import check_actions, parse_actions, stage_ranks
from autopar.plan.plan import Plan, Schedule, Stage, is_layer
from autopar.plan.sharding_checks import illegal_strategies, sharding_problems
from autopar.sharding.rewrite import rewrite_text
from autopar.sharding.rewrites import rewritten
from autopar.sharding.rows import at_other_rows
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


def machine_of(plan: Plan, cluster: Cluster) -> Cluster:
    """What of the cluster the plan is for: the part that the name of the plan's cluster tells, or else all of it."""
    if cluster_fingerprint(cluster) == plan.cluster_fingerprint:
        return cluster
    named = split_part(plan.cluster_name)
    if named is None or max(named[1]) >= cluster.num_devices:
        return cluster
    part = part_of(cluster, named[1])
    return part if cluster_fingerprint(part) == plan.cluster_fingerprint else cluster


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
    num_unused = plan.num_devices - sum(0 <= rank < plan.num_devices for rank in seen)
    if num_unused > 0:
        first = next(rank for rank in count() if rank not in seen)
        yield f"device {first} is in no stage ({num_unused} of {plan.num_devices} are unused)"


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
        ranks, axis = (mesh.dp_shard, "dp_shard") if stage.zero else (mesh.dp, "dp_replicate")
        if ranks % mesh.ep:
            yield f"stage {index} has ep {mesh.ep}, which does not divide its {axis} {ranks}"
        if stage.zero == 0 and mesh.dp_shard != 1:
            yield f"stage {index} has zero 0, which keeps whole replicas, and dp_shard {mesh.dp_shard}"


def _experts_divide(subject: _Subject) -> Iterator[str]:
    """Whether data ranks can have the experts between them, and the tensor axis what that leaves of them."""
    plan, graph = subject.plan, subject.graph
    for index, stage in enumerate(plan.stages):
        size = stage.mesh.ep
        if size == 1 or graph is None:
            continue
        why = unsplit_experts(graph, size)
        if why:
            yield f"stage {index} has ep {size}: {why}"
            return
        for cls in dict.fromkeys(graph.block_class[block.cls] for block in graph.blocks[stage.first : stage.last]):
            held = expert_params(cls)
            for choice in plan.class_shardings(cls.name, stage):
                for name, state in zip(cls.params, choice.params, strict=True):
                    if name in held and state.kind is Kind.SHARDED and state.dim == 0 and (
                        state.length or state.outer > 1 or cls.tensor[name].shape[0] % (size * stage.mesh.tp)
                    ):
                        yield (
                            f"stage {index} has ep {size}, and tp {stage.mesh.tp} cannot split what that leaves of the "
                            f"{cls.tensor[name].shape[0]} experts of {cls.name}"
                        )
                        return


def _devices_ascend(subject: _Subject) -> Iterator[str]:
    """Process groups number their ranks in ascending order, whatever order they are given in."""
    for index, stage in enumerate(subject.plan.stages):
        mesh = stage.mesh
        if len(stage.devices) != mesh.size:
            return  # said by another check
        step = 1
        for axis, size in (("tp", mesh.tp), ("cp", mesh.cp), ("dp_shard", mesh.dp_shard),
                           ("dp_replicate", mesh.dp_replicate)):
            for lane, rank in enumerate(stage.devices):
                if lane // step % size and stage.devices[lane - step] > rank:
                    yield (
                        f"stage {index} lists device {stage.devices[lane - step]} before {rank} on its {axis} axis; "
                        "list the devices of an axis in ascending order"
                    )
                    return
            step *= size


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
        if stage.rows:
            if len(stage.rows) != stage.mesh.dp or min(stage.rows) < 1:
                yield f"stage {index} shares out rows {list(stage.rows)}, and it has {stage.mesh.dp} data ranks"
            elif sum(stage.rows) * plan.num_micro_batches != plan.global_batch:
                yield (
                    f"stage {index} takes {' + '.join(map(str, stage.rows))} rows of each of {plan.num_micro_batches} "
                    f"micro-batches, and the global batch is {plan.global_batch}"
                )
            continue
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


def _chunks_share_devices(subject: _Subject) -> Iterator[str]:
    """The chunks of one pipeline group run on its devices in one layout."""
    plan = subject.plan
    groups = _groups(plan)
    for index, stage in enumerate(plan.stages):
        first = plan.stages[index % groups] if groups else stage
        if stage.mesh != first.mesh or plan.rows_of(stage) != plan.rows_of(first):
            yield f"stage {index} lays its devices out otherwise than stage {index % groups}, which has the same ones"


def _shardings_complete(subject: _Subject) -> Iterator[str]:
    plan, graph = subject.plan, subject.graph
    every = {"": plan.shardings} | {f" of stage {i}": s.shardings for i, s in enumerate(plan.stages) if s.shardings}
    for where, choices in every.items():
        names = [(choice.axis, choice.cls) for choice in choices]
        for axis, name in sorted({name for name in names if names.count(name) > 1}):
            yield f"block class {name}{where} has {names.count((axis, name))} shardings for the {axis} axis"
    if graph is None:
        return
    for index, stage in enumerate(plan.stages):
        known = {(choice.axis, choice.cls) for choice in stage.shardings or plan.shardings}
        for block in graph.blocks[stage.first : stage.last]:
            for axis, size in stage.mesh.inner:
                if (axis, block.cls) not in known:
                    own = f" in the shardings of stage {index}" if stage.shardings else ""
                    yield f"block {block.name} runs under {axis} {size}, and its class {block.cls} has no sharding{own}"
                    return
    for where, choices in every.items():
        for choice in choices:
            if choice.cls not in graph.block_class:
                yield f"a sharding{where} names block class {choice.cls}, which the model does not have"
                return
            if choice.axis == "cp" and any(state.kind is Kind.SHARDED for state in choice.params):
                yield f"the cp axis splits a parameter of class {choice.cls}, and only the tensor axis may"
    seen: set[tuple[str, tuple[tuple[str, int], ...], tuple[int, ...]]] = set()
    for index, stage in enumerate(plan.stages):
        where = f" of stage {index}" if stage.shardings else ""
        key = (where, stage.mesh.inner, tuple(sorted(set(plan.rows_of(stage)))))
        if stage.mesh.inner and key not in seen:
            seen.add(key)
            yield from _sharding_problems(plan, graph, stage)


def _sharding_problems(plan: Plan, graph: ModelGraph, stage: Stage) -> Iterator[str]:
    """What is wrong with the shardings that a stage uses, at each number of rows that its data ranks get."""
    sizes = [size for _, size in stage.mesh.inner]
    names = dict.fromkeys(
        choice.cls for choice in stage.shardings or plan.shardings
        if all((axis, choice.cls) in {(c.axis, c.cls) for c in stage.shardings or plan.shardings}
               for axis, _ in stage.mesh.inner)
    )
    for rows in sorted(set(plan.rows_of(stage))):
        tagged, at = (graph.rows, rows) if graph.rows_are_tagged else (1, 1)
        if not graph.rows_are_tagged and rows != plan.micro_batch:
            yield f"stage gets {rows} rows, and a model that is captured at {graph.rows} rows has no other number"
            return
        for name in names:
            cls = graph.block_class[name]
            choices = at_other_rows(plan.class_shardings(name, stage), graph, plan.micro_batch, rows)
            found = list(sharding_problems(choices, cls, sizes, tagged_rows=tagged, rows=at))
            yield from found or illegal_strategies(choices, cls, sizes, tagged_rows=tagged, rows=at)


def _boundaries_agree(subject: _Subject) -> Iterator[str]:
    """Blocks of one stage hand tensors over in one state; between stages any state may pass that has regions."""
    plan, graph = subject.plan, subject.graph
    if graph is None:
        return
    left: dict[str, tuple[str, int, dict[str, State]]] = {}  # producer, its stage, state by axis
    for index, stage in enumerate(plan.stages):
        if not all((axis, block.cls) in {(c.axis, c.cls) for c in stage.shardings or plan.shardings}
                   for axis, _ in stage.mesh.inner for block in graph.blocks[stage.first : stage.last]):
            return  # said by another check
        for block in graph.blocks[stage.first : stage.last]:
            choices = dict(zip((axis for axis, _ in stage.mesh.inner), plan.class_shardings(block.cls, stage),
                               strict=True))
            cls = graph.block_class[block.cls]
            for i, name in enumerate(block.inputs):
                producer, at, have = left.get(name, ("the batch", index, {}))
                for axis, choice in choices.items():
                    if name not in left or at == index or _same_layout(plan, plan.stages[at], stage):
                        if (found := have.get(axis, R)) != choice.inputs[i]:
                            yield f"{name} leaves {producer} as {found} and enters {block.name} as {choice.inputs[i]}"
                    elif choice.inputs[i] not in _passing(len(cls.tensor[cls.inputs[i]].shape)):
                        yield f"{name} enters {block.name} as {choice.inputs[i]}, which may not pass between stages"
                if at != index:  # this stage holds it from here on as its first block takes it
                    left[name] = (producer, index, {axis: choice.inputs[i] for axis, choice in choices.items()})
            for i, (own, name) in enumerate(zip(cls.outputs, block.outputs, strict=True)):
                states = {axis: choice.outputs[i] for axis, choice in choices.items()}
                left[name] = (block.name, index, states)
                allowed = _passing(len(cls.tensor[own].shape))
                for state in states.values():
                    if state not in allowed:
                        words = " and ".join(map(str, allowed))
                        yield f"{name} leaves {block.name} as {state}, and only {words} may pass between blocks"
    if final := left.get(graph.loss):
        for state in final[2].values():
            if state != R:
                yield f"the loss leaves {final[0]} as {state}"


def _passing(rank: int) -> tuple[State, State]:
    """The states in which a tensor of so many dims may pass: whole, split by the sequence, or images by height."""
    return (R, shard(1)) if rank < 4 else (R, shard(2))


def _same_layout(plan: Plan, one: Stage, other: Stage) -> bool:
    """Whether what one stage sends arrives on the other's ranks as it left, rank by rank."""
    return one.mesh == other.mesh and plan.rows_of(one) == plan.rows_of(other) and one.shardings == other.shardings


def _one_inner_mesh(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    for axis in ("cp", "tp"):
        sizes = sorted({getattr(stage.mesh, axis) for stage in plan.stages if not stage.shardings} - {1})
        if len(sizes) > 1:
            yield f"stages have different {axis} sizes {sizes}, and one sharding a class serves one size"


CHECKS = (
    _words, _blocks_covered_in_order, _devices_used_once, _meshes_match, _experts_divide, _devices_ascend,
    _layer_counts_add_up, _batch_adds_up, _schedule_fits, _chunks_share_devices, _actions_run, _one_inner_mesh,
    _shardings_complete, _boundaries_agree,
)
