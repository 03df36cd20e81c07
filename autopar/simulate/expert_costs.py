"""What ops cost where the ranks of an axis have the experts of a mixture between them."""

from __future__ import annotations

import math

from autopar.cost_models.compute import OpTime
from autopar.graph.expert_params import expert_params
from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import Op
from autopar.sharding.joint import JointStrategy, Placement
from autopar.sharding.lowering import Lowering
from autopar.sharding.state import Kind, State, shard
from autopar.sharding.strategy import Strategy
from autopar.simulate.class_costs import ClassCosts, CostAxis


def costs_at_all_rows(costs: ClassCosts, expert_axis: CostAxis) -> ClassCosts:
    """The costs at the rows of all ranks of the expert axis, which lies between the outer axes and the tensor axis."""
    return ClassCosts(
        costs.graph, costs.cls, tp=costs.tp, rows=costs.rows * expert_axis.size, device=costs.device,
        tp_group=costs.tp_group, dtype=costs.dtype, outer=(*costs.outer, expert_axis), pad=costs.pad,
    )


def with_expert_axis(costs: ClassCosts, op: Op, strategy: JointStrategy | None) -> JointStrategy:
    """The strategy of an op of `costs` over all rows of an expert axis, whose ranks have the experts between them."""
    token = shard(0)
    own = Strategy(
        factor="t+e", lowering=Lowering.EXPERT_EXCHANGE, outputs=(token,) * len(op.outputs),
        inputs=tuple(token for name in op.operands),
    )
    each, at = strategy or (), len(costs.outer)
    return (*each[:at], own, *each[at:])


class ExpertCosts(ClassCosts):
    """The costs of a class for a search over its inner axes, beside an expert axis that stays.

    The experts run on their tokens of all ranks, exchange included, and a rank stores its part of them. What would cut
    the experts of a rank into uneven parts takes for ever.
    """

    def __init__(self, costs: ClassCosts, expert_axis: CostAxis) -> None:
        super().__init__(
            costs.graph, costs.cls, tp=costs.tp, rows=costs.rows, device=costs.device, tp_group=costs.tp_group,
            dtype=costs.dtype, tp_groups_per_node=costs.tp_groups_per_node, outer=costs.outer, pad=costs.pad,
        )
        self._at_all_rows = costs_at_all_rows(costs, expert_axis)
        self._held, self._num_ranks = expert_params(costs.cls), expert_axis.size

    def op_time(self, op: Op, strategy: Strategy | JointStrategy | None = None) -> OpTime:
        if op.target != EXPERTS_OP:
            return super().op_time(op, strategy)
        if any(
            name in self._held and self.cls.tensor[name].shape[0] % (self._num_ranks * self._parts_of_experts(place))
            for name, place in zip(op.operands, self.placements(op, strategy)[0], strict=True)
        ):
            return OpTime(math.inf, math.inf)
        return self._at_all_rows.op_time(op, self._exact(op, strategy))

    def lowering_comm(self, op: Op, strategy: Strategy | JointStrategy | None) -> OpTime:
        if op.target != EXPERTS_OP:
            return super().lowering_comm(op, strategy)
        return self._at_all_rows.lowering_comm(op, self._exact(op, strategy))

    def param_time_s(self, name: str, state: State | Placement, num_micro_batches: int = 8) -> float:
        seconds = super().param_time_s(name, state, num_micro_batches)
        return seconds / self._num_ranks if name in self._held else seconds

    def _parts_of_experts(self, place: Placement) -> int:
        """Into how many parts the axes cut what a rank has of the experts, which lie along dim 0."""
        split = (state.kind is Kind.SHARDED and state.dim == 0 for state in place)
        return math.prod(size for size, is_split in zip(self.sizes, split, strict=True) if is_split)

    def _exact(self, op: Op, strategy: Strategy | JointStrategy | None) -> JointStrategy:
        return with_expert_axis(self, op, (strategy,) if isinstance(strategy, Strategy) else strategy)
