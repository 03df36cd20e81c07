"""Cutting the chain of blocks into stages: the smallest bottleneck under every stage's memory, and a bound below it.

Stages differ in what a block costs them (device speed, micro-batches in flight), so each stage has its own running
sums. Whether some cut has no stage above a given bottleneck is decided by giving every stage, last to first, as many
blocks as fit; the smallest such bottleneck is then found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Sums = Sequence[float]  # sums[i]: the cost of blocks[:i]; starts with 0 and never falls
_PRECISION = 1e-9  # relative; two bottlenecks closer than this are the same


@dataclass(frozen=True, slots=True)
class Cut:
    """Stage s has blocks[cuts[s]:cuts[s + 1]]. No cut at all has a bottleneck under `lower_bound`."""

    cuts: tuple[int, ...]
    bottleneck: float
    lower_bound: float


def running_sums(costs: Sequence[float]) -> tuple[float, ...]:
    """sums[i] is the sum of the first i costs."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    return tuple(sums)


def smallest_bottleneck(sums: Sequence[Sums], first_fit: Callable[[int, int], int] | None = None) -> Cut | None:
    """The cut into len(sums) stages, none empty, whose costliest stage is cheapest; None where no cut fits.

    `first_fit(stage, last)` is the smallest `first` such that blocks[first:last] fit into the stage's memory (`last`
    where not even one does). A part of what fits must fit.
    """
    num_stages, num_blocks = len(sums), len(sums[0]) - 1
    if num_stages > num_blocks:
        return None

    def attempt(limit: float) -> tuple[int, ...] | None:
        cuts = [num_blocks]
        for stage in range(num_stages - 1, -1, -1):
            last, running = cuts[-1], sums[stage]
            first = bisect_left(running, running[last] - limit)
            if first_fit is not None:
                first = max(first, first_fit(stage, last))
            first = max(first, stage)
            if first >= last or (stage == 0 and first > 0):
                return None
            cuts.append(first)
        return tuple(reversed(cuts))

    def bottleneck(cuts: Sequence[int]) -> float:
        return max(s[b] - s[a] for s, a, b in zip(sums, cuts[:-1], cuts[1:], strict=True))

    # Any cut has a stage of at least the average share, each block priced at its cheapest stage.
    cheapest = [min(s[i + 1] - s[i] for s in sums) for i in range(num_blocks)]
    low = max(sum(cheapest) / num_stages, max(cheapest)) * (1 - _PRECISION)
    high = max(s[-1] for s in sums)
    best = attempt(high * (1 + _PRECISION))
    if best is None:
        return None
    high = bottleneck(best)
    tried = attempt(low * (1 + 2 * _PRECISION))
    if tried is not None:
        return Cut(tried, bottleneck(tried), low)
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        found = attempt(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, bottleneck(found))
    return Cut(best, bottleneck(best), low)
