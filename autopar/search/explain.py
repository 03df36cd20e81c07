"""Why a block is sharded as it is, and what the next best would cost: a plan's choice beside what it was chosen from.

Prices are the planner's own, at the plan's rows of a micro-batch. An op's alternatives come from the same exact search
with that op held to another loop dimension, so each is the best block that the alternative allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.memory import GRADIENT_BYTES
from autopar.cost_models.op_kinds import OpKind, op_kind
from autopar.errors import InputError
from autopar.graph.expert_params import expert_params
from autopar.graph.model_graph import DTYPE_BYTES, Block, BlockClass, ModelGraph, Op
from autopar.plan.plan import Certificate, Plan, Stage, is_layer
from autopar.search.block_problem import Problem
from autopar.search.mathopt import minimize
from autopar.search.other_plans import OtherPlan, other_plans
from autopar.sharding.joint import JointStrategy, joint_strategies, placement_text
from autopar.sharding.reshard import Collective
from autopar.sharding.rewrites import rewritten
from autopar.sharding.state import R, State, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import BlockCost, Charge, block_charges, block_cost
from autopar.simulate.class_costs import ClassCosts, CostAxis
from autopar.simulate.expert_costs import ExpertCosts
from autopar.simulate.stage_cost import class_costs_of, data_ranks, expert_axis, inner_axis, slowest_device

Choice = Mapping[str, JointStrategy]  # by op


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamState:
    """A parameter under its own name, its whole shape, and the placement in which it rests on the inner axes."""

    name: str
    shape: tuple[int, ...]
    placement: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpChoice:
    """What an op of weight does on an axis: `split` in words, its operands' and outputs' states, its time here."""

    op: str
    target: str
    module: str
    axis: str
    split: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The block with one op held to another split on one axis, all else chosen anew on that axis.

    `harm_s` is what it costs more a micro-batch, what storing its weights costs a step included where the plan's choice
    weighed that. It is below zero where the plan's choice was made for other rows, or was asked for.
    """

    op: str
    module: str
    axis: str
    split: str
    block_s: float
    harm_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTraffic:
    """What the data axes do for this block: a collective over `num_ranks`, so many times a step, `size_bytes` each."""

    what: str
    collective: Collective
    num_ranks: int
    times_a_step: int
    size_bytes: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A block of a plan: how it is sharded, what that costs a micro-batch, and what else would cost."""

    block: str
    cls: str
    num_blocks: int  # of the same class
    stage: int
    axes: tuple[tuple[str, int], ...]  # inner axes, outermost first
    rows: float
    cost: BlockCost
    params: tuple[ParamState, ...]
    ops: tuple[OpChoice, ...]
    charges: tuple[Charge, ...]
    alternatives: tuple[Alternative, ...]  # the least harm first
    data: tuple[DataTraffic, ...]
    others: tuple[OtherPlan, ...]
    certificate: Certificate | None
    notes: tuple[str, ...]

    @property
    def block_s(self) -> float:
        return block_s(self.cost)


def block_s(cost: BlockCost) -> float:
    """Seconds of a micro-batch through a block, forward and backward, without recomputation."""
    return (cost.forward_compute_s + cost.backward_compute_s
            + cost.forward_tp_comm_s + cost.backward_tp_comm_s)


def find_block(graph: ModelGraph, name: str = "") -> Block:
    """The block of this name, or the first of the class of this name; the first layer for "".

    InputError, with the names there are, for another name.
    """
    if not name:
        return next((block for block in graph.blocks if is_layer(block.name)), graph.blocks[0])
    for key in ("name", "cls"):
        for block in graph.blocks:
            if getattr(block, key) == name:
                return block
    blocks = [block.name for block in graph.blocks]
    listed = ", ".join(blocks if len(blocks) <= 6 else [*blocks[:3], "...", *blocks[-2:]])
    classes = ", ".join(dict.fromkeys(block.cls for block in graph.blocks))
    raise InputError(f"no block {name!r} to explain; the blocks are {listed}, their classes {classes}")


def explain(graph: ModelGraph, cluster: Cluster, plan: Plan, block: str = "") -> Explanation:
    """Why the plan shards a block (by its name or class; the first layer for "") as it does.

    InputError where the model has no such block.
    """
    found = find_block(graph, block)
    captured, graph = graph, rewritten(graph, plan.rewrites)
    index = next(i for i, s in enumerate(plan.stages) if s.first <= graph.blocks.index(found) < s.last)
    stage, cls = plan.stages[index], graph.block_class[found.cls]
    place = _Place.of(graph, cluster, plan, stage, cls)
    shardings = plan.class_shardings(cls.name, stage)
    cost = place.cost(shardings, compile_=plan.compile)
    alternatives, notes = place.alternatives(shardings, plan) if shardings else ((), ())
    notes = (*notes, *place.expert_notes(shardings, cost, plan))
    return Explanation(
        block=found.name, cls=cls.name, num_blocks=sum(other.cls == cls.name for other in graph.blocks), stage=index,
        axes=stage.mesh.inner, rows=place.costs.rows, cost=cost, params=_params(found, cls, shardings),
        ops=place.choices(shardings), charges=block_charges(place.costs, shardings) if shardings else (),
        alternatives=alternatives, data=_data_traffic(cluster, plan, stage, cost),
        others=other_plans(captured, cluster, plan), certificate=plan.certificate, notes=notes,
    )


def _params(block: Block, cls: BlockClass, shardings: Sequence[ClassSharding]) -> tuple[ParamState, ...]:
    return tuple(
        ParamState(
            name=name, shape=cls.tensor[local].shape,
            placement=placement_text(tuple(own.params[i] for own in shardings)) or str(R),
        )
        for i, (name, local) in enumerate(zip(block.params, cls.params, strict=True))
    )


def _is_weighty(cls: BlockClass, op: Op) -> bool:
    """Whether the op is a product, attention and the like, or reads a table of parameters."""
    if not any(cls.tensor[name].requires_grad for name in op.outputs if name):
        return False
    return bool(op.flops) or any(name in cls.params and len(cls.tensor[name].shape) > 1 for name in op.operands)


def split_text(cls: BlockClass, op: Op, inputs: Sequence[State], outputs: Sequence[State], factor: str) -> str:
    """What an axis does with an op, in words."""
    if not factor:
        return "not split: every rank does all of it"
    sharded = {name for name, state in zip(op.operands, inputs, strict=True) if str(state).startswith("S")}
    weights = [name for name in op.operands if name in cls.params]
    if any(str(state) == "P" for state in outputs):
        return "row split: each rank sums a part, partial sums are added" if sharded.intersection(weights) else (
            "split along what it sums over, partial sums are added"
        )
    if sharded.intersection(weights):
        return "column split: each rank makes a part of the features"
    names = {0: "rows", 1: "the sequence"} if weights else {}
    if op_kind(op.target) is OpKind.ATTENTION:
        names = {0: "rows", 1: "heads", 2: "the sequence"}
    dims = [state.dim for state in outputs if str(state).startswith("S")]
    if not dims:
        return f"split along its loop dimension {factor}"
    return f"split along {names[dims[0]]}" if dims[0] in names else f"split along dim {dims[0]} of its result"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A class where a stage runs it: what it costs there, and the search's options."""

    graph: ModelGraph
    cls: BlockClass
    costs: ClassCosts
    weighed: ClassCosts  # what ops and alternatives are weighed by: with the expert axis, where the block has experts
    axes: tuple[tuple[str, int], ...]
    expert_axis: CostAxis | None

    @staticmethod
    def of(graph: ModelGraph, cluster: Cluster, plan: Plan, stage: Stage, cls: BlockClass) -> _Place:
        mesh = stage.mesh
        device = slowest_device(cluster, stage.devices, plan.dtype)
        rows = plan.global_batch / (mesh.dp * plan.num_micro_batches)
        costs = class_costs_of(graph, cls, cluster, plan, stage, device=device, rows=rows)
        experts = expert_axis(cluster, stage)
        weighed = ExpertCosts(costs, experts) if experts is not None and expert_params(cls) else costs
        return _Place(graph=graph, cls=cls, costs=costs, weighed=weighed, axes=mesh.inner, expert_axis=experts)

    def cost(self, shardings: Sequence[ClassSharding], *, compile_: bool) -> BlockCost:
        return block_cost(
            self.graph, self.cls, shardings or None, tp=self.costs.tp, rows=self.costs.rows, device=self.costs.device,
            tp_group=self.costs.tp_group, dtype=self.costs.dtype, compile=compile_, outer=self.costs.outer,
            expert_axis=self.expert_axis,
        )

    def expert_notes(self, shardings: Sequence[ClassSharding], cost: BlockCost, plan: Plan) -> tuple[str, ...]:
        """What the expert axis does in this block."""
        if self.expert_axis is None or not any(cost.by_experts):
            return ()
        alone = replace(self, expert_axis=None).cost(shardings, compile_=plan.compile)
        forward_s = cost.forward_tp_comm_s - alone.forward_tp_comm_s
        backward_s = cost.backward_tp_comm_s - alone.backward_tp_comm_s
        return (
            f"{self.expert_axis.size} data ranks (ep) have the experts between them: tokens go to theirs and back, "
            f"{1e3 * forward_s:.3g} ms forward and {1e3 * backward_s:.3g} ms backward of what is said above",
        )

    def choices(self, shardings: Sequence[ClassSharding]) -> tuple[OpChoice, ...]:
        """What every op of weight does on every axis."""
        found = []
        for op in self.cls.ops:
            if not _is_weighty(self.cls, op):
                continue
            time = self.weighed.op_time(op, tuple(own.strategy[op.name] for own in shardings) or None)
            for (axis, _), own in zip(self.axes, shardings, strict=True):
                strategy = own.strategy[op.name]
                found.append(OpChoice(
                    op=op.name, target=op.target, module=op.module, axis=axis,
                    split=split_text(self.cls, op, strategy.inputs, strategy.outputs, strategy.factor),
                    inputs=tuple(map(str, strategy.inputs)), outputs=tuple(map(str, strategy.outputs)),
                    forward_s=time.forward_s, backward_s=time.backward_s,
                ))
        return tuple(found)

    def alternatives(
        self, shardings: Sequence[ClassSharding], plan: Plan
    ) -> tuple[tuple[Alternative, ...], tuple[str, ...]]:
        """For every op of weight and axis, the best block under each other split; and what to know of them."""
        strategies = joint_strategies(self.cls, self.costs.sizes)
        chosen = {op.name: self._option(op, strategies[op.name], shardings, plan) for op in self.cls.ops}
        boundary = tuple(shard(1) if name == "cp" or plan.sequence_parallel else R for name, _ in self.axes)
        notes = ["on an axis, the other axes' splits stay as they are"] if len(self.axes) > 1 else []
        found = []
        for at, (axis, _) in enumerate(self.axes):
            options = {
                name: [own for own in all_own if all(i == at or own[i] == chosen[name][i] for i in range(len(own)))]
                for name, all_own in strategies.items()
            }
            whole_params = tuple(name == "cp" for name, _ in self.axes)
            search = _AxisSearch(self, boundary, whole_params, at, axis, options, chosen, plan.compile)
            found += search.alternatives()
            if not search.is_optimal:
                notes.append(
                    f"on {axis} the search's own choice at {self.costs.rows:g} rows a micro-batch differs: this one "
                    f"was chosen for other rows, for parameters that blocks share, or was asked for"
                )
        return tuple(sorted(found, key=lambda item: (item.harm_s, item.axis, item.op, item.split))), tuple(notes)

    def _option(
        self, op: Op, options: Sequence[JointStrategy], shardings: Sequence[ClassSharding], plan: Plan
    ) -> JointStrategy:
        """The option, at captured rows, that the plan's strategy is."""
        wanted = tuple((s.inputs, s.outputs, s.lowering) for s in (own.strategy[op.name] for own in shardings))
        captured, rows = self.graph.rows, plan.micro_batch if self.graph.rows_are_tagged else self.graph.rows
        for option in options:
            own = [strategy.at_rows(captured, rows) for strategy in option]
            if tuple((s.inputs, s.outputs, s.lowering) for s in own) == wanted:
                return option
        raise InputError(
            f"the plan's strategy of {op.name} in {self.cls.name} is none that this version of autopar knows; plan anew"
        )


