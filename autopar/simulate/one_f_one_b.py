"""1F1B timed for its figures alone, all stages of a moment at once: what `events.execute` gives for its action lists.

Were forwards, backwards and messages of equal length, each would have its own moment: stage s of p would do the forward
of micro-batch i at s + i while it warms up and at s + 2i from then on, and the backward at 2p - 1 - s + 2i. All that an
action waits for comes at an earlier moment, whatever it takes; so moments are gone through one after another, and the
stages that act in one of them do so together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.simulate.events import StageTimes

Table = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickRun:
    """When each rank ends, its collectives included, and when its first forward starts."""

    rank_end_s: tuple[float, ...]
    start_s: tuple[float, ...]
    num_micro_batches: int

    def peak_bytes(self, rank: int, held_bytes: float, extra_bytes: float) -> float:
        """The most bytes of activations that a rank holds at once: see `events.peak_activation_bytes`."""
        forward = _is_forward(len(self.rank_end_s) - 1 - rank, self.num_micro_batches)
        held = np.cumsum(np.where(forward, held_bytes, -held_bytes))  # one after another, as they come
        before = np.concatenate([[0.0], held[:-1]]) + extra_bytes
        return float(max(0.0, np.where(forward, held, before).max()))


def run_one_f_one_b(stages: Sequence[StageTimes], num_micro_batches: int) -> QuickRun:
    """Runs 1F1B on a rank a stage, of `num_micro_batches` of at least 1. Time: O(p + m) steps of at most p stages."""
    p, m = len(stages), num_micro_batches
    forward, backward, send_forward, send_backward, gather, reduce = (
        np.array([getattr(stage, name) for stage in stages], dtype=np.float64) for name in (
            "forward_s", "backward_s", "send_forward_s", "send_backward_s", "gather_s", "reduce_s")
    )
    inputs, gradients = np.zeros((p, m)), np.zeros((p, m))  # when they have arrived
    clock, start = np.zeros(p), np.zeros(p)
    forward_free, backward_free = np.zeros(p), np.zeros(p)  # the links that leave each stage
    for forwards, backwards in _moments(p, m):
        at, i = forwards
        if len(at):
            begin = np.maximum(np.maximum(gather[at], clock[at]), inputs[at, i])
            clock[at] = end = begin + forward[at]
            first = i == 0
            start[at[first]] = begin[first]
            if at[-1] == p - 1:
                gradients[p - 1, i[-1]] = end[-1]  # the loss's own
                at, i, end = at[:-1], i[:-1], end[:-1]
            inputs[at + 1, i] = forward_free[at] = np.maximum(end, forward_free[at]) + send_forward[at]
        at, i = backwards
        if len(at):
            begin = np.maximum(np.maximum(gather[at], clock[at]), gradients[at, i])
            clock[at] = end = begin + backward[at]
            if at[0] == 0:
                at, i, end = at[1:], i[1:], end[1:]
            gradients[at - 1, i] = backward_free[at] = np.maximum(end, backward_free[at]) + send_backward[at]
    ends = np.where(reduce > 0, np.maximum(clock, gather) + reduce, np.maximum(clock, gather))
    return QuickRun(rank_end_s=tuple(ends.tolist()), start_s=tuple(start.tolist()), num_micro_batches=m)


@lru_cache(maxsize=4)
def _moments(p: int, m: int) -> tuple[tuple[tuple[Places, Places], tuple[Places, Places]], ...]:
    """For each moment the stages, ascending, and micro-batches of its forwards, and of its backwards."""
    stage = np.arange(p)
    found = []
    for moment in range(2 * (p + m) - 1):
        warm, later = moment - stage, (moment - stage) // 2
        warming = (warm >= 0) & (warm < np.minimum(p - stage, m))
        steady = (later >= p - stage) & (later < m) & ((moment - stage) % 2 == 0)
        forwards = np.flatnonzero(warming | steady)
        back = moment - (2 * p - 1 - stage)
        backwards = np.flatnonzero((back >= 0) & (back % 2 == 0) & (back < 2 * m))
        found.append((
            (forwards, np.where(warming, warm, later)[forwards]), (backwards, back[backwards] // 2)
        ))
    return tuple(found)


@lru_cache(maxsize=256)
def _is_forward(warmup: int, m: int) -> NDArray[np.bool_]:
    """Of a rank's actions, in their order, whether each is a forward."""
    first = min(warmup, m)
    found = np.ones(2 * m, dtype=np.bool_)
    found[first + 1 : 2 * m - first : 2] = False
    found[2 * m - first :] = False
    return found
