"""Which parameters a stage holds, in which state on the tensor axis, and the way between local and full tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from autopar.graph.expert_params import expert_params
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.runtime.collectives import Axis, all_gather, take_shard
from autopar.sharding.state import RP, Kind, R, State


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamLayout:
    """A parameter as it is stored.

    `names` are its own FQN and those of its ties; `state` is its state on the tensor axis of one stage; `stages` are
    the stages whose blocks use it, each of which has a copy; `unit` is the name of the block that it is gathered with
    ("" for the root of its stage). `by_experts`: the ranks of the expert axis have parts of it along dim 0, of which
    `state` says what the tensor axis has.
    """

    names: tuple[str, ...]
    state: State
    stages: tuple[int, ...]
    unit: str
    by_experts: bool = False

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`params` lists every parameter, as its first stage holds it."""

    params: tuple[ParamLayout, ...]
    stages: tuple[tuple[ParamLayout, ...], ...]
    units: tuple[str, ...]  # blocks that are gathered and recomputed as one, in the order of the chain
    notes: tuple[str, ...] = ()

    def of_stage(self, stage: int) -> tuple[ParamLayout, ...]:
        """The parameters that a stage holds, as it holds them."""
        return self.stages[stage]


def parameter_layout(graph: ModelGraph, plan: Plan, module_names: Iterable[str]) -> Layout:
    """The layout of every parameter of the model under a plan.

    A parameter that several blocks of a stage want in different states is stored whole on every rank of the tensor
    axis, with a gradient that is summed over it once a step. A parameter that no block uses stays with the first stage.
    """
    stage_of = [index for index, stage in enumerate(plan.stages) for _ in range(stage.first, stage.last)]
    wanted: dict[tuple[str, int], list[State]] = {}
    users: dict[str, list[int]] = {}
    by_experts: set[str] = set()
    for position, block in enumerate(graph.blocks):
        stage, cls = plan.stages[stage_of[position]], graph.block_class[block.cls]
        if stage.mesh.ep > 1:
            held = expert_params(cls)
            by_experts.update(name for own, name in zip(cls.params, block.params, strict=True) if own in held)
        on_tensor_axis = [choice for choice in plan.class_shardings(block.cls, stage) if choice.axis == "tp"]
        states = on_tensor_axis[0].params if on_tensor_axis else (R,) * len(block.params)
        for name, state in zip(block.params, states, strict=True):
            wanted.setdefault((name, stage_of[position]), []).append(state)
            users.setdefault(name, []).append(position)
    ties: dict[str, list[str]] = {}
    for alias, name in graph.aliases:
        ties.setdefault(name, []).append(alias)
    names = {info.name: (info.name, *ties.get(info.name, ())) for info in graph.params}
    unit_of = _units(graph, frozenset(module_names), names, users)
    notes = []
    params = []
    by_stage: list[list[ParamLayout]] = [[] for _ in plan.stages]
    for info in graph.params:
        stages = tuple(sorted({stage_of[user] for user in users.get(info.name, [0])}))
        copies = []
        for index in stages:
            found = wanted.get((info.name, index), [R])
            if len(set(found)) > 1:
                notes.append(
                    f"parameter {info.name} is wanted as {' and '.join(sorted({str(state) for state in found}))}; "
                    "every rank of the tensor axis keeps it whole"
                )
            copies.append(ParamLayout(
                names=names[info.name], state=found[0] if len(set(found)) == 1 else RP, stages=stages,
                unit=unit_of.get(info.name, ""), by_experts=info.name in by_experts,
            ))
            by_stage[index].append(copies[-1])
        params.append(copies[0])
    units = set(unit_of.values())
    return Layout(
        params=tuple(params), stages=tuple(map(tuple, by_stage)),
        units=tuple(block.name for block in graph.blocks if block.name in units),
        notes=tuple(notes),
    )


def _units(
    graph: ModelGraph, modules: frozenset[str], names: dict[str, tuple[str, ...]], users: dict[str, list[int]]
) -> dict[str, str]:
    """The unit of each parameter that has one: a block that is a module and alone uses what lies in that module."""
    unit_of: dict[str, str] = {}
    for position, block in enumerate(graph.blocks):
        if block.name not in modules:
            continue
        inside = [name for name, own in names.items() if any(one.startswith(block.name + ".") for one in own)]
        alone = all(
            users.get(name) == [position] and all(one.startswith(block.name + ".") for one in names[name])
            for name in inside
        )
        if inside and alone:
            unit_of.update(dict.fromkeys(inside, block.name))
    return unit_of


def local_part(full: Tensor, state: State, axis: Axis | None) -> Tensor:
    """This rank's part of a full tensor on the tensor axis."""
    if axis is None or state.kind is not Kind.SHARDED:
        return full
    return take_shard(axis, full, state.dim, state.outer, state.length)


def full_tensor(local: Tensor, state: State, axis: Axis | None) -> Tensor:
    """The full tensor from every rank's part; every rank of the tensor axis must call it."""
    if axis is None or state.kind is not Kind.SHARDED:
        return local
    return all_gather(axis, local, state.dim, state.outer, state.length)