class _AxisSearch:
    """The exact search of one axis of a class, while the other axes' splits stay."""

    def __init__(
        self, place: _Place, boundary: tuple[State, ...], whole_params: tuple[bool, ...], at: int, axis: str,
        options: Mapping[str, Sequence[JointStrategy]], chosen: Choice, compile_: bool,
    ) -> None:
        self.place, self.boundary, self.whole_params = place, boundary, whole_params
        self.at, self.axis, self.options, self.chosen, self.compile = at, axis, options, chosen, compile_
        only = {name: (own,) for name, own in chosen.items()}
        # The planner weighs what storing weights costs a step, or does not: as the plan's choice is explained best.
        excess = {}
        for weight in (1.0, 0.0):
            own, best = self._solved(only, weight), self._solved(options, weight)
            excess[weight] = (own[0] - best[0]) if own is not None and best is not None else math.inf
        self.weight = min(excess, key=lambda weight: excess[weight])
        mine = self._solved(only, self.weight)
        self.cost_s = mine[0] if mine is not None else math.inf
        self.is_optimal = excess[self.weight] <= 1e-9 * self.cost_s

    def alternatives(self) -> list[Alternative]:
        cls = self.place.cls
        found = []
        for op in cls.ops:
            if not _is_weighty(cls, op):
                continue
            kinds: dict[str, list[JointStrategy]] = {}
            for own in self.options[op.name]:
                kinds.setdefault(self._kind(op, own), []).append(own)
            kinds.pop(self._kind(op, self.chosen[op.name]))
            for kind, held in kinds.items():
                solved = self._solved({**self.options, op.name: held}, self.weight)
                if solved is not None:
                    found.append(Alternative(
                        op=op.name, module=op.module, axis=self.axis, split=kind, harm_s=solved[0] - self.cost_s,
                        block_s=block_s(self.place.cost(solved[1], compile_=self.compile)),
                    ))
        return found

    def _kind(self, op: Op, own: JointStrategy) -> str:
        strategy = own[self.at]
        return split_text(self.place.cls, op, strategy.inputs, strategy.outputs, strategy.factor)

    def _solved(
        self, options: Mapping[str, Sequence[JointStrategy]], weight: float
    ) -> tuple[float, tuple[ClassSharding, ...]] | None:
        """The least that a block costs under these options, and its shardings; None where they allow none."""
        problem = Problem(
            self.place.cls, options, self.boundary, self.place.weighed, parameter_weight=weight,
            whole_params=self.whole_params,
        )
        if problem.impossible:
            return None
        found = minimize(problem.graph)
        return None if found is None else (found.cost, problem.shardings(found.values))


