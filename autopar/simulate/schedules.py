"""Pipeline schedules as data: what each pipeline rank does, in order.

With p ranks and v chunks a rank there are p * v stages; stage s runs on rank s % p as its chunk s // p. An action's
text follows torch.distributed.pipelining: stage, kind, micro-batch, such as "2F5".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import InputError
from autopar.plan.plan import Schedule


class ActionKind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and of weights
    INPUT_BACKWARD = "I"  # gradients of the stage's inputs alone
    WEIGHT_BACKWARD = "W"  # gradients of the stage's parameters, after its I


@dataclass(frozen=True, slots=True)
class Action:
    kind: ActionKind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


ActionLists = tuple[tuple[Action, ...], ...]
F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD, ActionKind.WEIGHT_BACKWARD  # noqa: E741


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


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> ActionLists:
    """One forward, one backward in turn; rank r keeps at most p - r micro-batches (PipeDream-Flush, Narayanan 2021)."""
    lists = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - rank - 1, num_micro_batches)
        actions = [Action(F, rank, i) for i in range(warmup)]
        for i in range(num_micro_batches - warmup):
            actions += [Action(F, rank, warmup + i), Action(B, rank, i)]
        actions += [Action(B, rank, i) for i in range(num_micro_batches - warmup, num_micro_batches)]
        lists.append(tuple(actions))
    return tuple(lists)


def interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int) -> ActionLists:
    """Megatron's interleaved 1F1B: micro-batches pass in rounds of p through each rank's chunks (Narayanan 2021).

    Needs num_micro_batches to be a multiple of num_ranks, as Megatron does.
    """
    p, v = num_ranks, num_chunks
    if num_micro_batches % p:
        raise InputError(
            f"an interleaved schedule needs micro-batches ({num_micro_batches}) in a multiple of pipeline ranks ({p})"
        )
    total = num_micro_batches * v

    def forward(rank: int, k: int) -> Action:
        return Action(F, (k % (p * v)) // p * p + rank, k // (p * v) * p + k % p)

    def backward(rank: int, k: int) -> Action:
        return Action(B, (v - 1 - (k % (p * v)) // p) * p + rank, k // (p * v) * p + k % p)

    lists = []
    for rank in range(p):
        # A rank alone needs no warm-up beyond its own chunks; others fill the ring twice, as in Megatron.
        warmup = min((p - rank - 1) * 2 + (v - 1) * p, total)
        actions = [forward(rank, k) for k in range(warmup)]
        for k in range(total - warmup):
            actions += [forward(rank, warmup + k), backward(rank, k)]
        actions += [backward(rank, k) for k in range(total - warmup, total)]
        lists.append(tuple(actions))
    return tuple(lists)


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


def check_actions(lists: Sequence[Sequence[Action]], num_stages: int, num_micro_batches: int) -> None:
    """Raise InputError unless every stage runs every micro-batch once, forward then backward, with no deadlock."""
    seen: dict[Action, int] = {}
    for rank, actions in enumerate(lists):
        for action in actions:
            if action in seen:
                raise InputError(f"action {action} occurs twice, on ranks {seen[action]} and {rank}")
            seen[action] = rank
    rank_of: dict[int, int] = {}
    for action, rank in seen.items():
        if not (0 <= action.stage < num_stages and 0 <= action.micro_batch < num_micro_batches):
            raise InputError(f"action {action} is outside {num_stages} stages and {num_micro_batches} micro-batches")
        if rank_of.setdefault(action.stage, rank) != rank:
            raise InputError(f"stage {action.stage} runs on two ranks, {rank_of[action.stage]} and {rank}")
    for stage in range(num_stages):
        for i in range(num_micro_batches):
            kinds = {kind for kind in ActionKind if Action(kind, stage, i) in seen}
            if kinds not in ({F, B}, {F, I, W}):
                raise InputError(
                    f"stage {stage} micro-batch {i} has actions {sorted(kinds)}: needs F and B, or F, I and W"
                )
    done: set[Action] = set()
    position = [0] * len(lists)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(lists):
            while position[rank] < len(actions) and all(
                any(option in done for option in options)
                for options in requirements(actions[position[rank]], num_stages)
            ):
                done.add(actions[position[rank]])
                position[rank] += 1
                progress = True
    stuck = [str(actions[position[rank]]) for rank, actions in enumerate(lists) if position[rank] < len(actions)]
    if stuck:
        raise InputError(f"the schedule deadlocks: nothing can follow at {', '.join(stuck[:8])}")


def requirements(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """What must be done before an action: one of each tuple."""
    stage, i = action.stage, action.micro_batch
    if action.kind is F:
        return ((Action(F, stage - 1, i),),) if stage else ()
    if action.kind is W:
        return ((Action(I, stage, i),),)
    own = (Action(F, stage, i),)
    return (own, (Action(B, stage + 1, i), Action(I, stage + 1, i))) if stage + 1 < num_stages else (own,)


def most_in_flight(actions: Sequence[Action]) -> dict[int, int]:
    """The largest number of micro-batches that each stage of one rank keeps activations of, stage by stage."""
    held: dict[int, int] = {}
    most: dict[int, int] = {}
    for action in actions:
        if action.kind is F:
            held[action.stage] = held.get(action.stage, 0) + 1
            most[action.stage] = max(most.get(action.stage, 0), held[action.stage])
        elif action.kind in (B, W):
            held[action.stage] -= 1
    return most
