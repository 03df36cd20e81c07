"""Cutting the chain of blocks into stages: the smallest bottleneck, by dynamic programming over all cuts.

Stages differ in what a block costs them (device speed, micro-batches in flight, memory), so each stage has its own
table of ranges: `table[first, last]` is the cost of blocks[first:last], infinity where the range is not allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.search.elimination import Table


@dataclass(frozen=True, slots=True)
class Cut:
    """Stage s has blocks[cuts[s]:cuts[s + 1]]; `value` is what was minimized."""

    cuts: tuple[int, ...]
    value: float


def range_sums(costs: Table) -> Table:
    """table[i, j]: the sum of costs[i:j]; infinity where the range is empty."""
    running = np.concatenate([[0.0], np.cumsum(costs)])
    return _only_ranges(running[None, :] - running[:, None])


def range_maxima(costs: Table) -> Table:
    """table[i, j]: the largest of costs[i:j], which are at least 0; infinity where the range is empty."""
    n = len(costs)
    table = np.zeros((n + 1, n + 1))
    table[:n, 1:] = np.maximum.accumulate(np.triu(np.broadcast_to(costs, (n, n))), axis=1)
    return _only_ranges(table)


def _only_ranges(table: Table) -> Table:
    return np.where(np.tri(len(table), dtype=bool), np.inf, table)


def smallest_sum(tables: Sequence[Table]) -> Cut | None:
    """The cut with the smallest sum of `tables[s][range of s]`; None where none is allowed."""
    return least_sums(tables)[1]


def least_sums(tables: Sequence[Table]) -> tuple[list[Table], Cut | None]:
    """By each stage's first block the smallest sum of what it and the stages after it take; and the smallest_sum."""
    sums, choices = _backward(tables, np.add)
    return sums, _cut(float(sums[0][0]), choices, len(tables[0]) - 1)


def least_worst(tables: Sequence[Table]) -> tuple[list[Table], list[NDArray[np.intp]]]:
    """By each stage's first block the smallest bottleneck of it and the stages after it; where the next one begins."""
    worst, choices = _backward(tables, np.maximum)
    return worst, choices[::-1]


def _backward(
    tables: Sequence[Table], join: Callable[[Table, Table], Table]
) -> tuple[list[Table], list[NDArray[np.intp]]]:
    """By each stage's first block what all from it on take at least, first stage first; choices from the last one."""
    num_blocks = len(tables[0]) - 1
    below = tables[-1][:, num_blocks]
    found, choices = [below], list[NDArray[np.intp]]()
    for table in reversed(tables[:-1]):
        total = join(table, below[None, :])
        choice = np.argmin(total, axis=1)
        choices.append(choice)
        below = total[np.arange(num_blocks + 1), choice]
        found.append(below)
    return found[::-1], choices


def smallest_bottleneck(tables: Sequence[Table], first_extra: Table | None = None) -> Cut | None:
    """The cut with the smallest `max_s tables[s][range of s] + first_extra[end of stage 0]`; None if none is allowed.

    No stage is empty. Among equals the first stages, which hold the most micro-batches, get the fewest blocks.
    """
    num_blocks = len(tables[0]) - 1
    below = tables[-1][:, num_blocks]
    choices: list[NDArray[np.intp]] = []
    for table in reversed(tables[:-1]):
        worst = np.maximum(table, below[None, :])
        if len(choices) == len(tables) - 2 and first_extra is not None:
            worst[0] += first_extra
        choice = np.argmin(worst, axis=1)
        choices.append(choice)
        below = worst[np.arange(num_blocks + 1), choice]
    value = float(below[0])
    if len(tables) == 1 and first_extra is not None:
        value += float(first_extra[num_blocks])
    return _cut(value, choices, num_blocks)


def _cut(value: float, choices: Sequence[NDArray[np.intp]], num_blocks: int) -> Cut | None:
    """The cut that the choices of the next stage's first block lead to, chosen from the last stage to the first."""
    if math.isinf(value):
        return None
    cuts = [0]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return Cut((*cuts, num_blocks), value)
