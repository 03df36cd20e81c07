"""What the mesh axes do inside a block: the cheapest strategy of every op, chosen exactly for all axes at once.

On one axis the factor graph of `block_problem` is eliminated. On several, good choices are found axis by axis and
by what a lower bound (`relaxed`) says of each strategy; those that it shows to cost more than the best are dropped; and
where that does not prove the best, what is left is solved exactly. Where too much is left, the gap is the answer's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import BlockClass
from autopar.search.block_problem import Problem, boundary_fits, kept_problem
from autopar.search.elimination import best_order
from autopar.search.mathopt import minimize
from autopar.search.pruning import branch_and_bound, prune
from autopar.search.relaxed import Relaxed
from autopar.sharding.joint import JointOptions, JointStrategy, Placement
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.class_costs import ClassCosts

log = logging.getLogger(__name__)
ROUNDS = 12  # of moving costs, dropping strategies and looking for a better choice among the likeliest
FEW = 400  # strategies of all ops together that are solved as they are
MANY, MANY_OF_TWO_AXES = 600, 2500  # and the most that are solved at all: on more axes conversions take longer
FEW_NODES = 4
PRUNE_TO = 1 << 20  # entries of the largest table of an elimination after values were dropped
_SAME = 1e-9  # of a cost, what rounding may add
_PROVED = 1e-6  # a gap that rounding may leave
_STALLED = 0.01  # of the gap: a round that closes less is the last


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
        cls, joint_of_one(strategies), (boundary,), costs, parameter_weight=parameter_weight
    )
    return None if found is None else found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The best sharding that was found, one ClassSharding an axis, and the cost that none can beat.

    `largest_table`: entries of the largest table that an elimination needed. `num_kept`: strategies of all ops together
    that a lower bound did not exclude.
    """

    shardings: tuple[ClassSharding, ...]
    cost_s: float
    lower_bound_s: float
    largest_table: int
    num_kept: int

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
    num_axes = len(boundary)
    whole = tuple(whole_params) or (False,) * num_axes
    search = _Search(cls, tuple(boundary), costs, parameter_weight, whole)
    if num_axes == 1:
        problem = search.problem(search.allowed(strategies)) if any(whole) else kept_problem(
            cls, strategies, search.boundary, costs, parameter_weight=parameter_weight, whole_params=whole
        )
        only = None if problem.impossible else minimize(problem.graph)
        if only is None:
            return None
        return Proved(
            shardings=problem.shardings(only.values), cost_s=only.cost, largest_table=only.largest_table,
            lower_bound_s=only.cost - only.unproved, num_kept=sum(map(len, strategies.values())),
        )
    options = search.allowed(strategies)
    if not all(map(len, options.values())) or not boundary_fits(cls, search.boundary, costs.sizes):
        return None
    return _Joint(search, options).best()


Rows = dict[str, int]  # of each op the row of its strategy among its options


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

    def allowed(self, options: Mapping[str, Sequence[JointStrategy]]) -> dict[str, JointOptions]:
        """The strategies that leave parameters whole where an axis must."""
        result: dict[str, JointOptions] = {}
        for op in self.cls.ops:
            own = JointOptions.of(options[op.name], len(self.boundary))
            places = [i for i, name in enumerate(op.operands) if name in self.cls.params]
            splits = np.array([any(s.inputs[i].kind is Kind.SHARDED for i in places) for s in own.strategies], np.bool_)
            stays = np.ones(len(own), dtype=np.bool_)
            for axis, whole in enumerate(self.whole_params):
                if whole and len(own):
                    stays &= ~splits[own.ids[:, axis]]
            result[op.name] = own if stays.all() else own.only(stays)
        return result

    def solved(
        self, options: Mapping[str, JointOptions], rows: Mapping[str, NDArray[np.intp]]
    ) -> tuple[float, Rows] | None:
        """The cheapest choice among these rows, its cost first; not proved to be where they are too many."""
        problem = self.problem({name: [options[name][int(i)] for i in own] for name, own in rows.items()})
        if problem.impossible:
            return None
        if len(self.boundary) > 1:
            values = branch_and_bound(problem.graph, max_nodes=FEW_NODES).values
        else:
            found = minimize(problem.graph)
            values = None if found is None else found.values
        if values is None:
            return None
        return problem.graph.cost(values), {
            op.name: int(rows[op.name][value]) for op, value in zip(self.cls.ops, values, strict=False)
        }

    def first_axes(self, count: int) -> _Search:
        """The same where only the first axes are there."""
        costs = self.costs if count == len(self.boundary) else self.costs.on_axes(self.costs.axes[:count])
        return _Search(self.cls, self.boundary[:count], costs, self.parameter_weight, self.whole_params[:count])


