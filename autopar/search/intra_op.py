"""What the mesh axes do inside a block: the cheapest strategy of every op, chosen exactly for all axes at once.

The choice is a factor graph. A variable is an op (its value a strategy) or a parameter (its value the state it is
stored in); a factor is a tensor: each state that some consumer wants and the tensor is not in costs one conversion,
forward and backward, however many consumers want it. Where a tensor has so many consumers that this table would be
large, one 0/1 variable a wanted state says that the conversion is made, which needs only tables of pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.compute import OpTime
from autopar.graph.model_graph import BlockClass, Op, TensorInfo
from autopar.search.elimination import MAX_TABLE, Factor, FactorGraph, Table, best_order
from autopar.search.mathopt import minimize
from autopar.search.pruning import branch_and_bound, prune, tightest
from autopar.sharding.joint import JointStrategy, Placement, can_be_placed, replicated
from autopar.sharding.state import RP, Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.class_costs import ClassCosts

log = logging.getLogger(__name__)
# Entries; above, a tensor's conversions get variables of their own. Several axes have too many states for that.
JOINT_TABLE = {1: 20_000, 2: 1 << 22}
FEW_PASSES, FEW_NODES = 8, 4
PRUNE_TO = 1 << 20  # entries of the largest table of an elimination after values were dropped
NARROW = 0.7  # a consumer's placements get a variable where they are fewer than this share of its strategies
# Among equally fast choices the one that stores fewer parameter bytes a device, and then the plainer states, wins.
# Both weights are far below any modelled time (a kernel launch is 1e-6 s) and above float64 rounding of a block's time.
_TIE_S_PER_ELEMENT = 1e-19
_TIE_S = 1e-15
_PROVED = 1e-6  # a gap that rounding may leave
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
    found = shard_class_jointly(
        cls, _joint_of_one(strategies), (boundary,), costs, parameter_weight=parameter_weight
    )
    return None if found is None else found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The best sharding that was found, one ClassSharding an axis, and the cost that none can beat.

    `largest_table`: entries of the largest table that an elimination needed.
    """

    shardings: tuple[ClassSharding, ...]
    cost_s: float
    lower_bound_s: float
    largest_table: int

    @property
    def gap(self) -> float:
        return (self.cost_s - self.lower_bound_s) / self.lower_bound_s if self.lower_bound_s else 0.0


def shard_class_jointly(
    cls: BlockClass, strategies: Mapping[str, Sequence[JointStrategy]], boundary: Placement, costs: ClassCosts, *,
    parameter_weight: float = 1.0, whole_params: Sequence[bool] = (),
) -> tuple[ClassSharding, ...] | None:
    """The fastest sharding over all axes of `costs` at once, one ClassSharding an axis; see `shard_class`.

    `whole_params` says of each axis whether it must leave every parameter whole, as an axis that splits tokens does:
    its ranks then share the data axes' sharding of parameters.
    """
    found = best_sharding(
        cls, strategies, boundary, costs, parameter_weight=parameter_weight, whole_params=whole_params
    )
    if found is None:
        return None
    if found.gap > _PROVED:
        log.warning("the sharding of %s is proved to be within %.2g%% of the fastest only", cls.name, 100 * found.gap)
    return found.shardings


def best_sharding(
    cls: BlockClass, strategies: Mapping[str, Sequence[JointStrategy]], boundary: Placement, costs: ClassCosts, *,
    parameter_weight: float = 1.0, whole_params: Sequence[bool] = (),
) -> Proved | None:
    """What `shard_class_jointly` finds, with its proof."""
    if any(whole_params):
        strategies = {
            op.name: [own for own in strategies[op.name] if _leaves_whole(op, own, cls.params, whole_params)]
            for op in cls.ops
        }
    search = _Search(cls, tuple(boundary), costs, parameter_weight, tuple(whole_params) or (False,) * len(boundary))
    if len(boundary) == 1:
        problem = search.problem(strategies)
        only = None if problem.impossible else minimize(problem.graph)
        if only is None:
            return None
        return Proved(
            shardings=problem.shardings(only.values), cost_s=only.cost, largest_table=only.largest_table,
            lower_bound_s=only.cost - only.unproved,
        )
    known = search.axis_by_axis(strategies)
    relaxed = search.problem(strategies, relaxed=True)
    if relaxed.impossible:
        return None
    upper = known[0].graph.cost(known[1]) if known else math.inf
    first = prune(relaxed.graph, upper, max_table=PRUNE_TO, passes=FEW_PASSES)
    near = tightest(first, upper, MAX_TABLE)
    better = None if near is None else search.solved({
        op.name: [strategies[op.name][first.kept[at][i]] for i in near[at]] for at, op in enumerate(cls.ops)
    })
    if better is not None and (cost := better[0].graph.cost(better[1])) < upper:
        known, upper = better, cost
    second = prune(first.graph, upper, max_table=PRUNE_TO)
    kept = [old[new] for old, new in zip(first.kept, second.kept, strict=True)]
    exact = search.problem({op.name: [strategies[op.name][i] for i in kept[at]] for at, op in enumerate(cls.ops)})
    found = branch_and_bound(exact.graph, upper)
    best = known if found.values is None else (exact, found.values)
    if best is None:
        return None
    return Proved(
        shardings=best[0].shardings(best[1]), cost_s=min(found.cost, upper), lower_bound_s=found.lower_bound,
        largest_table=best_order(exact.graph)[1],
    )


