"""search_schedule: an order of actions for given stages that is shorter than the named schedules, with its bound.

Tried are 1F1B with deeper warm-ups for slow links, zero bubble, list scheduling (each rank at every moment the most
urgent action that can begin), and on few micro-batches the exact order by CP-SAT, whose repeating part is then repeated
for the others. What is shortest when it is executed exactly wins. Memory is held on every rank in each of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from operator import add

import numpy as np

from autopar.errors import InputError
from autopar.plan.actions import Action, ActionKind, ActionLists, B, F, I, W, check_actions
from autopar.search.cpsat import Shop, SolverFailedError, Task, solve_shop
from autopar.search.list_schedules import list_schedule, timed_list_schedule
from autopar.simulate.closed_form import figures, one_f_one_b_s
from autopar.simulate.events import StageTimes, execute
from autopar.simulate.schedules import latency_aware_warmup, one_f_one_b, zero_bubble

log = logging.getLogger(__name__)
MAX_SHOP = 170  # tasks that CP-SAT is given
WORK_LIMIT = 2.0  # its deterministic seconds
Depths = tuple[int, ...]  # of the warm-up of each rank
Offer = Callable[[ActionLists, str], float]  # takes lists and their name, gives their step time
MAX_ADJUSTED = 200_000  # actions that are executed to find depths of warm-ups
TICKS = 2000  # the longest action in whole ticks, where times are no whole numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSchedule:
    """Action lists, one a rank, and what they take; `name` says how they were found."""

    lists: ActionLists
    step_s: float
    lower_bound_s: float
    name: str

    @property
    def gap(self) -> float:
        return self.step_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else math.inf


def search_schedule(
    stages: Sequence[StageTimes], num_micro_batches: int, most_held: Sequence[int], *, split_backward: bool = False,
    end_s: Sequence[float] | None = None, exact: bool = True, listed: bool = True, limit_s: float = math.inf,
) -> FoundSchedule:
    """The shortest schedule found for one stage a rank. Deterministic.

    `most_held[r]`: micro-batches whose activations fit on rank r at once, at least 1. `split_backward` allows gradients
    of weights after those of inputs (activations are held until then). `end_s`: what each rank does after all its
    actions. `listed` tries list schedules, which take long for many micro-batches, and `exact` asks CP-SAT too. No
    warm-ups are adjusted where none can take less than `limit_s`.
    """
    p, m = len(stages), num_micro_batches
    if len(most_held) != p or min(most_held) < 1:
        raise InputError(f"{p} stages need a limit of at least 1 micro-batch each, not {list(most_held)}")
    caps = [min(held, m) for held in most_held]
    ends = list(end_s) if end_s is not None else [0.0] * p
    best: list[FoundSchedule] = []
    lower = lower_bound_s(stages, m, end_s=ends, split_backward=split_backward)

    def offer(lists: ActionLists, name: str) -> float:
        run = execute(lists, stages)
        step = max(own + end for own, end in zip(run.rank_end_s, ends, strict=True))
        if not best or step < best[0].step_s * (1 - 1e-12):
            best[:] = [FoundSchedule(lists=lists, step_s=step, lower_bound_s=min(step, lower), name=name)]
        return step

    for lists, name in _named(stages, m, caps, split_backward=split_backward):
        offer(lists, name)
    rules = (False, True) if split_backward else (False,)
    for split, own in product(rules, _cap_choices(caps) if listed else ()):
        lists, ends_s = timed_list_schedule(stages, m, own, split_backward=split)
        if max(map(add, ends_s, ends)) < best[0].step_s:
            offer(lists, "list schedule")
    if lower_bound_s(stages, m, end_s=ends, split_backward=False) < min(limit_s, best[0].step_s):
        _adjust_warmup(stages, m, caps, offer, ends[0])  # else no 1f1b is quicker
    if exact and best[0].step_s > lower * (1 + 1e-9):
        few = _small_count(p, m, caps, split_backward=split_backward)
        if few:
            small = _exact(stages, few, caps, split_backward=split_backward)
            whole = small if few == m else repeated(small, few, m)
            if whole is not None and _holds(whole, caps):
                offer(whole, f"CP-SAT on {few} micro-batches" + ("" if few == m else ", repeated"))
    return best[0]


def lower_bound_s(
    stages: Sequence[StageTimes], num_micro_batches: int, *, end_s: Sequence[float] | None = None,
    split_backward: bool = True,
) -> float:
    """No order of actions is shorter: each rank waits for its first input, works, and what it did last goes back.

    A rank's last backward of inputs leads to one on each earlier rank. One in parts, which `split_backward` allows, may
    leave gradients of weights for the end; else nothing else comes after it.
    """
    m, found = num_micro_batches, 0.0
    arrives = returns = 0.0  # the first input on this rank, and the last gradient that it sends on rank 0
    for r, stage in enumerate(stages):
        before = max(arrives, stage.gather_s)
        backward_s = min(stage.backward_s, _first_part(stage)) if split_backward else stage.backward_s
        work_s = _work(stage) if split_backward else stage.forward_s + stage.backward_s
        found = max(
            found, before + m * work_s + stage.reduce_s + (end_s[r] if end_s is not None else 0.0),
            before + m * (stage.forward_s + backward_s) + returns + (end_s[0] if end_s is not None else 0.0),
        )
        for send in (stage.send_forward_s, stage.send_backward_s):
            found = max(found, m * send)
        arrives = before + stage.forward_s + stage.send_forward_s
        returns += backward_s + (stages[r + 1].send_backward_s if r + 1 < len(stages) else 0.0)
    return found


def _first_part(stage: StageTimes) -> float:
    """A backward's first part, which the rank before waits for."""
    return stage.input_backward_s if stage.input_backward_s + stage.weight_backward_s else stage.backward_s


