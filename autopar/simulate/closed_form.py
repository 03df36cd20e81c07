"""Time of a schedule without running it, for searches: paths through the schedule's order, each of which must pass.

Every value is the length of a chain of actions and messages that follow one another, so none is above what
`events.execute` gives. It is equal to that

* for gpipe, always: forwards, then backwards, are each a flow shop of equal jobs;
* for the other schedules where stages are equal and links take no time: (m + p - 1) * t for 1f1b, which is a bubble of
  (p - 1) / (m + p - 1) of the step (Narayanan 2021); m * t + (p - 1) * t / v for interleaved; for zb
  m * t + (p - 1) * (f + i - w) as long as w <= f (ZB-H1, Qi et al. 2023).

For 1f1b with unequal stages, slow links or a warm-up of its own the slowest loop between two stages is followed
(Little's law over the micro-batches in flight between them). Where stages and links differ by up to a factor of two it
is 1% below the exact time on average, interleaved and zb are 3% below (tests/benchmarks/bench_simulator.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.simulate.events import StageTimes


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
        return _one_f_one_b_s(stages, num_micro_batches, warmup)
    return _busiest_rank_s(name, stages, num_micro_batches, num_chunks)


def _passes(stages: Sequence[StageTimes]) -> tuple[list[float], list[float]]:
    """Running sums of forwards with the links before each stage, and of backwards with the links behind each stage.

    `forward[s]`: from the start of a micro-batch to the start of its forward on s, were nothing else on the way;
    `backward[s]`: from the end of its backward on s to that on stage 0.
    """
    forward = [0.0, *accumulate(stage.forward_s + stage.send_forward_s for stage in stages[:-1])]
    backward = [0.0, *accumulate(
        before.backward_s + stage.send_backward_s for before, stage in pairwise(stages)
    )]
    return forward, backward


def _gpipe_s(stages: Sequence[StageTimes], m: int) -> float:
    p = len(stages)
    one = sum(stage.forward_s + stage.backward_s for stage in stages)
    one += sum(stage.send_forward_s for stage in stages[:-1]) + sum(stage.send_backward_s for stage in stages[1:])
    forward = max(max(s.forward_s, s.send_forward_s if i + 1 < p else 0.0) for i, s in enumerate(stages))
    backward = max(max(s.backward_s, s.send_backward_s if i else 0.0) for i, s in enumerate(stages))
    return one + (m - 1) * (forward + backward)


def _one_f_one_b_s(stages: Sequence[StageTimes], m: int, warmup: Sequence[int] | None) -> float:
    p = len(stages)
    depth = [min(p - 1 - s if warmup is None else warmup[s], m - 1) + 1 for s in range(p)]  # in flight at most
    forward, backward = _passes(stages)
    one = forward[-1] + stages[-1].forward_s + stages[-1].backward_s + backward[-1]
    links = max((max(s.send_forward_s if i + 1 < p else 0.0, s.send_backward_s if i else 0.0)
                 for i, s in enumerate(stages)), default=0.0)
    longest = one + (m - 1) * links
    for last in range(p):
        here = stages[last]
        longest = max(longest, forward[last] + m * (here.forward_s + here.backward_s) + backward[last])
        for first in range(last + 1):
            # A backward on `last` leads to one on `first`, to that one's next forward, and with it back to `last`,
            # `ahead` micro-batches on.
            ahead = depth[first] - depth[last] + 1
            if ahead < 1:
                continue
            loop = (
                forward[last] - forward[first] + here.forward_s
                + backward[last] - backward[first] + here.backward_s
            )
            rounds = -(-(m - depth[first]) // ahead)
            # What is left goes by on `last` itself: forwards as long as there are any, and backwards.
            forwards, backwards = m - depth[last] - rounds * ahead, m - 1 - rounds * ahead
            longest = max(longest, one + rounds * loop + forwards * here.forward_s + backwards * here.backward_s)
    return longest


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
