"""Random legal plans: any cut, mesh, share of rows, schedule, split of ops and choice of what is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from local_machines import slow_cluster

from autopar.errors import InputError
from autopar.graph.expert_params import expert_ops
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.plan.actions import Action, ActionKind, ActionLists, requirements
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage, Variant, is_layer
from autopar.plan.verify import problems
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.shardings import at_rows
from autopar.sharding.joint import JointStrategy, Placement, can_be_placed, joint_strategies
from autopar.sharding.lowering import Lowering
from autopar.sharding.rewrite import Rewrite
from autopar.sharding.rewrites import apply_rewrite, candidates_of, rewritten
from autopar.sharding.route import steps
from autopar.sharding.rows import at_other_rows
from autopar.sharding.state import RP, Kind, R, shard
from autopar.sharding.strategy import ClassSharding

_PLANNED_ROWS = 2  # planned shardings are made once at this number of rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A legal plan, what it has of the features that are counted, and what was refused on the way to it."""

    plan: Plan
    features: frozenset[str]
    refused: tuple[str, ...]


def draw(graph: ModelGraph, world: int, dtype: str, chance: random.Random, *, tries: int = 200) -> Drawn:
    """The first of random plans for `world` ranks that the verifier passes; `graph` has tagged rows."""
    refused: list[str] = []
    for _ in range(tries):
        try:
            plan, features = _plan(graph, world, dtype, chance)
        except InputError as error:
            refused.append(str(error))
            continue
        found = next(problems(plan, graph), None)
        if found is None:
            return Drawn(plan=plan, features=features | _features(plan), refused=tuple(refused))
        assert "\n" not in found
        refused.append(found)
    raise AssertionError(f"no legal plan in {tries} draws; the last was refused: {refused[-1]}")


def _plan(
    captured: ModelGraph, world: int, dtype: str, chance: random.Random
) -> tuple[Plan, frozenset[str]]:
    rewrites = _rewrites(captured, chance) if chance.random() < 0.25 else ()
    graph = rewritten(captured, rewrites)
    num_groups = chance.choice([1, 1, 1, 2, 2, 2, 3, 4])
    num_groups = min(num_groups, world, len(graph.blocks))
    num_chunks = 2 if chance.random() < 0.25 and 2 * num_groups <= len(graph.blocks) else 1
    meshes = _meshes(world, num_groups, chance)
    global_batch = chance.choice([8, 12])
    most = max(mesh.dp for mesh in meshes)
    micro_batches = [m for m in (1, 2, 3, 4, 6) if global_batch % m == 0 and global_batch // m >= most]
    num_micro_batches = chance.choice(micro_batches)
    schedule, actions = _schedule(num_groups, num_chunks, num_micro_batches, chance)
    rows = [_rows(global_batch // num_micro_batches, mesh.dp, chance) for mesh in meshes]
    micro_batch = max(rows[0]) if chance.random() < 0.5 else rows[0][0]
    ranks = list(range(world))
    if chance.random() < 0.3:
        chance.shuffle(ranks)
    devices = []
    for mesh in meshes:
        devices.append(tuple(sorted(ranks[: mesh.size])))
        ranks = ranks[mesh.size :]
    cuts = sorted(chance.sample(range(1, len(graph.blocks)), num_groups * num_chunks - 1))
    features: set[str] = set()
    stages: list[Stage] = []
    zeros = [chance.choice([0, 1, 2, 3]) if mesh.dp_shard == 1 else chance.choice([1, 2, 3]) for mesh in meshes]
    if any(expert_ops(cls) for cls in graph.classes):
        meshes = [_with_expert_axis(mesh, zero, chance) for mesh, zero in zip(meshes, zeros, strict=True)]
    for index, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(graph.blocks)], strict=True)):
        group = index % num_groups
        mesh, own_rows = meshes[group], rows[group]
        shardings: tuple[ClassSharding, ...] = ()
        if index and num_groups == 1:  # neighbours on the same devices split ops alike
            shardings = stages[0].shardings
        elif mesh.inner:
            names = tuple(dict.fromkeys(block.cls for block in graph.blocks))
            shardings, words = _shardings(graph, names, mesh, micro_batch, chance)
            features |= words
        layers = sum(is_layer(block.name) for block in graph.blocks[first:last])
        stages.append(Stage(
            first=first, last=last, devices=devices[group], mesh=mesh, zero=zeros[group], recompute=Recompute.NONE,
            virtual=index // num_groups, shardings=shardings, offload_optimizer=chance.random() < 0.15,
            rows=() if own_rows == (micro_batch,) * mesh.dp else own_rows,
        ).with_variants(_variants(layers, chance)))
    base = plan_from_degrees(captured, slow_cluster(world), Degrees(
        global_batch=world, dp_replicate=world, dtype=dtype, param_dtype=dtype, optimizer="sgd",
    ))
    return replace(
        base, global_batch=global_batch, micro_batch=micro_batch, num_micro_batches=num_micro_batches,
        schedule=schedule, actions=actions, stages=tuple(stages), rewrites=rewrites,
        model_fingerprint=model_fingerprint(captured),
    ), frozenset(features)


