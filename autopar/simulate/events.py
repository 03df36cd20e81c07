"""Exact timing of action lists: when each action starts and ends, and what activations are held meanwhile.

A rank runs its actions in order, one at a time. Every boundary between neighbouring stages has one link a direction,
which carries one message at a time in the order in which they are produced; sending does not hold up the sender.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.simulate.schedules import Action, ActionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds that one micro-batch takes on a stage, and to reach its neighbours.

    `input_backward_s` and `weight_backward_s` are used where a schedule splits the backward.
    """

    forward_s: float
    backward_s: float
    input_backward_s: float = 0.0
    weight_backward_s: float = 0.0
    send_forward_s: float = 0.0  # activations, to the next stage
    send_backward_s: float = 0.0  # gradients, to the previous stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    rank: int  # of the pipeline
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What running the action lists takes. Tuples run over pipeline ranks."""

    end_s: float
    rank_end_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...]  # start of each action, parallel to the action lists
    ends: tuple[tuple[float, ...], ...]

    def events(self, lists: Sequence[Sequence[Action]]) -> tuple[Event, ...]:
        return tuple(
            Event(rank=rank, action=action, start_s=start, end_s=end)
            for rank, actions in enumerate(lists)
            for action, start, end in zip(actions, self.starts[rank], self.ends[rank], strict=True)
        )


def execute(
    lists: Sequence[Sequence[Action]], stages: Sequence[StageTimes], *, start_s: Sequence[float] | None = None
) -> Execution:
    """Run action lists on stages of these times; `start_s` delays each rank's first action. Time: O(actions)."""
    num_stages, num_ranks = len(stages), len(lists)
    num_micro_batches = 1 + max((action.micro_batch for actions in lists for action in actions), default=-1)
    duration = {
        ActionKind.FORWARD: [stage.forward_s for stage in stages],
        ActionKind.BACKWARD: [stage.backward_s for stage in stages],
        ActionKind.INPUT_BACKWARD: [stage.input_backward_s for stage in stages],
        ActionKind.WEIGHT_BACKWARD: [stage.weight_backward_s for stage in stages],
    }
    # arrived[2 * (stage * m + i)]: the input of a forward; + 1: the gradient for a backward. None: not yet.
    arrived: list[float | None] = [None] * (2 * num_stages * num_micro_batches)
    for i in range(num_micro_batches):
        arrived[2 * i] = 0.0
    link_free = [[0.0] * num_stages, [0.0] * num_stages]
    waiting: dict[int, int] = {}
    clock = list(start_s) if start_s is not None else [0.0] * num_ranks
    busy = [0.0] * num_ranks
    position = [0] * num_ranks
    starts: list[list[float]] = [[] for _ in range(num_ranks)]
    ends: list[list[float]] = [[] for _ in range(num_ranks)]
    ready = list(range(num_ranks))
    while ready:
        rank = ready.pop()
        actions, time, at = lists[rank], clock[rank], position[rank]
        rank_starts, rank_ends = starts[rank], ends[rank]
        while at < len(actions):
            action = actions[at]
            kind, stage = action.kind, action.stage
            slot = 2 * (stage * num_micro_batches + action.micro_batch)
            if kind is ActionKind.WEIGHT_BACKWARD:
                begin = time
            else:
                slot += kind is not ActionKind.FORWARD
                needed = arrived[slot]
                if needed is None:
                    waiting[slot] = rank
                    break
                begin = needed if needed > time else time
            time = begin + duration[kind][stage]
            rank_starts.append(begin)
            rank_ends.append(time)
            busy[rank] += duration[kind][stage]
            at += 1
            if kind is ActionKind.FORWARD:
                if stage + 1 == num_stages:
                    arrived[slot + 1] = time  # the loss's own gradient
                    continue
                to, link, send = slot + 2 * num_micro_batches, link_free[0], stages[stage].send_forward_s
            elif kind is ActionKind.WEIGHT_BACKWARD or stage == 0:
                continue
            else:
                to, link, send = slot - 2 * num_micro_batches, link_free[1], stages[stage].send_backward_s
            link[stage] = arrival = (link[stage] if link[stage] > time else time) + send
            arrived[to] = arrival
            if to in waiting:
                ready.append(waiting.pop(to))
        clock[rank], position[rank] = time, at
    stuck = [str(actions[position[rank]]) for rank, actions in enumerate(lists) if position[rank] < len(actions)]
    if stuck:
        raise InputError(f"the schedule deadlocks: nothing can follow at {', '.join(stuck[:8])}")
    return Execution(
        end_s=max(clock, default=0.0), rank_end_s=tuple(clock), busy_s=tuple(busy),
        starts=tuple(tuple(item) for item in starts), ends=tuple(tuple(item) for item in ends),
    )


def peak_activation_bytes(
    lists: Sequence[Sequence[Action]], held_bytes: Sequence[float], extra_bytes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Most bytes of activations that each rank holds at once.

    A stage holds `held_bytes` of a micro-batch from its forward to its backward (to W where the backward is split), and
    `extra_bytes` more (what recomputation brings back, temporaries) while it runs a forward or a backward.
    """
    peaks = []
    for actions in lists:
        held = peak = 0.0
        for action in actions:
            if action.kind is ActionKind.FORWARD:
                held += held_bytes[action.stage]
            extra = extra_bytes[action.stage] if extra_bytes is not None else 0.0
            peak = max(peak, held + (extra if action.kind is not ActionKind.FORWARD else 0.0))
            if action.kind in (ActionKind.BACKWARD, ActionKind.WEIGHT_BACKWARD):
                held -= held_bytes[action.stage]
        peaks.append(peak)
    return tuple(peaks)


def closed_form_s(stages: Sequence[StageTimes], num_micro_batches: int) -> float:
    """Time of gpipe or 1f1b without a simulation: the sum of all stages once, and the slowest m - 1 times more.

    Exact where stages are equal and links take no time (then it is (m + p - 1) * t, a bubble of (p - 1) / (m + p - 1)
    of the step); else an estimate, below or above the exact time. It is what Alpa's stage search minimizes.
    """
    total = [stage.forward_s + stage.backward_s for stage in stages]
    sends = sum(s.send_forward_s for s in stages[:-1]) + sum(s.send_backward_s for s in stages[1:])
    return sum(total) + sends + (num_micro_batches - 1) * max(total)
