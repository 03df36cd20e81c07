"""Cutting the chain of blocks into stages: the smallest bottleneck, by dynamic programming over all cuts.

Stages differ in what a block costs them (device speed, micro-batches in flight, memory), so each stage has its own
table of ranges: `table[first, last]` is the cost of blocks[first:last], infinity where the range is not allowed.

The searches read of each table a square, its *window*: `windows[s, first - starts[s], last - starts[s + 1]]`, so that a
stage's last index is the next stage's first; the last column of the last one is the chain's end. No stage is empty, so
that a stage never has blocks without which those before or after it would be: of n blocks in p stages, stage s begins
at s to s + n - p. Those are the `starts` where none are given (`every_start`); where few lengths of stages are allowed,
stages begin at fewer blocks (`few_starts`).
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
    table = running[None, :] - running[:, None]
    return np.where(np.tri(len(table), dtype=bool), np.inf, table)


def windows_of(tables: Sequence[Table]) -> Table:
    """The windows of one table a stage."""
    size = max(0, len(tables[0]) - len(tables))
    return np.stack([table[s : s + size, s + 1 : s + 1 + size] for s, table in enumerate(tables)])


def every_start(num_stages: int) -> NDArray[np.intp]:
    """The first block that each stage can begin at, and what would be that of the next one."""
    return np.arange(num_stages + 1)


def few_starts(shortest: NDArray[np.intp], longest: NDArray[np.intp], num_blocks: int) -> tuple[NDArray[np.intp], int]:
    """The starts of windows of all cuts into stages of these lengths, and the windows' size; 0 where there are none."""
    p = len(shortest)
    first, last = np.zeros(p + 1, dtype=np.intp), np.zeros(p + 1, dtype=np.intp)
    first[1:], last[1:] = np.cumsum(shortest), np.cumsum(longest)
    first = np.maximum(first, num_blocks - (last[-1] - last))
    last = np.minimum(last, num_blocks - (np.sum(shortest) - np.append(0, np.cumsum(shortest))))
    size = int((last - first).max()) + 1 if (first <= last).all() else 0
    first[-1] = num_blocks + 1 - size
    return first, size


def smallest_sum(windows: Table, starts: NDArray[np.intp] | None = None) -> Cut | None:
    """The cut with the smallest sum of `tables[s][range of s]`; None where none is allowed."""
    return least_sums(windows, starts)[1]


def least_sums(windows: Table, starts: NDArray[np.intp] | None = None) -> tuple[list[Table], Cut | None]:
    """By each stage's first block the smallest sum of what it and the stages after it take; and the smallest_sum."""
    if not windows.size:
        return [np.zeros(0)] * len(windows), None
    sums, choices = _backward(windows, np.add)
    return sums, _cut(float(sums[0][0]), choices[::-1], len(windows[0]), starts)


def least_worst(windows: Table) -> tuple[list[Table], list[NDArray[np.intp]]]:
    """By each stage's first block the smallest bottleneck of it and the stages after it; where the next one begins."""
    worst, choices = _backward(windows, np.maximum)
    return worst, choices[::-1]


def _backward(
    windows: Table, join: Callable[[Table, Table], Table]
) -> tuple[list[Table], list[NDArray[np.intp]]]:
    """By each stage's first block what all from it on take at least, first stage first; choices from the last one."""
    rows = np.arange(windows.shape[1])
    below = windows[-1][:, -1]
    found, choices = [below], list[NDArray[np.intp]]()
    for window in windows[-2::-1]:
        total = join(window, below)
        choice = np.argmin(total, axis=1)
        choices.append(choice)
        below = total[rows, choice]
        found.append(below)
    return found[::-1], choices


def smallest_bottleneck(
    windows: Table, first_extra: Table | None = None, starts: NDArray[np.intp] | None = None
) -> Cut | None:
    """The cut with the smallest `max_s tables[s][range of s] + first_extra[end of stage 0]`; None if none is allowed.

    No stage is empty. Among equals the first stages, which hold the most micro-batches, get the fewest blocks.
    """
    if not windows.size:
        return None
    size = windows.shape[1]
    extra = np.zeros(size) if first_extra is None else by_end(first_extra, size, starts)
    if len(windows) == 1:
        return _cut(float(windows[0, 0, -1] + extra[-1]), [], size, starts)
    worst, choices = least_worst(windows[1:])
    first = np.maximum(windows[0, 0], worst[0]) + extra
    choice = np.argmin(first)
    return _cut(float(first[choice]), [np.array([choice]), *choices], size, starts)


def by_end(of_block: Table, size: int, starts: NDArray[np.intp] | None = None) -> Table:
    """By the columns of the first stage's window what is given by the block that the next stage begins at."""
    first = 1 if starts is None else int(starts[1])
    return np.asarray(of_block[np.minimum(first + np.arange(size), len(of_block) - 1)])


def _cut(
    value: float, choices: Sequence[NDArray[np.intp]], size: int, starts: NDArray[np.intp] | None = None
) -> Cut | None:
    """The cut of windows of this size that the choices of where stages end lead to, first stage first."""
    return None if math.isinf(value) else Cut(cut_of(choices, size, starts), value)


def cut_of(
    choices: Sequence[NDArray[np.intp]], size: int, starts: NDArray[np.intp] | None = None
) -> tuple[int, ...]:
    """The borders that the choices lead to: where each stage but the last ends, by where it begins, in windows."""
    starts = every_start(len(choices) + 1) if starts is None else starts
    cuts, at = [0], 0
    for start, choice in zip(starts[1:].tolist(), choices, strict=False):
        at = int(choice[at])
        cuts.append(at + start)
    return (*cuts, size - 1 + int(starts[-1]))
