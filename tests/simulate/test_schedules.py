"""Action lists: legal, as deep as promised, and as fast as their closed forms say."""

from __future__ import annotations

import pytest

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.simulate.closed_form import closed_form_s
from autopar.simulate.events import StageTimes, execute, peak_activation_bytes
from autopar.simulate.schedules import (
    ActionKind,
    check_actions,
    latency_aware_warmup,
    most_in_flight,
    one_f_one_b,
    schedule_actions,
)

UNIT = StageTimes(forward_s=1.0, backward_s=2.0, input_backward_s=1.0, weight_backward_s=1.0)


@pytest.mark.parametrize("name", list(Schedule))
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 4, 7, 8, 24])
def test_every_schedule_is_legal(name: Schedule, p: int, m: int) -> None:
    chunks = 3 if name is Schedule.INTERLEAVED else 1
    if name is Schedule.INTERLEAVED and m < p:
        with pytest.raises(InputError, match="as many micro-batches as pipeline ranks"):
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
        assert end == pytest.approx(closed_form_s(name, [UNIT] * p, m))
    assert execute(schedule_actions("zb", p, m), [UNIT] * p).end_s == pytest.approx(3 * m + (p - 1))
    assert closed_form_s("zb", [UNIT] * p, m) == pytest.approx(3 * m + (p - 1))
    v = 4
    chunk = StageTimes(forward_s=1 / v, backward_s=2 / v)
    end = execute(schedule_actions("interleaved", p, m, v), [chunk] * (p * v)).end_s
    assert end == pytest.approx(3 * m + 3 * (p - 1) / v)
    assert end == pytest.approx(closed_form_s("interleaved", [chunk] * (p * v), m, num_chunks=v))


@pytest.mark.parametrize(("p", "m", "size"), [(4, 8, 4), (4, 5, 5), (4, 10, 5), (3, 7, 7), (2, 9, 3)])
def test_rounds_of_an_interleaved_schedule(p: int, m: int, size: int) -> None:
    """A round is a number of micro-batches from p on that divides all; a rank's first chunk takes a whole one first."""
    lists = schedule_actions("interleaved", p, m, 2)
    assert [str(action) for action in lists[0][: size + 1]] == [f"0F{i}" for i in range(size)] + [f"{p}F0"]


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
