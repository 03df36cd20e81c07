"""Exact timing of action lists: when each action and message starts and ends, and what activations are held meanwhile.

A rank computes in the order of its list, one action at a time. Beside that each rank has one communication stream,
which gathers parameters before a stage's first forward and reduces its gradients after its last backward, and each
boundary between stages has one link a direction, which carries one message at a time in the order in which they are
produced; sending does not hold up the sender. Lists that name their own UNSHARD, REDUCE_GRAD and sends do those where
they stand; a receive is posted early and costs nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.plan.actions import (
    COMPUTE,
    RECV_B,
    RECV_F,
    REDUCE,
    RESHARD,
    SEND_B,
    SEND_F,
    UNSHARD,
    Action,
    ActionKind,
    ActionLists,
    B,
    F,
    I,
    W,
    compute_actions,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds that one micro-batch takes on a stage, and to reach its neighbours.

    `input_backward_s` and `weight_backward_s` are used where a schedule splits the backward. `gather_s` and `reduce_s`
    are once a step, on the communication stream.
    """

    forward_s: float
    backward_s: float
    input_backward_s: float = 0.0
    weight_backward_s: float = 0.0
    send_forward_s: float = 0.0  # activations, to the next stage
    send_backward_s: float = 0.0  # gradients, to the previous stage
    gather_s: float = 0.0  # before the stage's first forward
    reduce_s: float = 0.0  # after its last backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An action of a rank, or a message on the link that leaves it (SEND_F, SEND_B)."""

    rank: int  # of the pipeline
    action: Action
    start_s: float
    end_s: float


