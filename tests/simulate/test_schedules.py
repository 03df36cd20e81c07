"""Action lists: legal, as deep as promised, and as fast as their closed forms say."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.simulate.events import StageTimes, closed_form_s, execute, peak_activation_bytes
from autopar.simulate.schedules import (
    Action,
    ActionKind,
    ActionLists,
    check_actions,
    latency_aware_warmup,
    most_in_flight,
    one_f_one_b,
    requirements,
    schedule_actions,
)

UNIT = StageTimes(forward_s=1.0, backward_s=2.0, input_backward_s=1.0, weight_backward_s=1.0)


def brute_force_end_s(lists: ActionLists, stages: list[StageTimes]) -> float:
    """Longest path by relaxation until nothing changes: rank order, data arrival, and one message a link at a time."""
    order: dict[Action, float] = {action: 0.0 for actions in lists for action in actions}

    def span(action: Action) -> float:
        times = stages[action.stage]
        return {"F": times.forward_s, "B": times.backward_s, "I": times.input_backward_s, "W": times.weight_backward_s}[
            action.kind
        ]

    changed = True
    while changed:
        changed = False
        arrival: dict[tuple[Action, int], float] = {}
        for actions in lists:
            for stage in {a.stage for a in actions}:
                free = [0.0, 0.0]
                for action in actions:
                    if action.stage != stage or action.kind == "W":
                        continue
                    way = 0 if action.kind == "F" else 1
                    send = stages[stage].send_backward_s if way else stages[stage].send_forward_s
                    free[way] = max(free[way], order[action] + span(action)) + send
                    arrival[action, stage + (1 - 2 * way)] = free[way]
        for actions in lists:
            last = 0.0
            for action in actions:
                start = last
                for options in requirements(action, len(stages)):
                    for option in options:
                        if option in order:
                            own = option.stage == action.stage
                            start = max(start, order[option] + span(option) if own else arrival[option, action.stage])
                if start > order[action] + 1e-12:
                    order[action] = start
                    changed = True
                last = order[action] + span(action)
    return max(start + span(action) for action, start in order.items())


@pytest.mark.parametrize("name", list(Schedule))
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 4, 7, 8, 24])
def test_every_schedule_is_legal(name: Schedule, p: int, m: int) -> None:
    chunks = 3 if name is Schedule.INTERLEAVED else 1
    if name is Schedule.INTERLEAVED and m % p:
        with pytest.raises(InputError, match="multiple of pipeline ranks"):
            schedule_actions(name, p, m, chunks)
        return
    check_actions(schedule_actions(name, p, m, chunks), p * chunks, m)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [8, 16, 64])
def test_bubbles_are_those_of_the_papers(p: int, m: int) -> None:
    for name in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        end = execute(schedule_actions(name, p, m), [UNIT] * p).end_s
        assert end == pytest.approx(3 * (m + p - 1))
        assert 1 - 3 * m / end == pytest.approx((p - 1) / (m + p - 1))
        assert end == pytest.approx(closed_form_s([UNIT] * p, m))
    assert execute(schedule_actions("zb", p, m), [UNIT] * p).end_s == pytest.approx(3 * m + (p - 1))
    v = 4
    chunk = StageTimes(forward_s=1 / v, backward_s=2 / v)
    assert execute(schedule_actions("interleaved", p, m, v), [chunk] * (p * v)).end_s == pytest.approx(
        3 * m + 3 * (p - 1) / v
    )


def test_depths() -> None:
    p, m = 4, 16
    assert [most_in_flight(actions) for actions in schedule_actions("1f1b", p, m)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]
    assert [most_in_flight(actions) for actions in schedule_actions("gpipe", p, m)] == [{i: 16} for i in range(p)]
    assert all(max(most_in_flight(actions).values()) <= p for actions in schedule_actions("zb", p, m))
    assert peak_activation_bytes(schedule_actions("1f1b", p, m), [10.0] * p, [5.0] * p) == (45.0, 35.0, 25.0, 15.0)


def test_text_of_actions() -> None:
    assert [str(a) for a in schedule_actions("1f1b", 2, 2)[0]] == ["0F0", "0F1", "0B0", "0B1"]


def test_illegal_lists_are_named() -> None:
    good = schedule_actions("1f1b", 2, 2)
    with pytest.raises(InputError, match="needs F and B"):
        check_actions((good[0][:-1], good[1]), 2, 2)
    with pytest.raises(InputError, match="deadlocks"):
        check_actions((good[0], tuple(reversed(good[1]))), 2, 2)
    with pytest.raises(InputError, match="twice"):
        check_actions((good[0] + good[0][:1], good[1]), 2, 2)
    with pytest.raises(InputError, match="deadlocks"):
        execute((good[0], tuple(reversed(good[1]))), [UNIT] * 2)
    with pytest.raises(InputError, match="use interleaved"):
        schedule_actions("1f1b", 2, 2, 2)


seconds = st.integers(0, 8).map(float)
times = st.builds(
    StageTimes, forward_s=seconds, backward_s=seconds, input_backward_s=seconds, weight_backward_s=seconds,
    send_forward_s=seconds, send_backward_s=seconds,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_execution_equals_the_longest_path(data: st.DataObject) -> None:
    p = data.draw(st.integers(1, 4))
    name = data.draw(st.sampled_from(list(Schedule)))
    v = data.draw(st.integers(1, 2)) if name is Schedule.INTERLEAVED else 1
    m = p * data.draw(st.integers(1, 2)) if name is Schedule.INTERLEAVED else data.draw(st.integers(1, 6))
    stages = data.draw(st.lists(times, min_size=p * v, max_size=p * v))
    lists = schedule_actions(name, p, m, v)
    assert execute(lists, stages).end_s == pytest.approx(brute_force_end_s(lists, stages))


@settings(max_examples=60, deadline=None)
@given(st.lists(times, min_size=1, max_size=5), st.integers(1, 8))
def test_no_schedule_beats_its_bottleneck(stages: list[StageTimes], m: int) -> None:
    exact = execute(schedule_actions("1f1b", len(stages), m), stages).end_s
    assert exact >= m * max(s.forward_s + s.backward_s for s in stages)
    assert exact >= sum(s.forward_s + s.backward_s for s in stages)


def test_a_hundred_thousand_events_a_second() -> None:
    p, m = 16, 1024
    lists = schedule_actions("1f1b", p, m)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        execute(lists, [UNIT] * p)
        best = min(best, time.perf_counter() - start)
    assert 2 * p * m / best > 1e5


def test_action_kinds() -> None:
    assert {str(kind) for kind in ActionKind} >= {"F", "B", "I", "W"}


def test_plain_1f1b_on_a_slow_middle_link_and_the_latency_aware_one() -> None:
    """Four stages, 32 micro-batches, one middle link of three units: the bound of the computation alone is 105."""
    link = 3.0
    stages = [
        StageTimes(forward_s=1, backward_s=2, send_forward_s=link * (i == 1), send_backward_s=link * (i == 2))
        for i in range(4)
    ]
    assert execute(schedule_actions("1f1b", 4, 32), stages).end_s == 201
    warmup = latency_aware_warmup([3] * 4, [0, link, 0])
    assert warmup == (5, 4, 1, 0)
    assert execute(one_f_one_b(4, 32, warmup), stages).end_s == 111


def test_slow_links_hide_where_six_may_be_in_flight() -> None:
    stages = [StageTimes(forward_s=10, backward_s=20, send_forward_s=10, send_backward_s=10)] * 4
    warmup = latency_aware_warmup([30] * 4, [10] * 3, most_held=[6] * 4)
    assert execute(one_f_one_b(4, 8, warmup), stages).end_s == 390


def test_warmups_that_cannot_run() -> None:
    with pytest.raises(InputError, match="warm-up"):
        one_f_one_b(2, 4, [1])
    with pytest.raises(InputError, match="deadlocks"):
        check_actions(one_f_one_b(2, 4, [0, 1]), 2, 4)
    assert latency_aware_warmup([3.0] * 3, [9.0, 0.0], most_held=[2, 8, 8]) == (1, 1, 0)
