"""A bound of 1F1B over all cuts that counts the loops between a stage and the last one, and a cut that promises much.

A stage sends as many micro-batches ahead as it has in flight, and then waits for the first to come back before it sends
the next: a backward on the last stage leads to one on this stage, to its next forward, and with that to the last stage
again (see `simulate/closed_form.py`). With m micro-batches, k of them in flight on the stage, that loop is gone round
(m - 1 - k) // k times and once more, each time for all that this stage and those after it take, beside the first
micro-batch's way through all stages. The rounds that are left, or all of them but those of one loop, may be on the
slowest of these stages instead (`spare_rounds`).

Nor does a stage end before it has gathered its parameters, done that first micro-batch with all behind it, borne the
largest load or loop among them, and summed its gradients. Only the first stage's ends count in the sum above, so that a
first stage of few weights would seem to spare the others' ends.

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
from numpy.typing import NDArray

from autopar.search.balance import by_end, cut_of, every_start, least_sums, least_worst, smallest_bottleneck
from autopar.search.elimination import Table

MAX_TABLES = 256  # of one stage and one part, that are made
NARROW = 0.002  # relative to the bound; parts of a smaller width are not parted
MAX_MOVES = 400  # of borders that are tried to make a cut better

_Part = tuple[float, float, float, bool]  # bound, the range of the largest load, whether looked at border by border


@dataclass(frozen=True, slots=True)
class LeastTime:
    """What no cut is below, and the cut that promises most; infinite and None where none is below the limit."""

    bound_s: float
    cuts: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineBound:
    """Stages that are alike but for what they hold; windows of tables over ranges of blocks (see `balance`).

    `works`: what the first micro-batch takes; `with_ends`: the same with what the stage does once a step; `laters`:
    what those after it take beside that; `owns`: all that a stage does in a step. `sends`, by stage: what a micro-batch
    takes on the links behind it, both ways. `once`, by the end of stage 0: what it does once a step; `once_alone`: the
    same where what variants add to the first micro-batch does not count in `works`, which then sum to `chain_s`.
    """

    works: Table
    with_ends: Table
    laters: Table
    owns: Table
    sends: Table
    once: Table
    once_alone: Table
    chain_s: float
    num_micro_batches: int
    starts: NDArray[np.intp] | None = None  # of the windows; outside of them nothing is allowed

    @cached_property
    def spare_rounds(self) -> Table:
        """By stage, the rounds that it and those behind it go beside one each."""
        return spare_rounds(len(self.works), self.num_micro_batches)

    def least(self, limit_s: float = np.inf, *, in_parts: bool = True) -> LeastTime:
        """The bound over all cuts, infinite where none is below the limit, and the most promising cut.

        Not `in_parts`: a lower one, in less time.
        """
        alone, least = smallest_bottleneck(self.owns), smallest_bottleneck(self.laters)
        most = float(np.max(self.laters, initial=0.0, where=np.isfinite(self.laters)))
        most = min(most, limit_s - self.chain_s - self.sends[0])  # of loads; with larger ones no cut is below the limit
        if alone is None or least is None or least.value > most:
            return LeastTime(np.inf, None)
        parts: list[_Part] = []
        tried: list[tuple[int, ...]] = []
        self._add(parts, tried, least.value, most)
        for _ in range(max(4, MAX_TABLES // len(self.works) // 2) if in_parts else 0):
            bound = self._settled(parts)
            if max(bound, alone.value) >= limit_s:
                break
            _, lower, upper, _ = parts[0]
            if upper - lower <= NARROW * bound:
                break
            heapq.heappop(parts)
            middle = (lower + upper) / 2
            self._add(parts, tried, lower, middle, bound)
            self._add(parts, tried, middle, upper, bound)
        bound = max(self._settled(parts), alone.value)
        if np.isinf(bound):
            return LeastTime(np.inf, None)
        best = min(tried, key=lambda cuts: (self.time_s(cuts), cuts))
        return LeastTime(bound, self._moved(best) if bound < limit_s else best)

    def _settled(self, parts: list[_Part]) -> float:
        """The least bound of the parts, each of which is looked at border by border when it is the least."""
        while parts and not parts[0][3]:
            bound, lower, upper, _ = parts[0]
            bound = max(bound, self._by_border(lower, upper))
            heapq.heapreplace(parts, (bound, lower, upper, True))
        return parts[0][0] if parts else np.inf

    def _by_border(self, lower: float, upper: float) -> float:
        """No cut with its largest load in the range is below this: the most that any border between stages tells.

        Wherever the border is, all stages before it take the least that they can for the blocks there, and so do those
        behind it: loops from the first stage to the last one before the border count, where `_add` has those to the
        last of all.
        """
        spare = self.spare_rounds[0]
        if spare < 0:
            return 0.0
        fits = self.laters <= upper * (1 + 1e-12)
        works, size = np.where(fits, self.works, np.inf), self.works.shape[1]
        suffixes, slowest = least_sums(works)[0], least_worst(works)[0]
        worst = least_worst(np.where(fits, self.laters, np.inf))[0]
        sums, bound = works[0, 0], 0.0  # of the stages before, by where the next one begins
        with_once = sums + by_end(self.once, size, self.starts)
        for stage in range(1, len(works)):
            finite = np.isfinite(sums + suffixes[stage])
            if not finite.any():
                return np.inf
            before, behind, slow = sums[finite], suffixes[stage][finite], slowest[stage][finite]
            through, loop = before + behind + self.sends[0], before + self.sends[0] - self.sends[stage - 1]
            loops, left = divmod(spare, stage)
            load = np.maximum(worst[stage][finite], through + np.maximum(spare * slow, loops * loop + left * slow))
            first = with_once[finite] + behind + self.sends[0]
            bound = max(bound, float((first + np.maximum(load, lower)).min()))
            sums, with_once = ((own[:, None] + works[stage]).min(axis=0) for own in (sums, with_once))
        return bound

    def _add(
        self, parts: list[_Part], tried: list[tuple[int, ...]], lower: float, upper: float, known_s: float = 0.0
    ) -> None:
        """Adds the cuts whose largest load is in a range, if any: their bound first, at least what is known of it."""
        fits = self.laters <= upper * (1 + 1e-12)
        works, size = np.where(fits, self.works, np.inf), self.works.shape[1]
        suffixes, quickest = least_sums(works, self.starts)
        if quickest is None:
            return
        last = np.zeros(size)
        slowest = np.stack([*least_worst(works[1:])[0], last])
        behind = np.stack([*suffixes[1:], last]) + self.sends[:, None]
        through = works + behind[:, None]  # of each stage and all behind it
        loads = np.where(fits, self.laters, np.inf)
        for stage, (load, own, each, worst, spare) in enumerate(
            zip(loads, works, through, slowest, self.spare_rounds, strict=True)
        ):
            longest = np.maximum(own, worst)
            loops, left = divmod(max(spare, 0.0), len(works) - stage)
            if spare >= 0:
                np.maximum(load, each + _times(spare, longest), out=load)
            if loops:
                np.maximum(load, each + loops * each + _times(left, longest), out=load)
        worst, nexts = least_worst(loads[1:])
        # What each stage takes with its ends and all behind it, and by the end of stage 0 the longest of all.
        heaviest = np.stack([*worst, last])
        ended = self.with_ends + behind[:, None] + np.maximum(loads, heaviest[:, None])
        longest, to_end = least_worst(ended[1:])
        # By the end of stage 0: the first micro-batch's time, and the largest load or loop.
        load = np.maximum(np.maximum(loads[0, 0], worst[0]), lower)
        once, alone = (by_end(own, size, self.starts) for own in (self.once, self.once_alone))
        bounds = np.maximum(load + once + through[0, 0], load + alone + self.chain_s + self.sends[0])
        bounds = np.maximum(bounds, np.maximum(ended[0, 0], longest[0]))
        first = np.argmin(bounds)
        if not np.isfinite(bounds[first]):
            return
        ends = [cut_of([np.array([first]), *choices], size, self.starts) for choices in (nexts, to_end)]
        tried += [*ends, quickest.cuts]
        heapq.heappush(parts, (max(known_s, float(bounds[first])), lower, upper, False))

    def time_s(self, cuts: Sequence[int]) -> float:
        """The bound of one cut, with the loops between any two of its stages; infinite where it is not allowed."""
        starts = every_start(len(self.works)) if self.starts is None else self.starts
        inside = np.array(cuts) - starts
        if inside.min() < 0 or inside.max() >= self.works.shape[1]:
            return np.inf
        spans = np.arange(len(self.works)), inside[:-1], inside[1:]
        return cut_time_s(
            self.works[spans], self.with_ends[spans], self.laters[spans], self.owns[spans], self.sends,
            float(self.once[cuts[1]]), self.num_micro_batches,
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


def _times(number: float, each: Table) -> Table | float:
    """So many of each; none is nothing even where one takes for ever."""
    return number * each if number else 0.0


def spare_rounds(num_stages: int, num_micro_batches: int) -> Table:
    """By stage, how many rounds are left when it and every stage behind it go one; below 0 where there are too few.

    A round on a stage is a forward and the backward after it: a micro-batch that comes back lets the stage send another
    one. What is sent may be waited for where it arrives, after one that is as many micro-batches earlier as are in
    flight from there on, one fewer than on the stage before. So after the first backward on a stage rounds on it, on
    the next one, and so on to the last follow one another, as many as there are micro-batches after the first. Each
    stage goes one, whose forwards and backwards are the way from the first to the last of them and back; all others may
    be on the slowest.
    """
    return np.arange(num_stages, dtype=np.float64) + (num_micro_batches - 1 - num_stages)


def cut_time_s(
    works: Table, with_ends: Table, laters: Table, owns: Table, sends: Table, once_s: float, num_micro_batches: int
) -> float:
    """The bound of one cut by what each of its stages takes, with the loops between any two of them."""
    through = np.cumsum(works[::-1])[::-1] + sends  # of each stage and all behind it
    if not np.isfinite(through[0] + laters.max()):
        return np.inf
    at = np.arange(len(works))
    spare, ahead = spare_rounds(len(works), num_micro_batches), np.maximum(at - at[:, None] + 1, 1)
    slowest, loop = np.maximum.accumulate(works[::-1])[::-1], np.triu(through[:, None] + (works - through)[None, :])
    loops = np.maximum(spare, 0)[:, None] // ahead
    rounds = (loops * loop + (spare[:, None] - loops * ahead) * slowest[:, None]).max(axis=1)
    rounds = np.where(spare >= 0, through + np.maximum(rounds, spare * slowest), 0.0)
    # Of each stage and all behind it the largest load or loop, and all that the first of them ends with.
    heaviest = np.maximum.accumulate(np.maximum(laters, rounds)[::-1])[::-1]
    ended = with_ends + through - works + heaviest
    return float(max(owns.max(), ended.max(), heaviest[0] + through[0] + once_s))
