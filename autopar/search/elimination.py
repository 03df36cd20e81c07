"""Exact minimum of a sum of small tables, by variable elimination (Bertele and Brioschi, 1972; bucket elimination).

A FactorGraph has variables 0..n-1 with finite domains and factors, each a table over a few variables; the cost of an
assignment is the sum of its table entries, and infinity forbids. Eliminating a variable joins the tables that mention
it and minimizes it out; the largest joined table decides the cost, and the order is chosen to keep it small.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
MAX_TABLE = 1 << 22  # entries of one joined table: 32 MiB of float64


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """`table[i, j, ...]` is the cost when `variables` (distinct) take the values i, j, ..."""

    variables: tuple[int, ...]
    table: Table


@dataclass(frozen=True, slots=True, eq=False)
class FactorGraph:
    """`sizes[v]` is the number of values of variable v."""

    sizes: tuple[int, ...]
    factors: tuple[Factor, ...]

    def cost(self, values: tuple[int, ...]) -> float:
        """The cost of a whole assignment."""
        return math.fsum(float(f.table[tuple(values[v] for v in f.variables)]) for f in self.factors)


@dataclass(frozen=True, slots=True)
class Assignment:
    """An optimal assignment and its cost; `largest_table` is 0 where another solver found it.

    `unproved`: how much cheaper another may be, where no solver came to an end.
    """

    values: tuple[int, ...]
    cost: float
    largest_table: int
    unproved: float = 0.0


class TableTooLargeError(Exception):
    """The best order found joins a table of more entries than allowed."""

    def __init__(self, entries: int, limit: int) -> None:
        super().__init__(f"elimination needs a table of {entries} entries, the limit is {limit}")
        self.entries = entries


def eliminate(graph: FactorGraph, *, max_table: int = MAX_TABLE) -> Assignment | None:
    """The cheapest assignment, or None where every one is forbidden; TableTooLargeError beyond `max_table` entries.

    Deterministic: ties go to the smaller value of the variable that is eliminated later.
    """
    order, largest = best_order(graph)
    if largest > max_table:
        raise TableTooLargeError(largest, max_table)
    tables: list[Factor | None] = list(graph.factors)
    scopes = [factor.variables for factor in graph.factors]  # with variables of one value, which joined tables lack
    mentions: list[list[int]] = [[] for _ in graph.sizes]
    for index, factor in enumerate(graph.factors):
        for variable in factor.variables:
            mentions[variable].append(index)
    constant = math.fsum(float(f.table) for f in graph.factors if not f.variables)
    trail: list[tuple[int, tuple[int, ...], NDArray[np.intp]]] = []
    for variable in order:
        bucket: list[Factor] = []
        found_scope: set[int] = set()
        for index in mentions[variable]:
            table = tables[index]
            if table is not None:
                bucket.append(table)
                found_scope.update(scopes[index])
                tables[index] = None
        scope = sorted(found_scope - {variable})
        free = [v for v in scope if graph.sizes[v] > 1]  # numpy has few dims
        joined = _join([variable, *free], graph.sizes, bucket)
        choice = np.argmin(joined, axis=0)
        trail.append((variable, tuple(free), choice))
        reduced = np.min(joined, axis=0)
        if scope:
            for v in scope:
                mentions[v].append(len(tables))
            tables.append(Factor(tuple(free), reduced))
            scopes.append(tuple(scope))
        else:
            constant += float(reduced)
    if not math.isfinite(constant):
        return None
    values = [0] * len(graph.sizes)
    for variable, given, choice in reversed(trail):
        values[variable] = int(choice[tuple(values[v] for v in given)])
    found = tuple(values)
    return Assignment(found, graph.cost(found), largest)


def _join(scope: list[int], sizes: tuple[int, ...], factors: list[Factor]) -> Table:
    """The sum of the factors over the scope, which may lack variables of one value."""
    place = {variable: i for i, variable in enumerate(scope)}
    total: Table = np.zeros([sizes[v] for v in scope])
    for factor in factors:
        own = [variable for variable in factor.variables if variable in place]
        axes = sorted(range(len(own)), key=lambda axis: place[own[axis]])
        shape = [1] * len(scope)
        for variable in own:
            shape[place[variable]] = sizes[variable]
        total += factor.table.reshape([sizes[v] for v in own]).transpose(axes).reshape(shape)
    return total


def best_order(graph: FactorGraph) -> tuple[tuple[int, ...], int]:
    """An elimination order and the entries of its largest table: the better of min-fill and min-weight."""
    return _best_order(graph.sizes, frozenset(frozenset(factor.variables) for factor in graph.factors))


@lru_cache(maxsize=256)
def _best_order(sizes: tuple[int, ...], scopes: frozenset[frozenset[int]]) -> tuple[tuple[int, ...], int]:
    candidates = [_greedy_order(sizes, scopes, by_fill=by_fill) for by_fill in (True, False)]
    return min(candidates, key=lambda found: found[1])


def _greedy_order(
    sizes: tuple[int, ...], scopes: frozenset[frozenset[int]], *, by_fill: bool
) -> tuple[tuple[int, ...], int]:
    neighbours: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for variable in scope:
            neighbours[variable] |= scope - {variable}

    def price(variable: int) -> tuple[int, int, int]:
        around = sorted(neighbours[variable])
        fill = sum(1 for a, b in itertools.combinations(around, 2) if b not in neighbours[a])
        weight = sizes[variable] * math.prod(sizes[v] for v in around)
        return (fill, weight, variable) if by_fill else (weight, fill, variable)

    prices = {variable: price(variable) for variable in range(len(sizes))}
    order: list[int] = []
    largest = 1
    while prices:
        variable = min(prices, key=prices.__getitem__)
        del prices[variable]
        order.append(variable)
        around = neighbours[variable]
        largest = max(largest, sizes[variable] * math.prod(sizes[v] for v in around))
        touched = set(around)
        for a in around:
            neighbours[a].discard(variable)
            neighbours[a].update(around - {a})
        for a in around:
            touched |= neighbours[a]
        for a in touched:
            prices[a] = price(a)
    return tuple(order), largest
