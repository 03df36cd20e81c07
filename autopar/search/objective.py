"""What a plan is chosen by: the fastest step, the cheapest, or the fewest devices for a given step time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.plan.goal import Goal

Score = tuple[float, float]  # what is minimized first, and the step time


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A goal, and the longest that a step may take; DEVICES needs one."""

    goal: Goal = Goal.TIME
    max_step_time_s: float | None = None

    def __post_init__(self) -> None:
        if self.goal is Goal.DEVICES and not (self.max_step_time_s and self.max_step_time_s > 0):
            raise InputError(
                "the fewest devices are sought for a step of a given length: give --max-step-seconds (in Python "
                "max_step_seconds)"
            )
        if self.max_step_time_s is not None and not self.max_step_time_s > 0:
            raise InputError(f"a step cannot take at most {self.max_step_time_s:g} s; give a time above 0")

    def score(self, step_time_s: float, counts: Sequence[int], prices_per_hour: Sequence[float | None]) -> Score:
        """What to minimize for a step that takes so long on so many devices of each price; rises with the step time.

        InputError where a device that is used has no price and the goal is the cost.
        """
        if self.max_step_time_s is not None and step_time_s > self.max_step_time_s * (1 + 1e-12):
            return math.inf, step_time_s
        if self.goal is Goal.DEVICES:
            return float(sum(counts)), step_time_s
        if self.goal is Goal.COST:
            return cost_of_step(step_time_s, counts, prices_per_hour), step_time_s
        return step_time_s, float(sum(counts))


def goal_of(word: str) -> Goal:
    """The goal of a user's word; InputError for any other."""
    try:
        return Goal(word)
    except ValueError:
        raise InputError(f"there is no objective {word!r}; write {', '.join(Goal)}") from None


def longest_step_s(
    max_step_s: float | None, deadline_hours: float | None, tokens: float | None, tokens_a_step: int
) -> float | None:
    """The longest step that keeps to a limit of its own and to a deadline for all tokens; None without either."""
    if (deadline_hours is None) != (tokens is None):
        raise InputError("a deadline is for a number of tokens: give both --deadline-hours and --tokens")
    limits = [max_step_s] if max_step_s is not None else []
    if deadline_hours is not None and tokens is not None:
        limits.append(deadline_hours * 3600 / math.ceil(tokens / tokens_a_step))
    return min(limits, default=None)


def cost_of_step(step_time_s: float, counts: Sequence[int], prices_per_hour: Sequence[float | None]) -> float:
    """What a step costs, in the money of the prices. InputError where a device that is used has none."""
    total = 0.0
    for count, price in zip(counts, prices_per_hour, strict=True):
        if count and price is None:
            raise InputError(
                "the cost of a step needs the price of every device: give price_per_hour in a cluster file"
            )
        total += count * (price or 0.0)
    return step_time_s / 3600 * total
