"""Time of a schedule without running it, for searches: paths through the schedule's order, each of which must pass.

Every value is the length of a chain of actions and messages that follow one another, so none is above what
`events.execute` gives. It is equal to that

* for gpipe, always: forwards, then backwards, are each a flow shop of equal jobs;
* for the other schedules where stages are equal and links take no time: (m + p - 1) * t for 1f1b, which is a bubble of
  (p - 1) / (m + p - 1) of the step (Narayanan 2021); m * t + (p - 1) * t / v for interleaved; for zb
  m * t + (p - 1) * (f + i - w) as long as w <= f (ZB-H1, Qi et al. 2023).

For 1f1b with unequal stages, slow links or a warm-up of its own the slowest loop between two stages is followed
(Little's law over the micro-batches in flight between them), and the rounds that are left on the slowest stage between
them. Where stages and links differ by up to a factor of two it is 0.2% below the exact time on average, interleaved and
zb are 3% below (tests/benchmarks/bench_simulator.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.simulate.events import StageTimes

Table = NDArray[np.float64]


def closed_form_s(
    schedule: Schedule | str, stages: Sequence[StageTimes], num_micro_batches: int, *, num_chunks: int = 1,
    warmup: Sequence[int] | None = None,
) -> float:
    """Seconds from the first action to the end of the last, without gathers and reductions: at most the exact time.

    `warmup`: forwards of each rank before its first backward, for 1f1b alone. Time: O(p^2) for 1f1b, else O(stages).
    """
    name = Schedule(schedule)
    if warmup is not None and name is not Schedule.ONE_F_ONE_B:
        raise InputError(f"schedule {name} takes no warm-up of its own")
    if name is Schedule.GPIPE:
        return _gpipe_s(stages, num_micro_batches)
    if name is Schedule.ONE_F_ONE_B:
        depths = None if warmup is None else np.array(warmup)
        return float(one_f_one_b_s(*figures(stages), num_micro_batches, depths))
    return _busiest_rank_s(name, stages, num_micro_batches, num_chunks)


def _gpipe_s(stages: Sequence[StageTimes], m: int) -> float:
    p = len(stages)
    one = sum(stage.forward_s + stage.backward_s for stage in stages)
    one += sum(stage.send_forward_s for stage in stages[:-1]) + sum(stage.send_backward_s for stage in stages[1:])
    forward = max(max(s.forward_s, s.send_forward_s if i + 1 < p else 0.0) for i, s in enumerate(stages))
    backward = max(max(s.backward_s, s.send_backward_s if i else 0.0) for i, s in enumerate(stages))
    return one + (m - 1) * (forward + backward)


def one_f_one_b_s(
    forward_s: Table, backward_s: Table, send_forward_s: Table, send_backward_s: Table, num_micro_batches: int,
    warmup: NDArray[np.intp] | None = None,
) -> Table:
    """The 1F1B times of many pipelines at once: tables run over stages along their last dim, and over pipelines."""
    p, m = forward_s.shape[-1], num_micro_batches
    depth = np.minimum(p - 1 - np.arange(p) if warmup is None else warmup, m - 1) + 1  # in flight at most
    start = np.zeros((*forward_s.shape[:-1], 1))
    # `forward[s]`: from the start of a micro-batch to the start of its forward on s, were nothing else on the way;
    # `backward[s]`: from the end of its backward on s to that on stage 0.
    forward = np.concatenate([start, np.cumsum((forward_s + send_forward_s)[..., :-1], axis=-1)], axis=-1)
    backward = np.concatenate([start, np.cumsum(backward_s[..., :-1] + send_backward_s[..., 1:], axis=-1)], axis=-1)
    one = forward[..., -1] + forward_s[..., -1] + backward_s[..., -1] + backward[..., -1]
    links = np.maximum(
        send_forward_s[..., :-1].max(axis=-1, initial=0.0), send_backward_s[..., 1:].max(axis=-1, initial=0.0)
    )
    each = forward + m * (forward_s + backward_s) + backward
    longest = np.maximum(one + (m - 1) * links, each.max(axis=-1))
    work, falls = forward_s + backward_s, np.all(np.diff(depth) <= 0, axis=-1)[..., None]
    for last in range(p):
        # A backward on `last` leads to one on each stage before, to that one's next forward, and with it back to
        # `last`, `ahead` micro-batches on.
        own = slice(0, last + 1)
        ahead = depth[..., own] - depth[..., last, None] + 1
        can = ahead >= 1
        here_forward, here_backward = forward_s[..., last, None], backward_s[..., last, None]
        loop = (
            forward[..., last, None] - forward[..., own] + here_forward
            + backward[..., last, None] - backward[..., own] + here_backward
        )
        rounds = np.where(can, -(-(m - depth[..., own]) // np.maximum(ahead, 1)), 0)
        # What is left goes by on `last` itself: forwards as long as there are any, and backwards.
        forwards, backwards = m - depth[..., last, None] - rounds * ahead, m - 1 - rounds * ahead
        loops = one[..., None] + rounds * loop + forwards * here_forward + backwards * here_backward
        longest = np.maximum(longest, np.where(can, loops, 0.0).max(axis=-1))
        # The loop once or as often as can be, and the rounds beside it on its slowest stage: see `search/loops.py`.
        spare = m - 1 - depth[..., own]
        slowest = np.where(falls, np.maximum.accumulate(work[..., last::-1], axis=-1)[..., ::-1], work[..., own])
        slowest = np.maximum(slowest, work[..., last, None])
        more = spare // np.maximum(ahead, 1)  # rounds of the loop
        paths = np.maximum(spare * slowest, more * loop + (spare - more * ahead) * slowest)
        paths += one[..., None] + loop + (depth[..., last, None] - 1) * here_backward
        longest = np.maximum(longest, np.where(can & (spare >= 0), paths, 0.0).max(axis=-1))
    return np.asarray(longest)


def figures(stages: Sequence[StageTimes]) -> tuple[Table, Table, Table, Table]:
    """Of each stage what `one_f_one_b_s` takes: forward, backward, and what its messages take there and back."""
    forward, backward, send_forward, send_backward = (
        np.array([getattr(stage, name) for stage in stages], dtype=np.float64)
        for name in ("forward_s", "backward_s", "send_forward_s", "send_backward_s")
    )
    return forward, backward, send_forward, send_backward


def _busiest_rank_s(name: Schedule, stages: Sequence[StageTimes], m: int, num_chunks: int) -> float:
    """The longest of: what each rank has to do, after the first micro-batch reaches it and before the last has left."""
    p = len(stages) // num_chunks
    split = name is Schedule.ZERO_BUBBLE
    backward = [s.input_backward_s if split else s.backward_s for s in stages]
    weights = [s.weight_backward_s if split else 0.0 for s in stages]
    sends = sum(s.send_forward_s for s in stages[:-1]) + sum(s.send_backward_s for s in stages[1:])
    longest = sum(s.forward_s for s in stages) + sum(backward) + sends + weights[0]
    for rank in range(p):
        own = range(rank, len(stages), p)
        before = sum(stages[s].forward_s + stages[s].send_forward_s for s in range(rank))
        after = sum(backward[s] + stages[s + 1].send_backward_s for s in range(rank)) + weights[0]
        work = m * sum(stages[s].forward_s + backward[s] for s in own)
        # ZB-H1 puts weight gradients off by `rank` micro-batches: so many come after its last gradient of inputs.
        early = max(0, m - 1 - min(rank, m - min(p - rank - 1, m)))
        longest = max(
            longest, before + work + m * sum(weights[s] for s in own),
            before + work + early * weights[rank] + after,
        )
    return longest
