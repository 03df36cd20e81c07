"""The named pipeline schedules as action lists, and the lists of a plan.

With p ranks and v chunks a rank there are p * v stages; stage s runs on rank s % p as its chunk s // p. Actions and
their checks are in autopar.plan.actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from autopar.errors import InputError
from autopar.plan.actions import (
    Action,
    ActionKind,
    ActionLists,
    B,
    F,
    I,
    W,
    check_actions,
    most_in_flight,
    parse_actions,
    requirements,
)
from autopar.plan.plan import Plan, Schedule

__all__ = ["Action", "ActionKind", "ActionLists", "check_actions", "gpipe", "interleaved", "latency_aware_warmup",
           "most_in_flight", "one_f_one_b", "plan_actions", "requirements", "schedule_actions", "zero_bubble"]


def plan_actions(plan: Plan) -> ActionLists:
    """The action list of each pipeline rank of a plan: the plan's own, or those of its schedule.

    List r is that of the devices of stage r. InputError for sizes that the schedule cannot run.
    """
    if plan.actions:
        return tuple(parse_actions(row.split(",")) for row in plan.actions)
    chunks = 1 + max(stage.virtual for stage in plan.stages)
    return schedule_actions(plan.schedule, plan.num_stages // chunks, plan.num_micro_batches, chunks)


def schedule_actions(
    schedule: Schedule | str, num_ranks: int, num_micro_batches: int, num_chunks: int = 1
) -> ActionLists:
    """The action list of each pipeline rank under a named schedule; InputError for sizes that it cannot run."""
    name = Schedule(schedule)
    if num_ranks < 1 or num_micro_batches < 1 or num_chunks < 1:
        raise InputError("a schedule needs at least one rank, one micro-batch and one chunk")
    if name is Schedule.INTERLEAVED:
        return interleaved(num_ranks, num_micro_batches, num_chunks)
    if num_chunks > 1:
        raise InputError(f"schedule {name} runs one stage on a rank, not {num_chunks}; use interleaved")
    if name is Schedule.GPIPE:
        return gpipe(num_ranks, num_micro_batches)
    if name is Schedule.ZERO_BUBBLE:
        return zero_bubble(num_ranks, num_micro_batches)
    return one_f_one_b(num_ranks, num_micro_batches)


def gpipe(num_ranks: int, num_micro_batches: int) -> ActionLists:
    """All forwards, then all backwards (Huang et al. 2019)."""
    order = range(num_micro_batches)
    return tuple(
        tuple(Action(F, rank, i) for i in order) + tuple(Action(B, rank, i) for i in order) for rank in range(num_ranks)
    )


def one_f_one_b(num_ranks: int, num_micro_batches: int, warmup: Sequence[int] | None = None) -> ActionLists:
    """One forward, one backward in turn (PipeDream-Flush, Narayanan 2021).

    Rank r runs `warmup[r]` forwards first, p - r - 1 if left out, and keeps one micro-batch more than that. More
    forwards first hide slow links, as long as they don't grow along the ranks (a later rank would wait for its inputs).
    """
    depths = range(num_ranks - 1, -1, -1) if warmup is None else warmup
    if len(depths) != num_ranks or any(depth < 0 for depth in depths):
        raise InputError(f"1f1b on {num_ranks} ranks needs a warm-up of 0 or more for each, not {list(depths)}")
    lists = []
    for rank, depth in enumerate(depths):
        first = min(depth, num_micro_batches)
        actions = [Action(F, rank, i) for i in range(first)]
        for i in range(num_micro_batches - first):
            actions += [Action(F, rank, first + i), Action(B, rank, i)]
        actions += [Action(B, rank, i) for i in range(num_micro_batches - first, num_micro_batches)]
        lists.append(tuple(actions))
    return tuple(lists)


def latency_aware_warmup(
    round_s: Sequence[float], link_s: Sequence[float], *, most_held: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Warm-up forwards of each rank so that slow links hide: w[i] = w[i+1] + 1 + ceil(2 c[i] / max(f + b)).

    `round_s`: forward and backward seconds of each rank; `link_s[i]`: seconds from rank i to the next, one way;
    `most_held[i]`: micro-batches that fit into rank i's memory, one more than its warm-up.
    """
    slowest = max(round_s)
    depths = [0] * len(round_s)
    for i in reversed(range(len(round_s) - 1)):
        depths[i] = depths[i + 1] + 1 + (ceil(2 * link_s[i] / slowest) if slowest else 0)
    if most_held is not None:
        depths = [max(0, min(depth, held - 1)) for depth, held in zip(depths, most_held, strict=True)]
    for i in range(1, len(depths)):  # what a later rank runs first must have come from the earlier one
        depths[i] = min(depths[i], depths[i - 1])
    return tuple(depths)


def interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int) -> ActionLists:
    """Megatron's interleaved 1F1B: micro-batches pass in rounds through each rank's chunks (Narayanan 2021).

    A round has p micro-batches, or, where these do not divide, the least number from p on that divides them (Megatron's
    microbatch_group_size_per_vp_stage). InputError for fewer micro-batches than ranks.
    """
    p, v, m = num_ranks, num_chunks, num_micro_batches
    if m < p:
        raise InputError(
            f"an interleaved schedule needs as many micro-batches as pipeline ranks: {m} are fewer than {p}"
        )
    total = m * v
    size = round_size(p, m)

    def forward(rank: int, k: int) -> Action:
        return Action(F, (k % (size * v)) // size * p + rank, k // (size * v) * size + k % size)

    def backward(rank: int, k: int) -> Action:
        return Action(B, (v - 1 - (k % (size * v)) // size) * p + rank, k // (size * v) * size + k % size)

    lists = []
    for rank in range(p):
        # A rank alone needs no warm-up beyond its own chunks; others fill the ring twice, as in Megatron.
        warmup = min((p - rank - 1) * 2 + (v - 1) * size, total)
        actions = [forward(rank, k) for k in range(warmup)]
        for k in range(total - warmup):
            actions += [forward(rank, warmup + k), backward(rank, k)]
        actions += [backward(rank, k) for k in range(total - warmup, total)]
        lists.append(tuple(actions))
    return tuple(lists)


def round_size(num_ranks: int, num_micro_batches: int) -> int:
    """Micro-batches of a round of the interleaved schedule."""
    return next(size for size in range(num_ranks, num_micro_batches + 1) if num_micro_batches % size == 0)


def zero_bubble(num_ranks: int, num_micro_batches: int) -> ActionLists:
    """ZB-H1 (Qi et al. 2023): 1F1B with the weight gradient split off and delayed by r micro-batches on rank r.

    No rank keeps more than p micro-batches; with equal times the bubble is (p - 1) * (F + I - W).
    """
    m = num_micro_batches
    lists = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - rank - 1, m)
        actions = [Action(F, rank, i) for i in range(warmup)]
        weights = 0
        for i in range(m):
            if warmup + i < m:
                actions.append(Action(F, rank, warmup + i))
            actions.append(Action(I, rank, i))
            if i >= rank or warmup + i >= m:
                actions.append(Action(W, rank, weights))
                weights += 1
        actions += [Action(W, rank, i) for i in range(weights, m)]
        lists.append(tuple(actions))
    return tuple(lists)
