"""The factor graph of a block on one or several mesh axes, and the way back from its values to shardings.

A variable is an op (its value a strategy) or a parameter (its value the state it is stored in); a factor is a tensor:
each state that some consumer wants and the tensor is not in costs one conversion, forward and backward, however many
consumers want it. Where a tensor has so many consumers that this table would be large, one 0/1 variable a wanted state
says that the conversion is made, which needs only tables of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.compute import OpTime
from autopar.graph.model_graph import BlockClass, TensorInfo
from autopar.search.elimination import Factor, FactorGraph, Table
from autopar.sharding.joint import JointStrategy, Placement, can_be_placed, replicated
from autopar.sharding.state import RP, Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.class_costs import ClassCosts

# Entries; above, a tensor's conversions get variables of their own. Several axes have too many states for that.
JOINT_TABLE = {1: 20_000, 2: 1 << 22}
NARROW = 0.7  # a consumer's placements get a variable where they are fewer than this share of its strategies
# Among equally fast choices the one that stores fewer parameter bytes a device, and then the plainer states, wins.
# Both weights are far below any modelled time (a kernel launch is 1e-6 s) and above float64 rounding of a block's time.
_TIE_S_PER_ELEMENT = 1e-19
_TIE_S = 1e-15
_HEIGHT = 2  # of images: (rows, channels, height, ...)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """Consumer `variable` wants the placements in `wanted[value]` under each of its values."""

    variable: int
    wanted: tuple[frozenset[Placement], ...]


def is_hidden(info: TensorInfo) -> bool:
    """Whether a boundary tensor is a hidden state: it has a gradient and dims (batch, sequence, features)."""
    return info.requires_grad and len(info.shape) == 3


def is_image(info: TensorInfo) -> bool:
    """Whether a boundary tensor has a gradient, rows, channels and at least two dims of positions."""
    return info.requires_grad and len(info.shape) >= 4 and info.shape[0] > 1


def boundary_placement(info: TensorInfo, boundary: Placement, sizes: Sequence[int]) -> Placement:
    """The placement in which a tensor passes between blocks: `boundary` for hidden states, whole for all else.

    Where hidden states pass as parts of their sequence, images pass as parts of their height, on each axis whose size
    divides it: they become smaller from block to block until it does not.
    """
    if is_hidden(info):
        return boundary
    if not is_image(info):
        return replicated(len(boundary))
    found: list[State] = []
    height = info.shape[_HEIGHT]
    for state, size in zip(boundary, sizes, strict=True):
        split = state == shard(1) and height % size == 0
        found.append(shard(_HEIGHT) if split else R)
        height //= size if split else 1
    return tuple(found)


def boundary_fits(cls: BlockClass, boundary: Placement, sizes: Sequence[int]) -> bool:
    """Whether every tensor that crosses the block's borders can be placed as they have it."""
    crossing = [cls.tensor[name] for name in (*cls.inputs, *cls.outputs)]
    return all(can_be_placed(info.shape, boundary_placement(info, boundary, sizes), sizes) for info in crossing)


def hidden_shapes(cls: BlockClass) -> frozenset[tuple[int, ...]]:
    """The shapes of the hidden states that cross the block's borders.

    Without sequence parallelism the stream of hidden states stays whole inside a block too.
    """
    return frozenset(cls.tensor[name].shape for name in (*cls.inputs, *cls.outputs) if is_hidden(cls.tensor[name]))


def parameter_s(costs: ClassCosts, name: str, place: Placement, weight: float) -> float:
    """What storing a parameter in a placement is charged with."""
    tie = costs.local(name, place).numel * _TIE_S_PER_ELEMENT + sum(_TIE_S for state in place if state == RP)
    return tie + weight * costs.param_time_s(name, place, num_micro_batches=1)


def may_rest(info: TensorInfo, place: Placement, whole_params: Sequence[bool], sizes: Sequence[int]) -> bool:
    """Whether a parameter may be stored so; on some axes it must be whole."""
    for state, whole in zip(place, whole_params, strict=True):
        if state.kind is Kind.PARTIAL or (whole and state.kind is Kind.SHARDED):
            return False
        if state == RP and not info.requires_grad:
            return False
    return can_be_placed(info.shape, place, sizes)


