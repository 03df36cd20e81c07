"""Pipeline actions as data: what each pipeline rank does, in torch.distributed.pipelining's vocabulary and CSV.

An action's text is stage, kind, micro-batch: "2F5", "1SEND_F0", "0UNSHARD". A list may name computations alone, or
sends and receives too. Lists are checked as if every send and receive were a blocking rendezvous: what passes cannot
deadlock on any transport.
"""

from __future__ import annotations

import csv
import heapq
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import InputError


class ActionKind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and of weights
    INPUT_BACKWARD = "I"  # gradients of the stage's inputs alone
    WEIGHT_BACKWARD = "W"  # gradients of the stage's parameters, after its I
    SEND_FORWARD = "SEND_F"  # activations, to the next stage
    RECEIVE_FORWARD = "RECV_F"  # activations, from the previous stage
    SEND_BACKWARD = "SEND_B"  # gradients, to the previous stage
    RECEIVE_BACKWARD = "RECV_B"  # gradients, from the next stage
    UNSHARD = "UNSHARD"  # gather the stage's parameters
    RESHARD = "RESHARD"  # drop what was gathered
    REDUCE = "REDUCE_GRAD"  # sum the stage's gradients over its data axes


F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD, ActionKind.WEIGHT_BACKWARD  # noqa: E741
SEND_F, RECV_F = ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD
SEND_B, RECV_B = ActionKind.SEND_BACKWARD, ActionKind.RECEIVE_BACKWARD
UNSHARD, RESHARD, REDUCE = ActionKind.UNSHARD, ActionKind.RESHARD, ActionKind.REDUCE
COMPUTE = frozenset((F, B, I, W))
SENDS, RECEIVES = frozenset((SEND_F, SEND_B)), frozenset((RECV_F, RECV_B))
ONCE = frozenset((UNSHARD, RESHARD, REDUCE))  # of a stage, not of a micro-batch
NO_MICRO_BATCH = -1


@dataclass(frozen=True, slots=True)
class Action:
    """`micro_batch` is NO_MICRO_BATCH for UNSHARD, RESHARD and REDUCE_GRAD."""

    kind: ActionKind
    stage: int
    micro_batch: int = NO_MICRO_BATCH

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro_batch < 0 else self.micro_batch}"


ActionLists = tuple[tuple[Action, ...], ...]

# -- text

_ACTION = re.compile(rf"(\d+)({'|'.join(sorted(ActionKind, key=len, reverse=True))})(\d*)")
_TOGETHER = re.compile(r"\((.*)\)OVERLAP_F_B")


def parse_actions(texts: Iterable[str]) -> tuple[Action, ...]:
    """The actions of one rank from their texts; empty texts are idle steps.

    "(0F1;1B0)OVERLAP_F_B" gives its parts, one after the other. InputError for what is no action.
    """
    found: list[Action] = []
    for text in map(str.strip, texts):
        if together := _TOGETHER.fullmatch(text):
            found += parse_actions(together[1].split(";"))
        elif match := _ACTION.fullmatch(text):
            kind = ActionKind(match[2])
            if (kind in ONCE) == bool(match[3]):
                needs = "takes no micro-batch" if kind in ONCE else "needs a micro-batch"
                raise InputError(f"action {text!r}: {kind} {needs}")
            found.append(Action(kind, int(match[1]), int(match[3]) if match[3] else NO_MICRO_BATCH))
        elif text:
            raise InputError(f"{text!r} is no pipeline action; write stage, kind, micro-batch: 2F5, 1SEND_F0")
    return tuple(found)


def actions_from_csv(text: str) -> ActionLists:
    """The lists of a file in torch.distributed.pipelining's form: a line a rank, an action a cell."""
    lists = tuple(parse_actions(row) for row in csv.reader(io.StringIO(text)) if row)
    if not any(lists):
        raise InputError("no pipeline actions in the file: a line a rank, an action a cell, such as 0F0,0F1,0B0,0B1")
    return lists


