"""Execution of action lists against a longest path and against cases worked out by hand."""

from __future__ import annotations

import pytest
from brute_force import brute_force_end_s
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_samples import any_times, named_schedules

from autopar.plan.actions import Action, ActionKind, ActionLists, parse_actions, requirements, with_communication
from autopar.plan.plan import Schedule
from autopar.simulate.events import StageTimes, activation_steps, execute, peak_activation_bytes
from autopar.simulate.schedules import schedule_actions


@st.composite
def any_lists(draw: st.DrawFn) -> tuple[ActionLists, int]:
    """Lists in any order that can run, with whole and split backwards, and their number of stages."""
    p, v, m = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n = p * v
    split = draw(st.booleans())
    kinds = [ActionKind(kind) for kind in ("FIW" if split else "FB")]
    left = {Action(kind, stage, i) for kind in kinds for stage in range(n) for i in range(m)}
    done: set[Action] = set()
    lists: list[list[Action]] = [[] for _ in range(p)]
    while left:
        able = sorted(
            (a for a in left if all(done.intersection(options) for options in requirements(a, n))), key=str
        )
        action = draw(st.sampled_from(able))
        lists[action.stage % p].append(action)
        done.add(action)
        left.remove(action)
    return tuple(map(tuple, lists)), n


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_named_schedules_take_the_longest_path(data: st.DataObject) -> None:
    name, p, m, v = data.draw(named_schedules())
    stages = data.draw(st.lists(any_times, min_size=p * v, max_size=p * v))
    lists = schedule_actions(name, p, m, v)
    assert execute(lists, stages).end_s == brute_force_end_s(lists, stages)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lists_take_the_longest_path_with_their_sends_written_out_or_not(data: st.DataObject) -> None:
    lists, n = data.draw(any_lists())
    stages = data.draw(st.lists(any_times, min_size=n, max_size=n))
    run = execute(lists, stages)
    assert run.end_s == brute_force_end_s(lists, stages)
    assert execute(with_communication(lists, n), stages) == run


@settings(max_examples=60, deadline=None)
@given(st.lists(any_times, min_size=1, max_size=5), st.integers(1, 8))
def test_no_schedule_beats_its_bottleneck(stages: list[StageTimes], m: int) -> None:
    exact = execute(schedule_actions("1f1b", len(stages), m), stages).end_s
    assert exact >= m * max(s.forward_s + s.backward_s for s in stages)
    assert exact >= sum(s.forward_s + s.backward_s for s in stages)


def test_collectives_beside_the_computation() -> None:
    """Two chunks a rank: the second's gather hides behind the first's forwards, the reduction that comes first too."""
    stage = StageTimes(forward_s=2, backward_s=4, gather_s=1, reduce_s=3)
    run = execute(schedule_actions("interleaved", 1, 2, 2), [stage, stage])
    assert [(str(action), start, end) for action, start, end in run.collectives[0]] == [
        ("0UNSHARD", 0, 1), ("1UNSHARD", 1, 2), ("1REDUCE_GRAD", 21, 24), ("0REDUCE_GRAD", 25, 28)
    ]
    assert run.ends[0][-1] == 25  # 1 of the gather, 4 forwards, 4 backwards
    assert (run.end_s, run.busy_s) == (28, (24,))


def test_collectives_where_the_list_says() -> None:
    stage = StageTimes(forward_s=2, backward_s=4, gather_s=1, reduce_s=3)
    lists = (parse_actions(["0UNSHARD", "0F0", "0RESHARD", "0UNSHARD", "0B0", "0REDUCE_GRAD"]),)
    run = execute(lists, [stage])
    assert [(start, end) for _, start, end in run.collectives[0]] == [(0, 1), (3, 4), (8, 11)]
    assert run.starts == ((1, 4),)


def test_messages_and_events() -> None:
    stages = [StageTimes(forward_s=1, backward_s=2, send_forward_s=3, send_backward_s=0)] * 2
    run = execute(schedule_actions("1f1b", 2, 2), stages)
    assert [(str(action), start, end) for action, start, end in run.messages(0)] == [
        ("0SEND_F0", 1, 4), ("0SEND_F1", 4, 7)
    ]
    assert run.messages(1) == ()
    found = [(event.rank, str(event.action), event.start_s, event.end_s) for event in run.events()]
    assert found == [
        (0, "0F0", 0, 1), (0, "0F1", 1, 2), (0, "0B0", 7, 9), (0, "0B1", 10, 12), (0, "0SEND_F0", 1, 4),
        (0, "0SEND_F1", 4, 7), (1, "1F0", 4, 5), (1, "1B0", 5, 7), (1, "1F1", 7, 8), (1, "1B1", 8, 10),
    ]


def test_activations_over_time() -> None:
    stage = StageTimes(forward_s=1, backward_s=2)
    run = execute(schedule_actions("1f1b", 1, 2), [stage])
    assert activation_steps(run, 0, [10.0], [5.0]) == [
        (0, 0), (0, 10), (1, 15), (3, 0), (3, 10), (4, 15), (6, 0)
    ]


@given(named_schedules())
def test_the_peak_is_that_of_the_steps(case: tuple[Schedule, int, int, int]) -> None:
    name, p, m, v = case
    lists = schedule_actions(name, p, m, v)
    run = execute(lists, [StageTimes(forward_s=1, backward_s=2, input_backward_s=1, weight_backward_s=1)] * (p * v))
    held, extra = [float(7 + i) for i in range(p * v)], [float(3 + 2 * i) for i in range(p * v)]
    peaks = peak_activation_bytes(lists, held, extra)
    for rank in range(p):
        steps = activation_steps(run, rank, held, extra)
        assert max(size for _, size in steps) == pytest.approx(peaks[rank])
        assert steps[-1][1] == pytest.approx(0)
        assert [time for time, _ in steps] == sorted(time for time, _ in steps)
