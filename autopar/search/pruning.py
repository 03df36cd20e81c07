"""Values that no optimal assignment of a factor graph takes, found by a lower bound: what makes wide graphs narrow.

Costs are moved between tables and variables without changing the cost of any assignment (sequential reweighted message
passing, Kolmogorov 2015), so that the sum of all minima, a lower bound, rises. A value whose own lower bound is above
the cost of a known assignment is dropped. The optimum stays: only assignments that cost more are lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.search.elimination import Factor, FactorGraph, Table, best_order, eliminate

PASSES = 60
WIDE_TABLE = 1 << 23  # entries of one joined table: 64 MiB of float64
MAX_NODES = 100
STALLED = 1e-3  # of the gap: a lower bound that rises by less in four passes is done
_SLACK = 1e-9  # of the upper bound: what rounding may take from a lower bound


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """The graph with fewer values: value i of variable v is `kept[v][i]` of the given graph.

    `lower_bound` holds for the given graph. `slack` is how much above it each kept value's own lower bound is.
    """

    graph: FactorGraph
    kept: tuple[NDArray[np.intp], ...]
    lower_bound: float
    slack: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Bounded:
    """The best assignment found (None: every one is forbidden or costs more than was known), and what none can beat."""

    values: tuple[int, ...] | None
    cost: float
    lower_bound: float

    @property
    def proved(self) -> bool:
        """Whether nothing is left that could be cheaper."""
        return self.cost - self.lower_bound <= _SLACK * abs(self.cost) if np.isfinite(self.cost) else (
            self.lower_bound == np.inf)


def branch_and_bound(
    graph: FactorGraph, upper_bound: float = np.inf, *, max_table: int = WIDE_TABLE, max_nodes: int = MAX_NODES
) -> Bounded:
    """The cheapest assignment of a graph that is too wide to eliminate: prune, eliminate what is left, or halve it.

    Only assignments below `upper_bound` are looked for. Where `max_nodes` subproblems do not suffice, the best is
    returned with a lower bound below its cost.
    """
    best: tuple[int, ...] | None = None
    upper = upper_bound
    whole = tuple(np.arange(size) for size in graph.sizes)
    queue: list[tuple[float, int, FactorGraph, tuple[NDArray[np.intp], ...]]] = [(-np.inf, 0, graph, whole)]
    made = 1
    while queue and made <= max_nodes:
        bound, _, current, kept = heapq.heappop(queue)
        if bound >= upper - _SLACK * abs(upper):
            continue
        if best_order(current)[1] > max_table:
            pruned = prune(current, upper, max_table=max_table)
            bound = max(bound, pruned.lower_bound)
            if (np.isinf(bound) and bound > 0) or bound >= upper - _SLACK * abs(upper):
                continue
            current = pruned.graph
            kept = tuple(old[new] for old, new in zip(kept, pruned.kept, strict=True))
            if best_order(current)[1] > max_table:
                tight = tightest(pruned, min(upper, pruned.lower_bound * 2), max_table)
                found = None if tight is None else eliminate(_restricted(current, tight), max_table=max_table)
                if found is not None and found.cost < upper:
                    upper = found.cost
                    best = tuple(int(a[b[i]]) for a, b, i in zip(kept, tight or (), found.values, strict=True))
                    heapq.heappush(queue, (bound, made, current, kept))
                    made += 1
                    continue
                for half in _halves(current):
                    part = _restricted(current, half)
                    queue_kept = tuple(old[new] for old, new in zip(kept, half, strict=True))
                    heapq.heappush(queue, (bound, made, part, queue_kept))
                    made += 1
                continue
        found = eliminate(current, max_table=max_table)
        if found is not None and found.cost < upper:
            upper = found.cost
            best = tuple(int(own[value]) for own, value in zip(kept, found.values, strict=True))
    lower = min((entry[0] for entry in queue), default=upper)  # what was left aside is above `upper`
    return Bounded(best, upper, min(lower, upper))


def tightest(pruned: Pruned, upper: float, max_table: int) -> tuple[NDArray[np.intp], ...] | None:
    """Of each variable the values with the least slack, as many as elimination can take; None where that is too few."""
    gap = upper - pruned.lower_bound
    for share in (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-6):
        kept = tuple(np.flatnonzero(slack <= share * gap) for slack in pruned.slack)
        if all(len(own) for own in kept) and best_order(_restricted(pruned.graph, kept))[1] <= max_table:
            return kept
    return None


def _halves(graph: FactorGraph) -> Iterator[tuple[NDArray[np.intp], ...]]:
    """The variable with most values among those of large tables, its values in two halves."""
    weight = [0] * len(graph.sizes)
    for factor in graph.factors:
        for variable in factor.variables:
            weight[variable] += len(factor.variables) - 1
    variable = max(range(len(weight)), key=lambda v: (graph.sizes[v] > 1, weight[v] * graph.sizes[v], -v))
    unary = np.zeros(graph.sizes[variable])
    for factor in graph.factors:
        if variable in factor.variables:
            axis = factor.variables.index(variable)
            unary = unary + factor.table.min(axis=tuple(i for i in range(factor.table.ndim) if i != axis))
    order = np.argsort(unary, kind="stable")
    middle = len(order) // 2
    for half in (np.sort(order[:middle]), np.sort(order[middle:])):
        yield tuple(half if v == variable else np.arange(size) for v, size in enumerate(graph.sizes))


def _restricted(graph: FactorGraph, kept: Sequence[NDArray[np.intp]]) -> FactorGraph:
    factors = []
    for factor in graph.factors:
        table = factor.table
        for axis, variable in enumerate(factor.variables):
            if len(kept[variable]) < table.shape[axis]:
                table = np.take(table, kept[variable], axis=axis)
        factors.append(Factor(factor.variables, table))
    return FactorGraph(tuple(len(own) for own in kept), tuple(factors))


@dataclass(slots=True)
class _Messages:
    sizes: list[int]
    variables: list[tuple[int, ...]]
    tables: list[Table]
    unary: list[Table]
    kept: list[NDArray[np.intp]]
    mentions: list[list[int]] = field(default_factory=list)


def prune(graph: FactorGraph, upper_bound: float, *, max_table: int, passes: int = PASSES) -> Pruned:
    """Drops values that cost more than `upper_bound` until elimination needs no table beyond `max_table` entries.

    Or until `passes` are over, or the lower bound has met the upper one.
    """
    order, _ = best_order(graph)
    position = {variable: i for i, variable in enumerate(order)}
    state = _start(graph, position)
    constant = sum(float(f.table) for f in graph.factors if not f.variables)
    limit = upper_bound + _SLACK * abs(upper_bound) if np.isfinite(upper_bound) else np.inf
    lower = before = -np.inf
    for number in range(passes):
        _sweep(state, order, forward=True)
        _sweep(state, order[::-1], forward=False)
        lower = constant + _total(state)
        if lower >= limit:
            break
        if number % 4 == 3 or number == 0:
            dropped = _drop(state, lower, limit)
            if dropped and best_order(_restricted(graph, state.kept))[1] <= max_table:
                break
            if (np.isfinite(upper_bound) and upper_bound - lower <= _SLACK * abs(upper_bound)) or (
                not dropped and lower - before <= STALLED * (upper_bound - lower)
            ):
                break
            before = lower
    slack = tuple(_own_bounds(state, v) for v in range(len(state.sizes)))
    return Pruned(
        _restricted(graph, state.kept), tuple(state.kept), min(lower, upper_bound),
        tuple(_minus(own, np.full_like(own, own.min())) for own in slack),
    )


def _start(graph: FactorGraph, position: dict[int, int]) -> _Messages:
    """Tables with their variables in elimination order, and the tables of one variable apart."""
    unary = [np.zeros(size) for size in graph.sizes]
    variables: list[tuple[int, ...]] = []
    tables: list[Table] = []
    for factor in graph.factors:
        if len(factor.variables) == 1:
            unary[factor.variables[0]] = unary[factor.variables[0]] + factor.table
        elif factor.variables:
            axes = sorted(range(len(factor.variables)), key=lambda i: position[factor.variables[i]])
            variables.append(tuple(factor.variables[i] for i in axes))
            tables.append(factor.table.transpose(axes).copy())
    kept: list[NDArray[np.intp]] = [np.arange(size) for size in graph.sizes]
    state = _Messages(list(graph.sizes), variables, tables, unary, kept)
    state.mentions = [[] for _ in graph.sizes]
    for index, own in enumerate(variables):
        for variable in own:
            state.mentions[variable].append(index)
    return state


def _along(values: Table, axis: int, rank: int) -> Table:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def _minus(values: Table, taken: Table) -> Table:
    """The difference, where what is forbidden stays forbidden."""
    return np.where(np.isinf(taken), np.inf, values - np.where(np.isinf(taken), 0.0, taken))


def _sweep(state: _Messages, order: tuple[int, ...], *, forward: bool) -> None:
    """Every variable takes what the tables behind it know, and shares it out to those ahead."""
    first, last = (0, -1) if forward else (-1, 0)
    for variable in order:
        ahead, behind = [], []
        for index in state.mentions[variable]:
            own = state.variables[index]
            if own[last] != variable:
                ahead.append(index)
            if own[first] != variable:
                behind.append(index)
        unary = state.unary[variable]
        for index in behind:
            table = state.tables[index]
            axis = state.variables[index].index(variable)
            others = tuple(i for i in range(table.ndim) if i != axis)
            message = table.min(axis=others)
            unary = unary + message
            state.tables[index] = _minus(table, _along(message, axis, table.ndim))
        if ahead:
            share = unary / max(len(ahead), len(behind))
            for index in ahead:
                table = state.tables[index]
                state.tables[index] = table + _along(share, state.variables[index].index(variable), table.ndim)
            unary = _minus(unary, share * len(ahead))
        state.unary[variable] = unary


def _total(state: _Messages) -> float:
    return sum(float(unary.min()) for unary in state.unary) + sum(float(table.min()) for table in state.tables)


def _own_bounds(state: _Messages, variable: int) -> Table:
    """What the tables at a variable add up to at least, for each of its values."""
    own = state.unary[variable].copy()
    for index in state.mentions[variable]:
        table = state.tables[index]
        axis = state.variables[index].index(variable)
        own = own + table.min(axis=tuple(i for i in range(table.ndim) if i != axis))
    return own


def _drop(state: _Messages, lower: float, limit: float) -> bool:
    """Removes every value whose own lower bound is above `limit`; whether there were any."""
    dropped = False
    for variable in range(len(state.sizes)):
        own = _own_bounds(state, variable)
        least = float(state.unary[variable].min())
        least += sum(float(state.tables[index].min()) for index in state.mentions[variable])
        stays = np.flatnonzero((lower - least + own <= limit) & np.isfinite(own))
        if 0 < len(stays) < state.sizes[variable]:
            dropped = True
            state.sizes[variable] = len(stays)
            state.kept[variable] = state.kept[variable][stays]
            state.unary[variable] = state.unary[variable][stays]
            for index in state.mentions[variable]:
                axis = state.variables[index].index(variable)
                state.tables[index] = np.take(state.tables[index], stays, axis=axis)
    return dropped