class _Joint:
    """The search over several axes: the best choice so far, with its cost, and the ways to better ones."""

    def __init__(self, search: _Search, options: Mapping[str, JointOptions]) -> None:
        self.search, self.options = search, options
        self.names = [op.name for op in search.cls.ops]
        self.num_axes = len(search.boundary)
        self.cost = math.inf
        self.rows: Rows | None = None
        self._solved: dict[tuple[bytes, ...], tuple[float, Rows] | None] = {}  # rounds often try the same again

    def best(self) -> Proved | None:
        """The best choice, and the bound that was proved."""
        self._start()
        relaxed = self.relaxed()
        self._narrow(relaxed)
        if math.isinf(relaxed.lower_bound):
            return None
        proved = self.cost - relaxed.lower_bound <= _SAME * self.cost
        most = MANY if self.num_axes > 2 else MANY_OF_TWO_AXES
        if self.rows is None or (not proved and relaxed.count <= most):
            return self._exactly(relaxed)
        problem = self.search.problem({name: [self.options[name][self.rows[name]]] for name in self.names})
        only = minimize(problem.graph)
        assert only is not None, "a choice that was found is one"
        return Proved(
            shardings=problem.shardings(only.values), cost_s=only.cost, largest_table=only.largest_table,
            lower_bound_s=min(relaxed.lower_bound, only.cost), num_kept=relaxed.count,
        )

    def relaxed(self) -> Relaxed:
        search = self.search
        return Relaxed(
            search.cls, self.options, search.boundary, search.costs, parameter_weight=search.parameter_weight,
            whole_params=search.whole_params,
        )

    def _start(self) -> None:
        """A choice axis by axis."""
        rows: Rows = {}
        found = None
        for count in range(1, self.num_axes + 1):
            some: dict[str, NDArray[np.intp]] = {}
            for name, own in self.options.items():
                left = self._agreeing(name, rows[name], range(count - 1)) if rows else np.arange(len(own))
                _, first = np.unique(own.ids[left, count - 1], return_index=True)
                some[name] = left[np.sort(first)]
            part = {name: JointOptions(own.strategies, own.ids[:, :count]) for name, own in self.options.items()}
            found = self.search.first_axes(count).solved(part, some)
            if found is None:
                return
            rows = found[1]
        assert found is not None, "there are axes"
        self.cost, self.rows = found

    def _narrow(self, relaxed: Relaxed) -> None:
        """Drops strategies until few are left, or no more can be."""
        gap = math.inf
        for number in range(ROUNDS):
            relaxed.sweep()
            if not number and math.isfinite(relaxed.lower_bound):
                relaxed.drop(self.cost)  # all that follows takes time by what is left
            relaxed.sweep()
            if math.isinf(relaxed.lower_bound):
                return
            self._improve(dict(zip(self.names, relaxed.likely(), strict=True)), relaxed.lower_bound)
            if self.cost - relaxed.lower_bound <= _SAME * self.cost:
                return
            before = relaxed.count
            relaxed.drop(self.cost)
            if relaxed.count <= FEW:
                return
            still = self.cost - relaxed.lower_bound
            if still > (1 - _STALLED) * gap and relaxed.count > (1 - _STALLED) * before:
                return
            gap = still

    def _improve(self, rows: Rows, lower_bound: float) -> None:
        """Takes a choice as it is, or with the strategies of each axis found anew while those of the others stay.

        One that costs no more than the bound is the best as it is.
        """
        best = self.cost, self.rows
        found = self._of({name: np.array([row]) for name, row in rows.items()})
        if found is None:
            return
        self.cost, self.rows = found
        for axis in range(self.num_axes):
            if self.cost - lower_bound <= _SAME * self.cost:
                break
            others = [other for other in range(self.num_axes) if other != axis]
            self._try({name: self._agreeing(name, self.rows[name], others) for name in self.names})
        if best[0] <= self.cost:
            self.cost, self.rows = best

    def _exactly(self, relaxed: Relaxed) -> Proved | None:
        """The optimum of what is left, or the gap that its search leaves."""
        kept = {name: [self.options[name][int(i)] for i in relaxed.rows[at]] for at, name in enumerate(self.names)}
        problem = self.search.problem(kept)
        if best_order(problem.graph)[1] > PRUNE_TO:
            pairs = self.search.problem(kept, relaxed=True)
            left = prune(pairs.graph, self.cost, max_table=PRUNE_TO)
            problem = self.search.problem({
                name: [kept[name][int(i)] for i in own] for name, own in zip(self.names, left.kept, strict=False)
            })
        found = branch_and_bound(problem.graph, self.cost)
        values = found.values
        if values is None:
            if self.rows is None:
                return None
            problem = self.search.problem({name: [self.options[name][self.rows[name]]] for name in self.names})
            only = minimize(problem.graph)
            assert only is not None, "a choice that was found is one"
            values = only.values
        return Proved(
            shardings=problem.shardings(values), cost_s=min(found.cost, self.cost),
            lower_bound_s=max(found.lower_bound, min(relaxed.lower_bound, self.cost)),
            largest_table=best_order(problem.graph)[1], num_kept=relaxed.count,
        )

    def _try(self, rows: Mapping[str, NDArray[np.intp]]) -> bool:
        """Takes the best choice among the rows where it is cheaper."""
        found = self._of(rows)
        if found is None or found[0] >= self.cost * (1 - 1e-12):
            return False
        self.cost, self.rows = found
        return True

    def _of(self, rows: Mapping[str, NDArray[np.intp]]) -> tuple[float, Rows] | None:
        """The cheapest choice among the rows, with its cost."""
        key = tuple(rows[name].tobytes() for name in self.names)
        if key not in self._solved:
            self._solved[key] = self.search.solved(self.options, rows)
        return self._solved[key]

    def _agreeing(self, name: str, row: int, axes: Sequence[int]) -> NDArray[np.intp]:
        """The rows with the same strategies on these axes."""
        ids, chosen = self.options[name].ids, list(axes)
        return np.flatnonzero((ids[:, chosen] == ids[row, chosen]).all(axis=1))


def joint_of_one(strategies: Mapping[str, Sequence[Strategy]]) -> dict[str, tuple[JointStrategy, ...]]:
    """Strategies on one axis as those of all axes at once."""
    return {name: tuple((strategy,) for strategy in found) for name, found in strategies.items()}