def _work(stage: StageTimes) -> float:
    split = stage.input_backward_s + stage.weight_backward_s
    return stage.forward_s + (min(stage.backward_s, split) if split else stage.backward_s)


def _named(
    stages: Sequence[StageTimes], m: int, caps: Sequence[int], *, split_backward: bool
) -> Iterator[tuple[ActionLists, str]]:
    """The named schedules that the limits allow; 1F1B with a shallower warm-up where they are tight."""
    p = len(stages)
    plain = tuple(min(p - r, cap) - 1 for r, cap in enumerate(caps))
    yield one_f_one_b(p, m, _falling(plain)), "1f1b"
    deeper = latency_aware_warmup(
        [stage.forward_s + stage.backward_s for stage in stages], _link_s(stages), most_held=caps
    )
    yield one_f_one_b(p, m, deeper), "1f1b, warmed up by latency"
    if split_backward and all(cap >= min(p - r, m) for r, cap in enumerate(caps)):
        lists = zero_bubble(p, m)
        if _holds(lists, caps):
            yield lists, "zb"


def _link_s(stages: Sequence[StageTimes]) -> list[float]:
    """Seconds from each rank to the next one way, the mean of both."""
    return [(one.send_forward_s + other.send_backward_s) / 2 for one, other in pairwise(stages)]


def _falling(depths: Sequence[int]) -> tuple[int, ...]:
    """No rank warms up deeper than the one before."""
    found: list[int] = []
    for depth in depths:
        found.append(min(depth, found[-1]) if found else depth)
    return tuple(found)


def _cap_choices(caps: Sequence[int]) -> list[tuple[int, ...]]:
    """Limits in flight to list-schedule with: those of memory, and tighter ones."""
    p = len(caps)
    wanted = [[p - r + more for r in range(p)] for more in range(2 * p + 1)]
    wanted.append([math.ceil(1.5 * (p - r)) for r in range(p)])
    wanted.append([2 * (p - r) for r in range(p)])
    return list(dict.fromkeys([tuple(caps), *(tuple(map(min, caps, own)) for own in wanted)]))