class Problem:
    """The factor graph of one class, and the way back from its values to a ClassSharding an axis.

    `relaxed`: a tensor whose table would be too large gets a pair of tables for each consumer instead, which together
    cost no more than its conversions do: the optimum is then a lower bound.
    """

    def __init__(
        self, cls: BlockClass, strategies: Mapping[str, Sequence[JointStrategy]], boundary: Placement,
        costs: ClassCosts, *, parameter_weight: float = 1.0, whole_params: Sequence[bool] = (),
        relaxed: bool = False,
    ) -> None:
        self.cls, self.boundary, self.costs, self.parameter_weight = cls, boundary, costs, parameter_weight
        self._whole_params = tuple(whole_params) or (False,) * len(boundary)
        self._whole = replicated(len(boundary))
        self.strategies = [tuple(strategies[op.name]) for op in cls.ops]
        self._placed = [
            [costs.placements(op, own) for own in found] for op, found in zip(cls.ops, self.strategies, strict=True)
        ]
        self._op_index = {op.name: i for i, op in enumerate(cls.ops)}
        self._relaxed = relaxed
        self.sizes: list[int] = [len(options) for options in self.strategies]
        self.factors: list[Factor] = []
        self.impossible = not all(self.sizes)
        self._wishes = self._collect_wishes()
        self._param_variable: dict[str, int] = {}
        self._param_states: dict[str, tuple[Placement, ...]] = {}
        for name in cls.params:
            self._param_states[name] = self._storable(name)
            self._param_variable[name] = len(self.sizes)
            self.sizes.append(len(self._param_states[name]))
        self._hidden_shapes = hidden_shapes(cls)
        self.impossible |= not boundary_fits(cls, boundary, costs.sizes)
        if not self.impossible:
            self._op_costs()
            for info in cls.tensors:
                self._tensor_costs(info)
        self.graph = FactorGraph(tuple(self.sizes), tuple(self.factors))

    def choice(self, values: Sequence[int]) -> dict[str, JointStrategy]:
        """Each op's strategy."""
        return {op.name: self.strategies[i][values[i]] for i, op in enumerate(self.cls.ops)}

    def shardings(self, values: Sequence[int]) -> tuple[ClassSharding, ...]:
        """The choice that the values of the variables stand for, one an axis."""
        cls = self.cls
        entering, leaving = (
            [boundary_placement(cls.tensor[name], self.boundary, self.costs.sizes) for name in names]
            for names in (cls.inputs, cls.outputs)
        )
        return tuple(
            ClassSharding(
                cls=cls.name,
                inputs=tuple(placement[axis] for placement in entering),
                params=tuple(self._param_states[name][values[self._param_variable[name]]][axis] for name in cls.params),
                buffers=(R,) * len(cls.buffers),
                outputs=tuple(placement[axis] for placement in leaving),
                ops=tuple((op.name, self.strategies[i][values[i]][axis]) for i, op in enumerate(cls.ops)),
            )
            for axis in range(len(self.boundary))
        )

    def _collect_wishes(self) -> dict[str, list[_Wish]]:
        wishes: dict[str, list[_Wish]] = {}
        for index, op in enumerate(self.cls.ops):
            operands = op.operands
            for name in dict.fromkeys(operands):
                places = [i for i, operand in enumerate(operands) if operand == name]
                wanted = tuple(frozenset(inputs[i] for i in places) for inputs, _ in self._placed[index])
                wishes.setdefault(name, []).append(_Wish(variable=index, wanted=wanted))
        return wishes

    def _storable(self, name: str) -> tuple[Placement, ...]:
        """The placements a parameter may rest in: those that its consumers want, sharded first."""
        wanted = {state for wish in self._wishes.get(name, ()) for states in wish.wanted for state in states}
        info = self.cls.tensor[name]
        found = {place for place in wanted if may_rest(info, place, self._whole_params, self.costs.sizes)}
        return tuple(sorted({*found, self._whole}, key=_plainness))

    def _op_costs(self) -> None:
        for index, op in enumerate(self.cls.ops):
            prices = [
                _sum(self.costs.op_time(op, own)) + _sum(self.costs.lowering_comm(op, own)) + _tie_break(placed[1])
                for own, placed in zip(self.strategies[index], self._placed[index], strict=True)
            ]
            self.factors.append(Factor((index,), np.array(prices, dtype=np.float64)))
        self.factors += self._param_costs()

    def _param_costs(self) -> list[Factor]:
        return [
            Factor((variable,), np.array([self.parameter_s(name, place) for place in self._param_states[name]]))
            for name, variable in self._param_variable.items()
        ]

    def weighed(self, parameter_weight: float) -> Problem:
        """The same with another weight of what storing parameters is charged with."""
        if self.impossible or parameter_weight == self.parameter_weight:
            return self
        made = copy(self)
        made.parameter_weight = parameter_weight
        first = len(self.cls.ops)  # the factors of parameters come after those of ops
        made.factors = list(self.factors)
        made.factors[first : first + len(self._param_variable)] = made._param_costs()
        made.graph = FactorGraph(self.graph.sizes, tuple(made.factors))
        return made

    def parameter_s(self, name: str, place: Placement) -> float:
        """What storing a parameter in a placement is charged with."""
        return parameter_s(self.costs, name, place, self.parameter_weight)

    def _tensor_costs(self, info: TensorInfo) -> None:
        """The conversions of one tensor, as one table or, where that is large, as pairs with 0/1 variables."""
        producer, have = self._origin(info)
        wishes = self._wishes.get(info.name, [])
        leaves = info.name in self.cls.outputs
        demanded = boundary_placement(info, self.boundary, self.costs.sizes) if leaves else None
        wanted = {s for wish in wishes for states in wish.wanted for s in states}
        wanted |= {demanded} if demanded is not None else set()
        columns = sorted(wanted, key=_plainness)
        if not columns or not have:
            return
        fan_out = np.array([self.costs.fan_out_s(info.name, state) for state in have], dtype=np.float64)
        self.factors.append(Factor((producer,), fan_out) if producer is not None else Factor((), fan_out[0]))
        prices = self._prices(info, have, columns)
        if len(self.boundary) > 1 and len(wishes) > 1:
            wishes = [self._narrowed(wish) for wish in wishes]
        variables = ([] if producer is None else [producer]) + [wish.variable for wish in wishes]
        if math.prod(self.sizes[v] for v in variables) <= JOINT_TABLE[min(len(self.boundary), 2)]:
            self.factors.append(_joint(variables, prices, columns, producer is not None, wishes, demanded))
            return
        if self._relaxed:
            self._relax(prices, columns, producer, wishes, demanded)
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

    def _relax(
        self, prices: Table, columns: Sequence[Placement], producer: int | None, wishes: Sequence[_Wish],
        demanded: Placement | None,
    ) -> None:
        """The dearest conversion costs at least the mean over consumers: each has its share in a table of its own."""
        shares = len(wishes) + (demanded is not None)
        first = [] if producer is None else [producer]
        if demanded is not None:
            own = prices[:, [columns.index(demanded)]] / shares
            self.factors.append(_joint(first, own, [demanded], producer is not None, [], demanded))
        for wish in wishes:
            variables = [*first, wish.variable]
            self.factors.append(_joint(variables, prices / shares, columns, producer is not None, [wish], None))

    def _narrowed(self, wish: _Wish) -> _Wish:
        """The wish of a variable of its own that has one value a set of placements, tied to the op's variable."""
        distinct = list(dict.fromkeys(wish.wanted))
        if len(distinct) > NARROW * len(wish.wanted):
            return wish
        variable = len(self.sizes)
        self.sizes.append(len(distinct))
        place = {states: i for i, states in enumerate(distinct)}
        tie = np.full((len(wish.wanted), len(distinct)), np.inf)
        tie[np.arange(len(wish.wanted)), [place[states] for states in wish.wanted]] = 0.0
        self.factors.append(Factor((wish.variable, variable), tie))
        return _Wish(variable=variable, wanted=tuple(distinct))

    def _origin(self, info: TensorInfo) -> tuple[int | None, list[Placement]]:
        """The variable that decides the tensor's placement and the placement under each of its values."""
        if info.name in self._param_variable:
            return self._param_variable[info.name], list(self._param_states[info.name])
        op = self.cls.producer.get(info.name)
        if op is not None:
            index = self._op_index[op.name]
            place = op.outputs.index(info.name)
            return index, [outputs[place] for _, outputs in self._placed[index]]
        if info.name in self.cls.inputs:
            return None, [boundary_placement(info, self.boundary, self.costs.sizes)]
        return None, [self._whole]

    def _prices(self, info: TensorInfo, have: Sequence[Placement], columns: Sequence[Placement]) -> Table:
        """What conversions cost, infinity where there is none, from each placement to each."""
        is_param, sizes, name = info.name in self._param_variable, self.costs.sizes, info.name
        whole_axes = [state == R for state in self.boundary] if info.shape in self._hidden_shapes else []
        allowed = [
            can_be_placed(info.shape, dst, sizes)
            and not any(whole and state.kind is Kind.SHARDED for whole, state in zip(whole_axes, dst, strict=False))
            for dst in columns
        ]

        def price(src: Placement, dst: Placement, *, may: bool) -> float:
            if src == dst:
                return 0.0
            found = self.costs.conversion_time(name, src, dst) if may else None
            if found is None or (is_param and _sum(found) > 0):
                return math.inf  # weights are used where they are stored; gathering them is the data axes' affair
            return _TIE_S + _sum(found)

        rows: dict[Placement, NDArray[np.float64]] = {}
        if len(self.boundary) == 1:  # as few states are met again and again, in the rewrites of a class most of all
            whole = self.costs.whole(name)
            key = whole.size_bytes, whole.element_bytes, whole.requires_grad, info.shape, is_param, *allowed, *columns
            rows = self.costs.price_rows.setdefault(key, rows)
        for src in have:
            if src not in rows:
                is_placed = can_be_placed(info.shape, src, sizes)
                rows[src] = np.array(
                    [price(src, dst, may=may and is_placed) for dst, may in zip(columns, allowed, strict=True)]
                )
        return np.array([rows[src] for src in have], dtype=np.float64)


