"""Which parameters a device of a stage holds, by who shares them out, and which blocks share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.model_graph import Block, ModelGraph
from autopar.plan.plan import Plan, Stage, is_layer
from autopar.sharding.state import RP, Kind, R, State
from autopar.simulate.block_cost import BlockCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Numels:
    """Parameters on a device that the same ranks share out: the experts where an expert axis has them, or all others.

    `units` has those of each layer, `unit` those of the layer that has most of both kinds, `root` those outside layers.
    `partial`: those whose gradient is summed over the tensor axis. By block: `blocks` has those that count there, the
    first of the blocks that use them, `shared` those of these that a later block uses too, `again` those that count in
    an earlier block and are used last in this one.
    """

    units: tuple[float, ...]
    unit: float
    root: float
    partial: float
    num_shards: int
    by_experts: bool
    blocks: tuple[float, ...] = ()
    shared: tuple[float, ...] = ()
    again: tuple[float, ...] = ()

    @property
    def numel(self) -> float:
        return sum(self.units) + self.root


def held_numels(
    graph: ModelGraph, plan: Plan, blocks: Sequence[Block], costs: Sequence[BlockCost], stage: Stage
) -> tuple[Numels, ...]:
    """Local parameters; those of the expert axis apart.

    One that several blocks of the stage share counts once: whole, and summed over the tensor axis, where they want it
    in unlike states.
    """
    seen: dict[str, State] = {}
    last = {name: i for i, block in enumerate(blocks) for name in block.params}
    kinds = (False, True) if stage.mesh.ep > 1 else (False,)
    units: list[list[float]] = [[] for _ in kinds]
    root, partial = [0.0] * len(kinds), [0.0] * len(kinds)
    each, shared, again = ([[0.0] * len(blocks) for _ in kinds] for _ in range(3))
    for i, (block, cost) in enumerate(zip(blocks, costs, strict=True)):
        own = [0.0] * len(kinds)
        shardings = plan.class_shardings(block.cls, stage)
        states = shardings[-1].params if stage.mesh.tp > 1 else (R,) * len(block.params)
        for name, state, numel, is_partial, by_experts in zip(
            block.params, states, cost.params, cost.partial_params, cost.by_experts, strict=True
        ):
            if name not in seen:
                seen[name] = state
                own[by_experts] += numel
                partial[by_experts] += numel if is_partial else 0.0
                shared[by_experts][i] += numel if last[name] > i else 0.0
                continue
            again[by_experts][i] += numel if last[name] == i else 0.0
            if state != seen[name]:
                whole = graph.param[name].numel
                own[by_experts] += whole - _held(whole, seen[name], stage.mesh.tp)
                partial[by_experts] += whole - (whole if seen[name] == RP else 0.0)
                seen[name] = RP
        for kind in kinds:
            each[kind][i] = own[kind]
            if is_layer(block.name):
                units[kind].append(own[kind])
            else:
                root[kind] += own[kind]
    largest = max(zip(*units, strict=True), key=sum, default=(0.0,) * len(kinds))
    shards = stage.mesh.dp_shard * stage.mesh.cp
    return tuple(
        Numels(
            units=tuple(units[kind]), unit=largest[kind], root=root[kind], partial=partial[kind],
            num_shards=max(1, shards // stage.mesh.ep) if kind else shards, by_experts=kind,
            blocks=tuple(each[kind]), shared=tuple(shared[kind]), again=tuple(again[kind]),
        ) for kind in kinds
    )


def _held(numel: float, state: State, tp: int) -> float:
    """Elements that a tensor rank has of a parameter."""
    return numel / tp if state.kind is Kind.SHARDED else numel
