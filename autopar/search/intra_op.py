"""What a tensor axis does inside a block: the cheapest strategy of every op of a class, chosen exactly.

The choice is a factor graph. A variable is an op (its value a strategy) or a parameter (its value the state it is
stored in); a factor is a tensor: each state that some consumer wants and the tensor is not in costs one conversion,
forward and backward, however many consumers want it. Where a tensor has so many consumers that this table would be
large, one 0/1 variable a wanted state says that the conversion is made, which needs only tables of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.compute import OpTime
from autopar.graph.model_graph import BlockClass, TensorInfo
from autopar.search.elimination import Factor, FactorGraph, Table
from autopar.search.mathopt import minimize
from autopar.sharding.reshard import divides
from autopar.sharding.state import RP, Kind, R, State
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.class_costs import ClassCosts

JOINT_TABLE = 20_000  # entries; above, a tensor's conversions get variables of their own
# Among equally fast choices the one that stores fewer parameter bytes a device, and then the plainer states, wins.
# Both weights are far below any modelled time (a kernel launch is 1e-6 s) and above float64 rounding of a block's time.
_TIE_S_PER_ELEMENT = 1e-19
_TIE_S = 1e-15


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """Consumer `variable` wants the states in `wanted[value]` under each of its values."""

    variable: int
    wanted: tuple[frozenset[State], ...]


def is_hidden(info: TensorInfo) -> bool:
    """Whether a boundary tensor is a hidden state: it has a gradient and dims (batch, sequence, features)."""
    return info.requires_grad and len(info.shape) == 3


def boundary_state(info: TensorInfo, boundary: State) -> State:
    """The state in which a tensor passes between blocks: `boundary` for hidden states, whole for all else."""
    return boundary if is_hidden(info) else R


def shard_class(
    cls: BlockClass, strategies: Mapping[str, Sequence[Strategy]], boundary: State, costs: ClassCosts, *,
    parameter_weight: float = 1.0,
) -> ClassSharding | None:
    """The fastest sharding of the class with hidden states crossing its borders in state `boundary`.

    A micro-batch's time counts once, and what storing a parameter costs a step of one micro-batch
    (`ClassCosts.param_time_s`) counts `parameter_weight` times. At 1, weights are split wherever that pays in such a
    step; at 0, they are stored whole wherever a micro-batch is a little faster for it.
    None where no choice of strategies allows that boundary (a sequence that does not divide, say).
    """
    problem = Problem(cls, strategies, boundary, costs, parameter_weight=parameter_weight)
    if problem.impossible:
        return None
    found = minimize(problem.graph)
    return None if found is None else problem.sharding(found.values)


class Problem:
    """The factor graph of one class, and the way back from its values to a ClassSharding."""

    def __init__(
        self, cls: BlockClass, strategies: Mapping[str, Sequence[Strategy]], boundary: State, costs: ClassCosts, *,
        parameter_weight: float = 1.0,
    ) -> None:
        self.cls, self.boundary, self.costs, self.parameter_weight = cls, boundary, costs, parameter_weight
        self.strategies = [tuple(strategies[op.name]) for op in cls.ops]
        self.sizes: list[int] = [len(options) for options in self.strategies]
        self.factors: list[Factor] = []
        self.impossible = not all(self.sizes)
        self._wishes = self._collect_wishes()
        self._param_variable: dict[str, int] = {}
        self._param_states: dict[str, tuple[State, ...]] = {}
        for name in cls.params:
            self._param_states[name] = self._storable(name)
            self._param_variable[name] = len(self.sizes)
            self.sizes.append(len(self._param_states[name]))
        crossing = [cls.tensor[name] for name in (*cls.inputs, *cls.outputs)]
        self._hidden_shapes = {info.shape for info in crossing if is_hidden(info)}
        size = costs.tp
        self.impossible |= any(not divides(info.shape, boundary_state(info, boundary), size) for info in crossing)
        if not self.impossible:
            self._op_costs()
            for info in cls.tensors:
                self._tensor_costs(info)
        self.graph = FactorGraph(tuple(self.sizes), tuple(self.factors))

    def sharding(self, values: Sequence[int]) -> ClassSharding:
        """The choice that the values of the variables stand for."""
        tensor, cls = self.cls.tensor, self.cls
        return ClassSharding(
            cls=cls.name,
            inputs=tuple(boundary_state(tensor[name], self.boundary) for name in cls.inputs),
            params=tuple(self._param_states[name][values[self._param_variable[name]]] for name in cls.params),
            buffers=(R,) * len(cls.buffers),
            outputs=tuple(boundary_state(tensor[name], self.boundary) for name in cls.outputs),
            ops=tuple((op.name, self.strategies[i][values[i]]) for i, op in enumerate(cls.ops)),
        )

    def _collect_wishes(self) -> dict[str, list[_Wish]]:
        wishes: dict[str, list[_Wish]] = {}
        for index, op in enumerate(self.cls.ops):
            operands = op.operands
            for name in dict.fromkeys(operands):
                places = [i for i, operand in enumerate(operands) if operand == name]
                wanted = tuple(frozenset(s.inputs[i] for i in places) for s in self.strategies[index])
                wishes.setdefault(name, []).append(_Wish(variable=index, wanted=wanted))
        return wishes

    def _storable(self, name: str) -> tuple[State, ...]:
        """The states a parameter may rest in: those that its consumers want, sharded first."""
        wanted = {state for wish in self._wishes.get(name, ()) for states in wish.wanted for state in states}
        info = self.cls.tensor[name]
        states = {s for s in wanted if s.kind is not Kind.PARTIAL and divides(info.shape, s, self.costs.tp)} | {R}
        if not info.requires_grad:
            states.discard(RP)
        return tuple(sorted(states, key=_plainness))

    def _op_costs(self) -> None:
        for index, op in enumerate(self.cls.ops):
            options = self.strategies[index]
            times = (_sum(self.costs.op_time(op, s)) + _sum(self.costs.lowering_comm(op, s)) for s in options)
            table = np.array([t + _tie_break(s) for t, s in zip(times, options, strict=True)], dtype=np.float64)
            self.factors.append(Factor((index,), table))
        for name, variable in self._param_variable.items():
            prices = [self.parameter_s(name, state) for state in self._param_states[name]]
            self.factors.append(Factor((variable,), np.array(prices, dtype=np.float64)))

    def parameter_s(self, name: str, state: State) -> float:
        """What storing a parameter in a state is charged with."""
        info, costs = self.cls.tensor[name], self.costs
        stored = info.numel / (costs.tp if state.kind is Kind.SHARDED else 1)
        tie = stored * _TIE_S_PER_ELEMENT + (_TIE_S if state == RP else 0.0)
        return tie + self.parameter_weight * costs.param_time_s(name, state, num_micro_batches=1)

    def _tensor_costs(self, info: TensorInfo) -> None:
        """The conversions of one tensor, as one table or, where that is large, as pairs with 0/1 variables."""
        producer, have = self._origin(info)
        wishes = self._wishes.get(info.name, [])
        demanded = boundary_state(info, self.boundary) if info.name in self.cls.outputs else None
        wanted = {s for wish in wishes for states in wish.wanted for s in states}
        wanted |= {demanded} if demanded is not None else set()
        columns = sorted(wanted, key=_plainness)
        if not columns or not have:
            return
        fan_out = np.array([self.costs.fan_out_s(info.name, state) for state in have], dtype=np.float64)
        self.factors.append(Factor((producer,), fan_out) if producer is not None else Factor((), fan_out[0]))
        prices = self._prices(info, have, columns)
        variables = ([] if producer is None else [producer]) + [wish.variable for wish in wishes]
        if math.prod(self.sizes[v] for v in variables) <= JOINT_TABLE:
            self.factors.append(_joint(variables, prices, columns, producer is not None, wishes, demanded))
            return
        for column, state in enumerate(columns):
            price = prices[:, column]
            if state == demanded:
                own = variables[:1] if producer is not None else []
                self.factors.append(_joint(own, prices[:, [column]], [state], producer is not None, [], demanded))
                continue
            made = len(self.sizes)
            self.sizes.append(2)
            table = np.stack([np.zeros_like(price), price], axis=1)
            if producer is None:
                self.factors.append(Factor((made,), table[0]))
            else:
                self.factors.append(Factor((producer, made), table))
            for wish in wishes:
                lacking = np.zeros((len(wish.wanted), 2))
                lacking[[state in states for states in wish.wanted], 0] = np.inf
                if lacking.any():
                    self.factors.append(Factor((wish.variable, made), lacking))

    def _origin(self, info: TensorInfo) -> tuple[int | None, list[State]]:
        """The variable that decides the tensor's state and the state under each of its values."""
        if info.name in self._param_variable:
            return self._param_variable[info.name], list(self._param_states[info.name])
        op = self.cls.producer.get(info.name)
        if op is not None:
            index = self._op_index[op.name]
            place = op.outputs.index(info.name)
            return index, [strategy.outputs[place] for strategy in self.strategies[index]]
        if info.name in self.cls.inputs:
            return None, [boundary_state(info, self.boundary)]
        return None, [R]

    @property
    def _op_index(self) -> dict[str, int]:
        return {op.name: i for i, op in enumerate(self.cls.ops)}

    def _prices(self, info: TensorInfo, have: Sequence[State], columns: Sequence[State]) -> Table:
        known: dict[tuple[State, State], float] = {}
        for src in have:
            for dst in columns:
                if (src, dst) not in known:
                    known[src, dst] = self._price(info, src, dst)
        return np.array([[known[src, dst] for dst in columns] for src in have], dtype=np.float64)

    def _price(self, info: TensorInfo, src: State, dst: State) -> float:
        if src == dst:
            return 0.0
        size = self.costs.tp
        if not divides(info.shape, src, size) or not divides(info.shape, dst, size):
            return math.inf
        if dst.kind is Kind.SHARDED and self.boundary == R and info.shape in self._hidden_shapes:
            return math.inf  # without sequence parallelism the stream of hidden states stays whole inside a block too
        found = self.costs.conversion_time(info.name, src, dst)
        if found is None or (info.name in self._param_variable and _sum(found) > 0):
            return math.inf  # weights are used where they are stored; gathering them is the data axes' affair
        return _TIE_S + _sum(found)