def _adjust_warmup(
    stages: Sequence[StageTimes], m: int, caps: Sequence[int], offer: Offer, end_s: float
) -> None:
    """From the best of several depths on, moves the depth of one rank, or of it and all before, while that helps.

    `end_s`: what the first rank does after all its actions.
    """
    p = len(stages)
    starts = [
        latency_aware_warmup(
            [stage.forward_s + stage.backward_s for stage in stages], _link_s(stages), most_held=caps
        ),
        *(_falling([cap - 1 for cap in own]) for own in _cap_choices(caps)),
    ]
    seen: dict[Depths, float] = {}  # infinite where its closed form did not beat the best
    times, changes = figures(stages), list(product(range(p), (1, -1), (True, False)))

    def least_s(every: Sequence[Depths]) -> list[float]:
        """What is below the time of each: the closed form, and what comes after it on the first rank."""
        if not every:
            return []
        forward, backward, send_forward, send_backward = (np.broadcast_to(table, (len(every), p)) for table in times)
        found = one_f_one_b_s(forward, backward, send_forward, send_backward, m, np.array(every))
        return [(1 - 1e-12) * time_s + end_s for time_s in found.tolist()]

    def beats(depths: Depths, least_s: float, limit_s: float) -> bool:
        if depths not in seen:
            fits = least_s < limit_s
            seen[depths] = offer(one_f_one_b(p, m, depths), "1f1b, warm-up adjusted") if fits else math.inf
        return seen[depths] < limit_s

    def changed(depths: Depths) -> dict[tuple[int, int, bool], tuple[Depths, float]]:
        """The depths that one change gives, with what is below their time."""
        found: dict[tuple[int, int, bool], Depths] = {}
        for r, change, alone in changes:
            other = tuple(
                depth + change if i == r or (i < r and not alone) else depth for i, depth in enumerate(depths)
            )
            if _falling(other) == other and all(0 <= d < cap for d, cap in zip(other, caps, strict=True)):
                found[r, change, alone] = other
        return dict(zip(found, zip(found.values(), least_s(list(found.values())), strict=True), strict=True))

    most = max(8, MAX_ADJUSTED // (2 * p * m))
    first = list(dict.fromkeys(starts))[:most]
    depths, best_s = first[0], math.inf
    for own, own_s in zip(first, least_s(first), strict=True):
        if beats(own, own_s, best_s):
            depths, best_s = own, seen[own]
    improved = True
    while improved and len(seen) < most:
        improved, near = False, changed(depths)
        for key in changes:
            if key in near and beats(*near[key], best_s * (1 - 1e-12)):
                depths = near[key][0]
                best_s, improved, near = seen[depths], True, changed(depths)


def _holds(lists: ActionLists, caps: Sequence[int]) -> bool:
    for actions, cap in zip(lists, caps, strict=True):
        held = 0
        for action in actions:
            held += (action.kind is F) - (action.kind in (B, W))
            if held > cap:
                return False
    return True


def _small_count(p: int, m: int, caps: Sequence[int], *, split_backward: bool) -> int:
    """How many micro-batches CP-SAT is given: all, or so many that a part can repeat; 0 where those are too many."""
    each = p * (3 if split_backward else 2) + 2 * (p - 1)
    if m * each <= MAX_SHOP:
        return m
    few = min(m, max(caps) + p)
    return few if few * each <= 2 * MAX_SHOP and few > p else 0


def _exact(
    stages: Sequence[StageTimes], m: int, caps: Sequence[int], *, split_backward: bool
) -> ActionLists:
    """The best order for m micro-batches that CP-SAT finds, from the best list schedule on."""
    p = len(stages)
    choices = [list_schedule(stages, m, own, split_backward=split_backward) for own in _cap_choices(caps)]
    hint = min(choices, key=lambda lists: execute(lists, stages).end_s)
    shop, actions = _shop(stages, m, caps, hint, split_backward=split_backward)
    try:
        answer = solve_shop(shop)
    except SolverFailedError as error:
        log.warning("a schedule was not searched exactly: %s", error)
        return hint
    if not answer.starts:
        return hint
    order = sorted((start, i) for i, (start, own) in enumerate(zip(answer.starts, actions, strict=True)) if own)
    lists: list[list[Action]] = [[] for _ in range(p)]
    for _, i in order:
        own = actions[i]
        assert own is not None
        lists[own.stage].append(own)
    found = tuple(map(tuple, lists))
    return found if execute(found, stages).end_s <= execute(hint, stages).end_s else hint


def _shop(
    stages: Sequence[StageTimes], m: int, caps: Sequence[int], hint: ActionLists, *, split_backward: bool
) -> tuple[Shop, list[Action | None]]:
    """The problem in whole ticks, and the action of each of its tasks (None for messages). Links are machines too."""
    p = len(stages)
    tick = _tick(stages)
    kinds = (F, I, W) if split_backward else (F, B)
    seconds = [{F: s.forward_s, B: s.backward_s, I: s.input_backward_s, W: s.weight_backward_s} for s in stages]
    index: dict[tuple[str, int, int], int] = {}
    for name in (*map(str, kinds), "up", "down"):
        for r in range(p):
            for i in range(m):
                if (name == "up" and (r + 1 == p or not stages[r].send_forward_s)) or (
                    name == "down" and (r == 0 or not stages[r].send_backward_s)
                ):
                    continue
                index[name, r, i] = len(index)
    starts = {
        action: round(start / tick) for actions, own in zip(hint, execute(hint, stages).starts, strict=True)
        for action, start in zip(actions, own, strict=True)
    }
    tasks: list[Task] = []
    actions: list[Action | None] = []
    hints: list[int] = []
    back = str(kinds[1])
    for name, r, i in index:
        previous = [index[name, r, i - 1]] if i else []
        if name == "up":
            tasks.append(Task(machine=p + r, duration=_ticks(stages[r].send_forward_s, tick),
                              after=(index["F", r, i], *previous)))
            actions.append(None)
            hints.append(starts[Action(F, r, i)] + _ticks(stages[r].forward_s, tick))
            continue
        if name == "down":
            tasks.append(Task(machine=2 * p + r, duration=_ticks(stages[r].send_backward_s, tick),
                              after=(index[back, r, i], *previous)))
            actions.append(None)
            hints.append(starts[Action(kinds[1], r, i)] + _ticks(seconds[r][kinds[1]], tick))
            continue
        kind = ActionKind(name)
        after = previous  # micro-batches in order, which loses nothing: they are alike
        if kind is F and r:
            after = [*after, index.get(("up", r - 1, i), index["F", r - 1, i])]
        elif kind is W:
            after = [*after, index["I", r, i]]
        elif kind is not F:
            later = index.get(("down", r + 1, i), index[back, r + 1, i]) if r + 1 < p else index["F", r, i]
            after = [*after, later, index["F", r, i]]
        change = 1 if kind is F else -1 if kind in (B, W) else 0
        tasks.append(Task(machine=r, duration=_ticks(seconds[r][kind], tick), after=tuple(after), store=r,
                          change=change))
        actions.append(Action(kind, r, i))
        hints.append(starts[Action(kind, r, i)])
    horizon = sum(task.duration for task in tasks)
    longest = max(start + task.duration for start, task in zip(hints, tasks, strict=True))
    here = [replace(own, gather_s=0.0, reduce_s=0.0) for own in stages]  # the shop has no collectives
    lower = math.floor(lower_bound_s(here, m, split_backward=split_backward) / tick * (1 - 1e-3))
    return Shop(
        tasks=tuple(tasks), limits=tuple(caps), hint=tuple(hints), horizon=min(horizon, 2 * longest), lower=lower,
        work_limit=WORK_LIMIT,
    ), actions


def _tick(stages: Sequence[StageTimes]) -> float:
    """One where all times are whole numbers, else a part of the longest action."""
    times = [
        time for s in stages for time in (s.forward_s, s.backward_s, s.input_backward_s, s.weight_backward_s,
                                          s.send_forward_s, s.send_backward_s)
    ]
    if all(time == round(time) for time in times):
        return 1.0
    return max(times) / TICKS


def _ticks(time_s: float, tick: float) -> int:
    return round(time_s / tick)


def repeated(lists: ActionLists, few: int, many: int) -> ActionLists | None:
    """The lists of `few` micro-batches with their repeating part repeated for `many`; None where none has one.

    On each rank what runs from one forward to the next in the middle has one action of each kind: that is repeated,
    with every micro-batch counted on.
    """
    found = []
    for actions in lists:
        at = [i for i, action in enumerate(actions) if action.kind is F]
        kinds = {action.kind for action in actions}
        middle = sorted(range(few - 1), key=lambda c: abs(2 * c - few))
        for c in middle:
            part = actions[at[c] : at[c + 1]]
            if sorted(action.kind for action in part) == sorted(kinds) and _settled(actions, at[c], part):
                break
        else:
            return None
        grown = list(actions[: at[c + 1]])
        for more in range(1, many - few + 1):
            grown += [Action(action.kind, action.stage, action.micro_batch + more) for action in part]
        grown += [
            Action(action.kind, action.stage, action.micro_batch + many - few) for action in actions[at[c + 1] :]
        ]
        found.append(tuple(grown))
    made = tuple(found)
    try:
        check_actions(made, len(lists), many)
    except InputError:
        return None
    return made


def _settled(actions: Sequence[Action], start: int, part: Sequence[Action]) -> bool:
    """Whether the part goes on in order: before it came all earlier micro-batches of each kind, and no later ones."""
    before = {action.kind: action.micro_batch for action in actions[:start]}
    return all(before.get(action.kind, -1) == action.micro_batch - 1 for action in part)
