"""A bound of 1F1B over all cuts that counts the loops between a stage and the last one, and a cut that promises much.

A stage sends as many micro-batches ahead as it has in flight, and then waits for the first to come back before it sends
the next: a backward on the last stage leads to one on this stage, to its next forward, and with that to the last stage
again (see `simulate/closed_form.py`). With m micro-batches, k of them in flight on the stage, that loop is gone round
ceil((m - k) / k) times at least, each time for all that this stage and those after it take, beside the first
micro-batch's way through all stages.

That sum and the largest load of a stage pull in different directions: early stages are quick where they have few
layers, for they hold the most micro-batches and recompute or offload the more. So the cuts are parted by their largest
load; each part has the least sums of its own, and the part of the smallest bound is parted on.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.search.balance import cut_of, least_sums, least_worst, smallest_bottleneck
from autopar.search.elimination import Table

MAX_TABLES = 256  # of one stage and one part, that are made
NARROW = 0.002  # relative to the bound; parts of a smaller width are not parted
MAX_MOVES = 400  # of borders that are tried to make a cut better


@dataclass(frozen=True, slots=True)
class LeastTime:
    """What no cut is below, and the cut that promises most; infinite and None where none is below the limit."""

    bound_s: float
    cuts: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineBound:
    """Stages that are alike but for what they hold; windows of tables over ranges of blocks (see `balance`).

    `works`: what the first micro-batch takes; `laters`: what those after it take beside that; `owns`: all that a stage
    does in a step. `once`, by the end of stage 0: what counts once a step; `once_alone`: the same where what variants
    add to the first micro-batch does not count in `works`, which then sum to `chain_s`.
    """

    works: Table
    laters: Table
    owns: Table
    once: Table
    once_alone: Table
    chain_s: float
    num_micro_batches: int

    @cached_property
    def rounds_between(self) -> Table:
        """rounds[first, last]: how often the loop between two stages is gone round; see `rounds_between`."""
        return rounds_between(len(self.works), self.num_micro_batches)

    def least(self, limit_s: float = np.inf) -> LeastTime:
        """The bound over all cuts, infinite where none is below the limit, and the most promising cut."""
        alone, least = smallest_bottleneck(self.owns), smallest_bottleneck(self.laters)
        most = float(np.max(self.laters, initial=0.0, where=np.isfinite(self.laters)))
        most = min(most, limit_s - self.chain_s)  # of loads; with a larger one no cut is below the limit
        if alone is None or least is None or least.value > most:
            return LeastTime(np.inf, None)
        parts: list[tuple[float, float, float]] = []
        tried: list[tuple[int, ...]] = []
        self._add(parts, tried, least.value, most)
        for _ in range(max(4, MAX_TABLES // len(self.works) // 2)):
            if not parts or max(parts[0][0], alone.value) >= limit_s:
                break
            bound, lower, upper = parts[0]
            if upper - lower <= NARROW * bound:
                break
            heapq.heappop(parts)
            middle = (lower + upper) / 2
            self._add(parts, tried, lower, middle, bound)
            self._add(parts, tried, middle, upper, bound)
        if not parts:
            return LeastTime(np.inf, None)
        best, bound = min(tried, key=lambda cuts: (self.time_s(cuts), cuts)), max(parts[0][0], alone.value)
        return LeastTime(bound, self._moved(best) if bound < limit_s else best)

    def _add(
        self, parts: list[tuple[float, float, float]], tried: list[tuple[int, ...]], lower: float, upper: float,
        known_s: float = 0.0,
    ) -> None:
        """Adds the cuts whose largest load is in a range, if any: their bound first, at least what is known of it."""
        fits = self.laters <= upper * (1 + 1e-12)
        works, size = np.where(fits, self.works, np.inf), self.works.shape[1]
        suffixes, quickest = least_sums(works)
        if quickest is None:
            return
        loads = np.where(fits, self.laters, np.inf)
        rounds = self.rounds_between[:, -1]
        for load, suffix, count in zip(loads, suffixes, rounds, strict=True):
            if count:
                np.maximum(load, (count * suffix)[:, None], out=load)
        worst, nexts = least_worst(loads[1:])
        # By the end of stage 0: the first micro-batch's time, and the largest load or loop.
        through = works[0, 0] + suffixes[1]
        load = np.maximum(np.maximum(loads[0, 0], worst[0]), lower)
        if rounds[0]:
            load = np.maximum(load, rounds[0] * through)
        once, alone = self.once[1 : size + 1], self.once_alone[1 : size + 1]
        bounds = np.maximum(load + once + through, load + alone + self.chain_s)
        first = np.argmin(bounds)
        if not np.isfinite(bounds[first]):
            return
        tried += [cut_of([np.array([first]), *nexts], size), quickest.cuts]
        heapq.heappush(parts, (max(known_s, float(bounds[first])), lower, upper))

    def time_s(self, cuts: Sequence[int]) -> float:
        """The bound of one cut, with the loops between any two of its stages."""
        at = np.arange(len(self.works))
        spans = at, np.array(cuts[:-1]) - at, np.array(cuts[1:]) - at - 1
        return cut_time_s(
            self.works[spans], self.laters[spans], self.owns[spans], float(self.once[cuts[1]]), self.rounds_between
        )

    def _moved(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
        """The cut with its borders moved one by one while that makes its bound smaller."""
        best, moves, improved = (self.time_s(cuts), cuts), 0, True
        while improved and moves < MAX_MOVES:
            improved = False
            for border in range(1, len(cuts) - 1):
                for step in (-4, -2, -1, 1, 2, 4):
                    at = best[1][border] + step
                    if not best[1][border - 1] < at < best[1][border + 1]:
                        continue
                    moves += 1
                    own = (*best[1][:border], at, *best[1][border + 1:])
                    if (found := self.time_s(own)) < best[0] * (1 - 1e-12):
                        best, improved = (found, own), True
        return best[1]


def rounds_between(num_stages: int, num_micro_batches: int) -> Table:
    """rounds[first, last]: how often the loop between two stages is gone round; 0 where last is not behind first.

    As many micro-batches go round together as the first has in flight beside those that the last has.
    """
    p, m = num_stages, num_micro_batches
    in_flight = np.minimum(p - np.arange(p), m)
    ahead = np.maximum(in_flight[:, None] - in_flight[None, :] + 1, 1)
    return np.asarray(np.triu(-(-(m - in_flight[:, None]) // ahead), 1), dtype=np.float64)


def cut_time_s(works: Table, laters: Table, owns: Table, once_s: float, rounds: Table) -> float:
    """The bound of one cut by what each of its stages takes, with the loops between any two of them."""
    passed = np.concatenate([[0.0], np.cumsum(works)])
    worst = float(laters.max())
    if not np.isfinite(passed[-1] + worst):
        return np.inf
    loops = rounds * (passed[None, 1:] - passed[:-1, None])
    return float(max(owns.max(), max(worst, loops.max()) + passed[-1] + once_s))