def actions_to_csv(lists: Sequence[Sequence[Action]]) -> str:
    """The lists in the same form."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([str(action) for action in actions] for actions in lists)
    return out.getvalue()


# -- who needs what


def receiver(action: Action) -> Action:
    """The receive that takes what a send brings."""
    if action.kind is SEND_F:
        return Action(RECV_F, action.stage + 1, action.micro_batch)
    return Action(RECV_B, action.stage - 1, action.micro_batch)


def sender(action: Action) -> Action:
    """The send that a receive waits for."""
    if action.kind is RECV_F:
        return Action(SEND_F, action.stage - 1, action.micro_batch)
    return Action(SEND_B, action.stage + 1, action.micro_batch)


def requirements(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """The computations that must be done before a computation: one of each tuple."""
    stage, i = action.stage, action.micro_batch
    if action.kind is F:
        return ((Action(F, stage - 1, i),),) if stage else ()
    if action.kind is W:
        return ((Action(I, stage, i),),)
    own = (Action(F, stage, i),)
    return (own, (Action(B, stage + 1, i), Action(I, stage + 1, i))) if stage + 1 < num_stages else (own,)


def compute_actions(lists: Sequence[Sequence[Action]]) -> ActionLists:
    """The lists with nothing but computations."""
    return tuple(tuple(action for action in actions if action.kind in COMPUTE) for actions in lists)


def stage_ranks(lists: Sequence[Sequence[Action]]) -> dict[int, int]:
    """The rank of each stage; InputError where two ranks run one."""
    found: dict[int, int] = {}
    for rank, actions in enumerate(lists):
        for action in actions:
            if found.setdefault(action.stage, rank) != rank:
                raise InputError(f"stage {action.stage} runs on two ranks, {found[action.stage]} and {rank}")
    return found


def has_communication(lists: Sequence[Sequence[Action]]) -> bool:
    return any(action.kind in SENDS or action.kind in RECEIVES for actions in lists for action in actions)


# Seconds by which `with_communication` orders computations; only the order of their ends matters.
UNIT_S: Mapping[ActionKind, int] = {F: 1, I: 1, W: 1, B: 2}


def with_communication(lists: Sequence[Sequence[Action]], num_stages: int) -> ActionLists:
    """The lists with a send after each computation whose result another rank needs, and the receive there.

    All sends and receives follow one total order, that in which computations of unit time end, so that the lists run
    even where each waits for the other; a receive stands as early as a schedule of unit times gets its message. Lists
    that have sends and receives come back as they are. InputError where the computations deadlock.
    """
    if has_communication(lists):
        return tuple(map(tuple, lists))
    rank_of = stage_ranks(lists)
    done_at: dict[Action, int] = {}
    position, free = [0] * len(lists), [0] * len(lists)
    made: list[list[Action]] = [[] for _ in lists]
    running: list[tuple[int, int, Action]] = []  # (end, rank, computation)
    waiting: dict[Action, list[int]] = {}

    def start(rank: int, now: int) -> None:
        """Begin what the rank can begin now: one computation, after what takes no time."""
        while position[rank] < len(lists[rank]) and free[rank] <= now:
            action = lists[rank][position[rank]]
            if action.kind in COMPUTE:
                for options in requirements(action, num_stages):
                    if not any(option in done_at for option in options):
                        for option in options:
                            waiting.setdefault(option, []).append(rank)
                        return
                free[rank] = now + UNIT_S[action.kind]
                heapq.heappush(running, (free[rank], rank, action))
            made[rank].append(action)
            position[rank] += 1

    for rank in range(len(lists)):
        start(rank, 0)
    while running:
        now = running[0][0]
        ended: list[tuple[int, Action]] = []
        while running and running[0][0] == now:
            _, rank, action = heapq.heappop(running)
            ended.append((rank, action))
        for rank, action in ended:  # all messages of this moment before anything that begins at it
            done_at[action] = now
            kind, to = (SEND_F, action.stage + 1) if action.kind is F else (SEND_B, action.stage - 1)
            if action.kind is not W and 0 <= to < num_stages and rank_of.get(to, rank) != rank:
                send = Action(kind, action.stage, action.micro_batch)
                made[rank].append(send)
                made[rank_of[to]].append(receiver(send))
        for rank in sorted({rank for rank, _ in ended} | {r for _, a in ended for r in waiting.pop(a, ())}):
            start(rank, now)
    _raise_if_stuck(lists, position)
    return tuple(map(tuple, made))


# -- checks


def check_actions(lists: Sequence[Sequence[Action]], num_stages: int, num_micro_batches: int) -> None:
    """InputError unless every stage runs every micro-batch once, forward then backward, and nothing deadlocks.

    Sends and receives block until both ends are there; lists without any are checked with those that
    `with_communication` adds.
    """
    seen: dict[Action, int] = {}
    for rank, actions in enumerate(lists):
        for action in actions:
            if not (0 <= action.stage < num_stages and action.micro_batch < num_micro_batches):
                raise InputError(
                    f"action {action} is outside {num_stages} stages and {num_micro_batches} micro-batches"
                )
            if action in seen and action.kind not in (UNSHARD, RESHARD):
                raise InputError(f"action {action} occurs twice, on ranks {seen[action]} and {rank}")
            seen[action] = rank
    stage_ranks(lists)
    for stage in range(num_stages):
        for i in range(num_micro_batches):
            kinds = {kind for kind in (F, B, I, W) if Action(kind, stage, i) in seen}
            if kinds not in ({F, B}, {F, I, W}):
                raise InputError(
                    f"stage {stage} micro-batch {i} has actions {sorted(kinds)}: needs F and B, or F, I and W"
                )
    _check_rendezvous(with_communication(lists, num_stages), num_stages)


def _check_rendezvous(lists: ActionLists, num_stages: int) -> None:
    """InputError where lists with sends and receives deadlock, use what has not come, or send without a receiver."""
    rank_of = stage_ranks(lists)
    every = {action for actions in lists for action in actions}
    for action in every:
        if action.kind in SENDS or action.kind in RECEIVES:
            other = receiver(action) if action.kind in SENDS else sender(action)
            if other not in every:
                raise InputError(f"action {action} has no partner: {other} is in no list")
    position = [0] * len(lists)
    done: set[Action] = set()
    ready = list(range(len(lists)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(lists[rank]):
            action = lists[rank][position[rank]]
            if action.kind in SENDS or action.kind in RECEIVES:
                other = receiver(action) if action.kind in SENDS else sender(action)
                peer = rank_of[other.stage]
                if peer == rank or position[peer] == len(lists[peer]) or lists[peer][position[peer]] != other:
                    break
                if action.kind in SENDS:
                    _require_produced(action, done)
                else:
                    _require_produced(other, done)
                done.update((action, other))
                position[peer] += 1
                ready.append(peer)
            elif action.kind in COMPUTE:
                _require_inputs(action, num_stages, rank_of, done)
                done.add(action)
            position[rank] += 1
    _raise_if_stuck(lists, position)


def _require_produced(send: Action, done: set[Action]) -> None:
    kinds = (F,) if send.kind is SEND_F else (B, I)
    if not any(Action(kind, send.stage, send.micro_batch) in done for kind in kinds):
        raise InputError(f"action {send} comes before what it sends is computed")


def _require_inputs(action: Action, num_stages: int, rank_of: Mapping[int, int], done: set[Action]) -> None:
    """InputError where a computation's inputs are not on its rank yet."""
    stage, i = action.stage, action.micro_batch
    for options in requirements(action, num_stages):
        source = options[0].stage
        if rank_of[source] == rank_of[stage]:
            if not any(option in done for option in options):
                raise InputError(f"action {action} comes before {' or '.join(map(str, options))}, which it needs")
            continue
        needed = Action(RECV_F if source < stage else RECV_B, stage, i)
        if needed not in done:
            raise InputError(f"action {action} comes before {needed}, which it needs")


def _raise_if_stuck(lists: Sequence[Sequence[Action]], position: Sequence[int]) -> None:
    stuck = [str(actions[at]) for actions, at in zip(lists, position, strict=True) if at < len(actions)]
    if stuck:
        raise InputError(f"the schedule deadlocks: nothing can follow at {', '.join(stuck[:8])}")


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