Span = tuple[Action, float, float]  # what, start, end
Message = tuple[bool, int, int, float, float]  # whether forward, the stage that it leaves, its slot, start, end


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What running the action lists takes. Tuples run over pipeline ranks.

    `lists` are the computations alone, `starts` and `ends` theirs; `sent` and `messages` are what left each rank on its
    links and `collectives` what its communication stream did (UNSHARD, REDUCE_GRAD). `rank_end_s` includes both
    streams.
    """

    end_s: float
    rank_end_s: tuple[float, ...]
    busy_s: tuple[float, ...]  # of the computations
    lists: ActionLists
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    num_micro_batches: int
    sent: tuple[tuple[Message, ...], ...]
    collectives: tuple[tuple[Span, ...], ...]

    def messages(self, rank: int) -> tuple[Span, ...]:
        """What left a rank on its links, as SEND_F and SEND_B; what takes no time is left out."""
        m = self.num_micro_batches
        return tuple(
            (Action(SEND_F if forward else SEND_B, stage, slot // 2 - stage * m), start, end)
            for forward, stage, slot, start, end in self.sent[rank]
        )

    def events(self) -> tuple[Event, ...]:
        """Everything that happens, rank by rank: computations, messages, collectives."""
        found = []
        for rank, actions in enumerate(self.lists):
            spans = [*zip(actions, self.starts[rank], self.ends[rank], strict=True), *self.messages(rank),
                     *self.collectives[rank]]
            found += [Event(rank=rank, action=action, start_s=start, end_s=end) for action, start, end in spans]
        return tuple(found)


# Codes by which the loop of `execute` tells actions apart faster than by their kinds.
_F, _B, _W, _SEND_F, _SEND_B, _UNSHARD, _REDUCE, _NOTHING = range(8)
_CODE = {
    F: _F, B: _B, I: _B, W: _W, SEND_F: _SEND_F, SEND_B: _SEND_B, UNSHARD: _UNSHARD, REDUCE: _REDUCE,
    RECV_F: _NOTHING, RECV_B: _NOTHING, RESHARD: _NOTHING,
}
_Step = tuple[int, int, int, float]  # code, stage, slot of what it needs or brings, seconds


def execute(lists: Sequence[Sequence[Action]], stages: Sequence[StageTimes]) -> Execution:
    """Run action lists on stages of these times; InputError where they deadlock. Time: O(actions)."""
    num_stages, num_ranks = len(stages), len(lists)
    m = 1 + max((action.micro_batch for actions in lists for action in actions), default=-1)
    steps = [_steps(actions, stages, m) for actions in lists]
    named = {(code, stage) for own in steps for code, stage, _, _ in own if code > _W}
    own_sends = any(code in (_SEND_F, _SEND_B) for code, _ in named)
    # Slot 2 * (stage * m + i) of `arrived`: the input of a forward; + 1: the gradient for a backward. None: not yet.
    arrived: list[float | None] = [None] * (2 * num_stages * m)
    arrived[0 : 2 * m : 2] = [0.0] * m
    gathered = [0.0] * num_stages
    forward_free, backward_free = [0.0] * num_stages, [0.0] * num_stages  # the links that leave each stage
    clock, stream = [0.0] * num_ranks, [0.0] * num_ranks
    position = [0] * num_ranks
    starts: list[list[float]] = [[] for _ in range(num_ranks)]
    ends: list[list[float]] = [[] for _ in range(num_ranks)]
    messages: list[list[Message]] = [[] for _ in range(num_ranks)]
    collectives: list[list[Span]] = [[] for _ in range(num_ranks)]

    def collective(rank: int, kind: ActionKind, stage: int, time: float, span: float) -> float:
        """The end of a gather or reduction that may begin at `time`."""
        begin = max(time, stream[rank])
        stream[rank] = begin + span
        collectives[rank].append((Action(kind, stage), begin, stream[rank]))
        return stream[rank]

    rank_of = {stage: rank for rank, own in enumerate(steps) for _, stage, _, _ in own}
    last_backward: dict[int, int] = {}  # by stage: its place in the list of its rank
    for own in steps:
        for at, (code, stage, _, _) in enumerate(own):
            if code in (_B, _W):
                last_backward[stage] = at
    for stage, rank in rank_of.items():
        if (_UNSHARD, stage) not in named and stages[stage].gather_s > 0:
            gathered[stage] = collective(rank, UNSHARD, stage, 0.0, stages[stage].gather_s)
    reducing = {
        (rank_of[stage], at): stage for stage, at in last_backward.items()
        if (_REDUCE, stage) not in named and stages[stage].reduce_s > 0
    }
    waiting: dict[int, int] = {}
    ready = list(range(num_ranks))
    while ready:
        rank = ready.pop()
        own, time, at = steps[rank], clock[rank], position[rank]
        rank_starts, rank_ends, sent = starts[rank], ends[rank], messages[rank]
        while at < len(own):
            code, stage, slot, span = own[at]
            if code <= _W:
                begin = gathered[stage]
                if time > begin:
                    begin = time
                if code != _W:
                    needed = arrived[slot]
                    if needed is None:
                        waiting[slot] = rank
                        break
                    if needed > begin:
                        begin = needed
                time = begin + span
                rank_starts.append(begin)
                rank_ends.append(time)
                if (rank, at) in reducing:
                    collective(rank, REDUCE, stage, time, stages[stage].reduce_s)
                at += 1
                if code == _W:
                    continue
                if code == _F:
                    if stage + 1 == num_stages:
                        arrived[slot + 1] = time  # the loss's own gradient
                        continue
                    forward = True
                elif stage == 0:
                    continue
                else:
                    forward = False
                if own_sends and rank_of.get(stage + 1 if forward else stage - 1) != rank:
                    continue  # leaves where its SEND stands
            else:
                at += 1
                if code == _UNSHARD:
                    gathered[stage] = collective(rank, UNSHARD, stage, time, span)
                elif code == _REDUCE:
                    collective(rank, REDUCE, stage, time, span)
                if code != _SEND_F and code != _SEND_B:
                    continue
                forward = code == _SEND_F
            if forward:
                to, free, span = slot + 2 * m, forward_free, stages[stage].send_forward_s
            else:
                to, free, span = slot - 2 * m, backward_free, stages[stage].send_backward_s
            begin = free[stage]
            if time > begin:
                begin = time
            free[stage] = arrived[to] = begin + span
            if span > 0:
                sent.append((forward, stage, slot, begin, begin + span))
            if to in waiting:
                ready.append(waiting.pop(to))
        clock[rank], position[rank] = time, at
    stuck = [str(actions[at]) for actions, at in zip(lists, position, strict=True) if at < len(actions)]
    if stuck:
        raise InputError(f"the schedule deadlocks: nothing can follow at {', '.join(stuck[:8])}")
    rank_end = tuple(max(both) for both in zip(clock, stream, strict=True))
    return Execution(
        end_s=max(rank_end, default=0.0), rank_end_s=rank_end,
        busy_s=tuple(sum(span for code, _, _, span in own if code <= _W) for own in steps),
        lists=compute_actions(lists) if named else tuple(map(tuple, lists)), num_micro_batches=m,
        starts=tuple(map(tuple, starts)), ends=tuple(map(tuple, ends)), sent=tuple(map(tuple, messages)),
        collectives=tuple(map(tuple, collectives)),
    )


def _steps(actions: Sequence[Action], stages: Sequence[StageTimes], m: int) -> list[_Step]:
    spans: dict[ActionKind, list[float]] = {
        F: [stage.forward_s for stage in stages], B: [stage.backward_s for stage in stages],
        I: [stage.input_backward_s for stage in stages], W: [stage.weight_backward_s for stage in stages],
        UNSHARD: [stage.gather_s for stage in stages], REDUCE: [stage.reduce_s for stage in stages],
    }
    # Of each kind: its code, whether its slot is a gradient's, its seconds by stage.
    rows = {kind: (_CODE[kind], int(kind in (B, I, SEND_B)), spans.get(kind)) for kind in ActionKind}
    found = []
    for action in actions:
        code, gradient, by_stage = rows[action.kind]
        stage = action.stage
        span = by_stage[stage] if by_stage is not None else 0.0
        found.append((code, stage, 2 * (stage * m + action.micro_batch) + gradient, span))
    return found


def activation_steps(
    run: Execution, rank: int, held_bytes: Sequence[float], extra_bytes: Sequence[float] | None = None
) -> list[tuple[float, float]]:
    """Bytes of activations that a rank holds, as (time_s, bytes from then on), in order of time.

    A stage holds `held_bytes` of a micro-batch from its forward to its backward (to W where the backward is split), and
    `extra_bytes` more (what recomputation brings back, temporaries) while it runs a backward.
    """
    steps = [(0.0, 0.0)]
    held = 0.0
    for action, start, end in zip(run.lists[rank], run.starts[rank], run.ends[rank], strict=True):
        if action.kind is F:
            held += held_bytes[action.stage]
            steps.append((start, held))
            continue
        if extra_bytes is not None and extra_bytes[action.stage] > 0:
            steps.append((start, held + extra_bytes[action.stage]))
        if action.kind is not I:
            held -= held_bytes[action.stage]
        steps.append((end, held))
    return steps


def peak_activation_bytes(
    lists: Sequence[Sequence[Action]], held_bytes: Sequence[float], extra_bytes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The most bytes of activations that each rank holds at once, whatever the times: see `activation_steps`."""
    peaks = []
    for actions in lists:
        held = peak = 0.0
        for action in actions:
            if action.kind is F:
                held += held_bytes[action.stage]
                peak = max(peak, held)
            elif action.kind in COMPUTE:
                extra = extra_bytes[action.stage] if extra_bytes is not None else 0.0
                peak = max(peak, held + extra)
                if action.kind is not I:
                    held -= held_bytes[action.stage]
        peaks.append(peak)
    return tuple(peaks)