def _joint(
    variables: Sequence[int], prices: Table, columns: Sequence[State], has_producer: bool, wishes: Sequence[_Wish],
    demanded: State | None,
) -> Factor:
    """One table over the producer and all consumers of a tensor."""
    first = [prices.shape[0]] if has_producer else []
    shape = [*first, *(len(wish.wanted) for wish in wishes)]
    table = np.zeros(shape)
    for column, state in enumerate(columns):
        mask: NDArray[np.bool_] = np.full(shape, state == demanded)
        for axis, wish in enumerate(wishes, start=len(first)):
            wants = np.array([state in states for states in wish.wanted])
            mask |= wants.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        price = prices[:, column].reshape([-1] + [1] * len(wishes)) if has_producer else prices[0, column]
        table += np.where(mask, price, 0.0)
    return Factor(tuple(variables), table)


def _sum(time: OpTime) -> float:
    return time.forward_s + time.backward_s


def _plainness(state: State) -> tuple[int, int, int]:
    order = (Kind.SHARDED, Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL)
    return order.index(state.kind), state.dim, state.outer


def _tie_break(strategy: Strategy) -> float:
    """A little for every state that is not plain, so that R wins over RP where nothing else tells them apart."""
    odd = sum(state.kind in (Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL) for state in strategy.outputs)
    return _TIE_S * odd