_kept: dict[tuple[object, ...], tuple[object, Problem]] = {}
_MOST_KEPT = 32  # as many as the rewrites of a class that are weighed in turn, and more


def kept_problem(
    cls: BlockClass, strategies: Mapping[str, Sequence[JointStrategy]], boundary: Placement, costs: ClassCosts, *,
    parameter_weight: float, whole_params: Sequence[bool],
) -> Problem:
    """The problem, not made anew where one of the last differs in nothing but the weight."""
    key = id(cls), id(strategies), id(costs), boundary, tuple(whole_params)
    if key not in _kept:
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        made = Problem(
            cls, strategies, boundary, costs, parameter_weight=parameter_weight, whole_params=whole_params
        )
        # What the key has ids of is kept with it, so that no id is used again.
        _kept[key] = (cls, strategies, costs), made
    return _kept[key][1].weighed(parameter_weight)


def _joint(
    variables: Sequence[int], prices: Table, columns: Sequence[Placement], has_producer: bool, wishes: Sequence[_Wish],
    demanded: Placement | None,
) -> Factor:
    """One table over the producer and all consumers of a tensor."""
    first = [prices.shape[0]] if has_producer else []
    shape = [*first, *(len(wish.wanted) for wish in wishes)]
    if len(wishes) == 1 and demanded is None and all(len(states) == 1 for states in wishes[0].wanted):
        place = {state: column for column, state in enumerate(columns)}
        chosen = prices[:, [place[next(iter(states))] for states in wishes[0].wanted]]
        return Factor(tuple(variables), chosen if has_producer else chosen[0])
    table = np.zeros(shape)
    for column, state in enumerate(columns):
        mask: NDArray[np.bool_] = np.full(shape[len(first):], state == demanded)
        for axis, wish in enumerate(wishes):
            wants = np.array([state in states for states in wish.wanted])
            mask |= wants.reshape([-1 if i == axis else 1 for i in range(len(wishes))])
        if not has_producer:
            table += np.where(mask, prices[0, column], 0.0)
        else:
            table[:, mask] += prices[:, [column]]
    return Factor(tuple(variables), table)


def _sum(time: OpTime) -> float:
    return time.forward_s + time.backward_s


def _plainness(place: Placement) -> tuple[tuple[int, int, int], ...]:
    order = (Kind.SHARDED, Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL)
    return tuple((order.index(state.kind), state.dim, state.outer) for state in place)


def _tie_break(outputs: Sequence[Placement]) -> float:
    """A little for every state that is not plain, so that R wins over RP where nothing else tells them apart."""
    odd = (Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL)
    return _TIE_S * sum(state.kind in odd for place in outputs for state in place)