def _data_traffic(cluster: Cluster, plan: Plan, stage: Stage, cost: BlockCost) -> tuple[DataTraffic, ...]:
    """What gathering the block's parameters and reducing its gradients moves."""
    mesh = stage.mesh
    found: list[DataTraffic] = []
    for by_experts in (False, True):
        numel = sum(n for n, own in zip(cost.params, cost.by_experts, strict=True) if own is by_experts)
        if numel and mesh.dp * mesh.cp > 1:
            found += _traffic_of(cluster, plan, stage, numel, by_experts)
    return tuple(found)


def _traffic_of(
    cluster: Cluster, plan: Plan, stage: Stage, numel: float, by_experts: bool
) -> Iterator[DataTraffic]:
    zero, every, ranks = stage.zero, plan.num_micro_batches, data_ranks(stage, by_experts=by_experts)
    of_experts = " of experts" if by_experts else ""

    def traffic(what: str, kind: Collective, members: tuple[int, ...], times: int, size_bytes: float) -> DataTraffic:
        axis = inner_axis(cluster, members)
        return DataTraffic(
            what=what, collective=kind, num_ranks=axis.size, times_a_step=times, size_bytes=size_bytes,
            time_s=collective_time_s(kind, size_bytes, axis.group, groups_per_node=axis.groups_per_node),
        )

    if zero == 0:
        if len(ranks.whole) > 1:
            yield traffic(
                f"gradients{of_experts} are summed", Collective.ALL_REDUCE, ranks.whole, 1, GRADIENT_BYTES * numel
            )
        return
    if len(ranks.shard) > 1:
        yield traffic(f"parameters{of_experts} are gathered", Collective.ALL_GATHER, ranks.shard,
                      2 * every if zero == 3 else 1, DTYPE_BYTES[plan.dtype] * numel)
        yield traffic(f"gradients{of_experts} are summed, each rank keeps its part", Collective.REDUCE_SCATTER,
                      ranks.shard, every if zero > 1 else 1, GRADIENT_BYTES * numel)
    if len(ranks.copies) > 1:
        yield traffic(f"the parts{of_experts} are summed over the replicas", Collective.ALL_REDUCE, ranks.copies,
                      every if zero > 1 else 1, GRADIENT_BYTES * numel / len(ranks.shard))