# -- parts of a plan


def _rewrites(graph: ModelGraph, chance: random.Random) -> tuple[Rewrite, ...]:
    """One or two rewrites of a class of layers, one after the other."""
    layers = dict.fromkeys(block.cls for block in graph.blocks if is_layer(block.name))
    others = {block.cls for block in graph.blocks if not is_layer(block.name)}
    cls = graph.block_class[chance.choice([name for name in layers if name not in others])]
    found: list[Rewrite] = []
    for _ in range(chance.choice([1, 2])):
        if options := candidates_of(cls):
            found.append(chance.choice(options))
            cls = apply_rewrite(cls, found[-1])
    return tuple(found)


def _meshes(world: int, num_groups: int, chance: random.Random) -> list[Mesh]:
    if world % num_groups == 0 and chance.random() < 0.5:
        return [_mesh(world // num_groups, chance)] * num_groups
    sizes = [1] * num_groups
    for _ in range(world - num_groups):
        sizes[chance.randrange(num_groups)] += 1
    return [_mesh(size, chance) for size in sizes]


def _mesh(size: int, chance: random.Random) -> Mesh:
    """A mesh whose axes multiply to `size`."""
    axes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
    rest = size
    for factor in (2, 2, 3, 5):
        while rest % factor == 0:
            rest //= factor
            axes[chance.choice(["dp_replicate", "dp_shard", "cp", "tp", "tp"])] *= factor
    return Mesh(**axes)


def _with_expert_axis(mesh: Mesh, zero: int, chance: random.Random) -> Mesh:
    """The mesh with some of its data ranks as an expert axis."""
    ranks = mesh.dp_shard if zero else mesh.dp
    return replace(mesh, ep=chance.choice([size for size in range(1, ranks + 1) if ranks % size == 0]))


def _rows(total: int, num_ranks: int, chance: random.Random) -> tuple[int, ...]:
    if total % num_ranks == 0 and chance.random() < 0.6:
        return (total // num_ranks,) * num_ranks
    cuts = sorted(chance.sample(range(1, total), num_ranks - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def _variants(num_layers: int, chance: random.Random) -> list[Variant]:
    if chance.random() < 0.4:
        return [Variant()] * num_layers
    return [
        Variant(recompute=chance.choice(list(Recompute)), offload=chance.random() < 0.25) for _ in range(num_layers)
    ]


def _schedule(
    num_groups: int, num_chunks: int, num_micro_batches: int, chance: random.Random
) -> tuple[Schedule, tuple[str, ...]]:
    """A schedule that the stages take, or lists of actions of any order in which nothing waits for ever."""
    if num_chunks > 1:
        own = num_micro_batches % num_groups != 0 or chance.random() < 0.5
        schedule = Schedule.INTERLEAVED
    else:
        own = chance.random() < 0.2
        schedule = chance.choice([Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE])
    if not own:
        return schedule, ()
    lists = random_actions(num_groups, num_groups * num_chunks, num_micro_batches, chance)
    return schedule, tuple(",".join(map(str, actions)) for actions in lists)


def random_actions(num_ranks: int, num_stages: int, num_micro_batches: int, chance: random.Random) -> ActionLists:
    """Lists of computations in an order drawn from all that can run; each backward is whole or in two parts."""
    forward, whole, inputs, weights = (
        ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD, ActionKind.WEIGHT_BACKWARD
    )
    waiting: list[Action] = []
    for stage in range(num_stages):
        for i in range(num_micro_batches):
            kinds = (whole,) if chance.random() < 0.5 else (inputs, weights)
            waiting += [Action(kind, stage, i) for kind in (forward, *kinds)]
    lists: list[list[Action]] = [[] for _ in range(num_ranks)]
    done: set[Action] = set()
    while waiting:
        ready = [
            action for action in waiting
            if all(done.intersection(options) for options in requirements(action, num_stages))
        ]
        action = chance.choice(ready)
        waiting.remove(action)
        done.add(action)
        lists[action.stage % num_ranks].append(action)
    if chance.random() < 0.3:
        for rank, actions in enumerate(lists):
            actions += [Action(ActionKind.REDUCE, stage) for stage in range(rank, num_stages, num_ranks)]
    return tuple(map(tuple, lists))


# -- splits of ops


@cache
def _planned(key: tuple[int, ...], sequence_parallel: bool) -> tuple[ClassSharding, ...]:
    graph, cp, tp = _GRAPHS[key[0]], key[1], key[2]
    return plan_from_degrees(graph, slow_cluster(cp * tp), Degrees(
        global_batch=_PLANNED_ROWS, micro_batch=_PLANNED_ROWS, cp=cp, tp=tp, dtype="float64", param_dtype="float64",
        optimizer="sgd", sequence_parallel=sequence_parallel,
    )).shardings


_GRAPHS: dict[int, ModelGraph] = {}


def _shardings(
    graph: ModelGraph, names: Sequence[str], mesh: Mesh, rows: int, chance: random.Random
) -> tuple[tuple[ClassSharding, ...], set[str]]:
    """Shardings of all classes at a number of rows: planned ones, or any strategy for each op."""
    if chance.random() < 0.4:
        _GRAPHS[id(graph)] = graph
        sequence = mesh.tp > 1 and chance.random() < 0.5
        found = _planned((id(graph), mesh.cp, mesh.tp), sequence)
        return at_other_rows(found, graph, _PLANNED_ROWS, rows), {"planned ops"}
    sizes = tuple(size for _, size in mesh.inner)
    boundary = tuple(chance.choice([R, shard(1)]) for _ in sizes)
    axes = tuple(name for name, _ in mesh.inner)
    made = [one for name in names for one in random_shardings(graph.block_class[name], axes, sizes, boundary, chance)]
    return at_rows(tuple(made), graph, rows), {"random ops"}


def random_shardings(
    cls: BlockClass, axes: tuple[str, ...], sizes: tuple[int, ...], boundary: Placement, chance: random.Random
) -> tuple[ClassSharding, ...]:
    """Any strategy for each op that its operands can be converted to; those that split are preferred."""
    strategies, tensors = joint_strategies(cls, sizes), cls.tensor
    whole = (R,) * len(sizes)

    def at_boundary(name: str) -> Placement:
        info = tensors[name]
        hidden = info.requires_grad and len(info.shape) == 3
        return boundary if hidden and can_be_placed(info.shape, boundary, sizes) else whole

    def may_rest(place: Placement) -> bool:
        return all(
            state.kind is not Kind.PARTIAL and (axis == "tp" or state.kind is not Kind.SHARDED)
            for axis, state in zip(axes, place, strict=True)
        )

    wanted: dict[str, list[Placement]] = {name: [] for name in (*cls.params, *cls.buffers)}
    place: dict[str, Placement] = {name: at_boundary(name) for name in cls.inputs}
    chosen: list[tuple[str, JointStrategy]] = []
    for op in cls.ops:
        legal = [
            own for own in strategies[op.name]
            if all(
                may_rest(want) if name in wanted else steps(place[name], want, tensors[name].requires_grad) is not None
                for name, want in zip(op.operands, zip(*(part.inputs for part in own), strict=True), strict=True)
            )
        ]
        split = [own for own in legal if all(part.factor for part in own)]
        own = chance.choice(split if split and chance.random() < 0.75 else legal)
        chosen.append((op.name, own))
        for name, want in zip(op.operands, zip(*(part.inputs for part in own), strict=True), strict=True):
            if name in wanted:
                wanted[name].append(want)
        left = zip(*(part.outputs for part in own), strict=True)
        place.update({name: p for name, p in zip(op.outputs, left, strict=True) if name})

    def stored(name: str) -> Placement:
        return tuple(
            chance.choice([*(want[i] for want in wanted[name]), R, RP]) if axis == "tp" else chance.choice([R, RP])
            for i, axis in enumerate(axes)
        )

    rest = {name: stored(name) for name in cls.params}
    return tuple(
        ClassSharding(
            cls=cls.name, inputs=tuple(at_boundary(name)[i] for name in cls.inputs),
            params=tuple(rest[name][i] for name in cls.params), buffers=(R,) * len(cls.buffers),
            outputs=tuple(at_boundary(name)[i] for name in cls.outputs),
            ops=tuple((name, own[i]) for name, own in chosen), axis=axis,
        )
        for i, axis in enumerate(axes)
    )


# -- what a plan has


def _features(plan: Plan) -> frozenset[str]:
    """What of the counted features the plan has."""
    stages = plan.stages
    words = {f"{plan.num_devices} ranks", f"schedule {'own list' if plan.actions else plan.schedule}"}
    words |= {f"zero {stage.zero}" for stage in stages if stage.mesh.dp > 1}
    meshes = {stage.mesh for stage in stages}
    variants = [variant for stage in stages for variant, _ in stage.variants]
    splits: list[Any] = [own for stage in stages for own in stage.shardings]
    boundary = [state for own in splits for state in (*own.inputs, *own.outputs)]
    strategies = [strategy for own in splits for _, strategy in own.ops]
    has = {
        "pipeline": plan.num_stages > 1, "tp": any(mesh.tp > 1 for mesh in meshes),
        "cp": any(mesh.cp > 1 for mesh in meshes), "hybrid dp": any(m.dp_replicate > 1 < m.dp_shard for m in meshes),
        "ep": any(mesh.ep > 1 for mesh in meshes),
        "unlike meshes": len(meshes) > 1,
        "unlike zero": len({stage.zero for stage in stages}) > 1,
        "unequal rows": any(len(set(stage.rows)) > 1 for stage in stages),
        "uneven stages": len({stage.last - stage.first for stage in stages}) > 1,
        "sequence split": any(state.kind is Kind.SHARDED for state in boundary),
        "expert split": any("e" in strategy.factor.split("+") or strategy.lowering == Lowering.EXPERT_EXCHANGE
                            for own in splits for name, strategy in own.ops
                            if name.startswith("experts") and strategy.factor),
        "special lowering": any(strategy.lowering for strategy in strategies),
        "recompute": any(v.recompute is not Recompute.NONE for v in variants)
        or any(stage.recompute is not Recompute.NONE for stage in stages),
        "offload": any(variant.offload for variant in variants),
        "optimizer offload": any(stage.offload_optimizer for stage in stages), "rewrites": bool(plan.rewrites),
        "ranks in any order": [r for s in stages if not s.virtual for r in s.devices] != list(range(plan.num_devices)),
    }
    return frozenset(words | {word for word, is_so in has.items() if is_so})