def _leaves_whole(op: Op, own: JointStrategy, params: Sequence[str], whole_params: Sequence[bool]) -> bool:
    return not any(
        whole and state.kind is Kind.SHARDED and name in params
        for one, whole in zip(own, whole_params, strict=True)
        for name, state in zip(op.operands, one.inputs, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """Searches of one class with all or some of the strategies and axes."""

    cls: BlockClass
    boundary: Placement
    costs: ClassCosts
    parameter_weight: float
    whole_params: tuple[bool, ...]

    def problem(self, options: Mapping[str, Sequence[JointStrategy]], *, relaxed: bool = False) -> Problem:
        return Problem(
            self.cls, options, self.boundary, self.costs, parameter_weight=self.parameter_weight,
            whole_params=self.whole_params, relaxed=relaxed,
        )

    def solved(self, options: Mapping[str, Sequence[JointStrategy]]) -> tuple[Problem, tuple[int, ...]] | None:
        """The optimum over these strategies."""
        problem = self.problem(options)
        if problem.impossible:
            return None
        if len(self.boundary) > 1:
            values = branch_and_bound(problem.graph, max_nodes=FEW_NODES).values
        else:
            found = minimize(problem.graph)
            values = None if found is None else found.values
        return None if values is None else (problem, values)

    def axis_by_axis(
        self, strategies: Mapping[str, Sequence[JointStrategy]]
    ) -> tuple[Problem, tuple[int, ...]] | None:
        """A good choice: the first axis by itself, the next beside it, and then each anew while the others stay."""
        num_axes = len(self.boundary)
        fixed: dict[str, JointStrategy] = {}
        found = None
        for count in range(1, num_axes + 1):
            costs = self.costs.of_first_axes(count) if count < num_axes else self.costs
            part = _Search(self.cls, self.boundary[:count], costs, self.parameter_weight, self.whole_params[:count])
            options: dict[str, list[JointStrategy]] = {}
            for name, all_own in strategies.items():
                firsts = dict.fromkeys(own[:count] for own in all_own)
                options[name] = [own for own in firsts if not fixed or own[: count - 1] == fixed[name]]
            found = part.solved(options)
            if found is None:
                return None
            fixed = found[0].choice(found[1])
        for axis in range(num_axes):
            options = {
                name: [
                    own for own in all_own
                    if all(i == axis or one == fixed[name][i] for i, one in enumerate(own))
                ] for name, all_own in strategies.items()
            }
            better = self.solved(options)
            if better is not None:
                found, fixed = better, better[0].choice(better[1])
        return found


def _joint_of_one(strategies: Mapping[str, Sequence[Strategy]]) -> dict[str, tuple[JointStrategy, ...]]:
    return {name: tuple((strategy,) for strategy in found) for name, found in strategies.items()}


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
        crossing = [cls.tensor[name] for name in (*cls.inputs, *cls.outputs)]
        self._hidden_shapes = {info.shape for info in crossing if is_hidden(info)}
        self.impossible |= any(
            not can_be_placed(info.shape, boundary_placement(info, boundary, costs.sizes), costs.sizes)
            for info in crossing
        )
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
        found = {place for place in wanted if self._may_rest(info, place)} | {self._whole}
        return tuple(sorted(found, key=_plainness))

    def _may_rest(self, info: TensorInfo, place: Placement) -> bool:
        for state, whole in zip(place, self._whole_params, strict=True):
            if state.kind is Kind.PARTIAL or (whole and state.kind is Kind.SHARDED):
                return False
            if state == RP and not info.requires_grad:
                return False
        return can_be_placed(info.shape, place, self.costs.sizes)

    def _op_costs(self) -> None:
        for index, op in enumerate(self.cls.ops):
            prices = [
                _sum(self.costs.op_time(op, own)) + _sum(self.costs.lowering_comm(op, own)) + _tie_break(placed[1])
                for own, placed in zip(self.strategies[index], self._placed[index], strict=True)
            ]
            self.factors.append(Factor((index,), np.array(prices, dtype=np.float64)))
        for name, variable in self._param_variable.items():
            prices = [self.parameter_s(name, place) for place in self._param_states[name]]
            self.factors.append(Factor((variable,), np.array(prices, dtype=np.float64)))

    def parameter_s(self, name: str, place: Placement) -> float:
        """What storing a parameter in a placement is charged with."""
        costs = self.costs
        tie = costs.local(name, place).numel * _TIE_S_PER_ELEMENT + sum(_TIE_S for state in place if state == RP)
        return tie + self.parameter_weight * costs.param_time_s(name, place, num_micro_batches=1)

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
        # Without sequence parallelism the stream of hidden states stays whole inside a block too.
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
        for src in have:
            if src not in rows:
                is_placed = can_be_placed(info.shape, src, sizes)
                rows[src] = np.array(
                    [price(src, dst, may=may and is_placed) for dst, may in zip(columns, allowed, strict=True)]
                )
        return np.array([rows[src] for src in have], dtype=np.float64)


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
