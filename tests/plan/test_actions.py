"""Action lists: their text is torch's, what is added to them runs with blocking sends, and what cannot run is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.plan.actions import (
    RECEIVES,
    RECV_F,
    REDUCE,
    SEND_F,
    SENDS,
    UNSHARD,
    Action,
    ActionKind,
    B,
    F,
    actions_from_csv,
    actions_to_csv,
    check_actions,
    compute_actions,
    parse_actions,
    with_communication,
)
from autopar.plan.plan import Schedule
from autopar.simulate.schedules import schedule_actions


def text_of(actions: tuple[Action, ...]) -> str:
    return " ".join(map(str, actions))


def test_text_is_that_of_torch() -> None:
    torch_action = pytest.importorskip("torch.distributed.pipelining.schedules")._Action
    for kind in ActionKind:
        action = Action(kind, 12) if kind in ("UNSHARD", "RESHARD", "REDUCE_GRAD") else Action(kind, 12, 3)
        assert str(torch_action.from_str(str(action))) == str(action)
        assert parse_actions([str(action)]) == (action,)


def test_overlapped_pairs_run_one_after_the_other_and_idle_steps_are_left_out() -> None:
    assert parse_actions(["", "(0F1;1B0)OVERLAP_F_B", " 2UNSHARD"]) == (
        Action(F, 0, 1), Action(B, 1, 0), Action(UNSHARD, 2)
    )


@pytest.mark.parametrize("text", ["F0", "0X1", "0F", "0UNSHARD3", "-1F0", "0F0 0F1"])
def test_what_is_no_action(text: str) -> None:
    with pytest.raises(InputError):
        parse_actions([text])


def test_a_file_without_actions() -> None:
    with pytest.raises(InputError, match="no pipeline actions"):
        actions_from_csv("\n\n")


def test_sends_and_receives_of_two_stages() -> None:
    full = with_communication(schedule_actions("1f1b", 2, 2), 2)
    assert text_of(full[0]) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    assert text_of(full[1]) == "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"


@st.composite
def named(draw: st.DrawFn) -> tuple[Schedule, int, int, int]:
    name = draw(st.sampled_from(list(Schedule)))
    p = draw(st.integers(1, 6))
    v = draw(st.integers(1, 3)) if name is Schedule.INTERLEAVED else 1
    m = draw(st.integers(p if name is Schedule.INTERLEAVED else 1, 14))
    return name, p, m, v


@given(named())
def test_every_schedule_runs_with_blocking_sends(case: tuple[Schedule, int, int, int]) -> None:
    name, p, m, v = case
    lists = schedule_actions(name, p, m, v)
    full = with_communication(lists, p * v)
    check_actions(full, p * v, m)
    assert compute_actions(full) == lists
    assert actions_from_csv(actions_to_csv(full)) == full
    flat = [action for actions in full for action in actions]
    sends, receives = (sum(a.kind in kinds for a in flat) for kinds in (SENDS, RECEIVES))
    assert sends == receives == (2 * m * (p * v - 1) if p > 1 else 0)
    assert with_communication(full, p * v) == full


def swapped(actions: tuple[Action, ...], one: str, other: str) -> tuple[Action, ...]:
    names = [str(action) for action in actions]
    i, j = names.index(one), names.index(other)
    found = list(actions)
    found[i], found[j] = found[j], found[i]
    return tuple(found)


def test_what_would_block_forever_is_refused() -> None:
    first, second = with_communication(schedule_actions("1f1b", 2, 2), 2)
    with pytest.raises(InputError, match="deadlocks: nothing can follow at 0SEND_F0, 1RECV_F1"):
        check_actions((first, swapped(second, "1RECV_F0", "1RECV_F1")), 2, 2)
    with pytest.raises(InputError, match="1F0 comes before 1RECV_F0"):
        check_actions((first, swapped(second, "1RECV_F0", "1F0")), 2, 2)
    with pytest.raises(InputError, match="0SEND_F0 comes before what it sends"):
        check_actions((swapped(first, "0F0", "0SEND_F0"), second), 2, 2)
    with pytest.raises(InputError, match="no partner: 0SEND_F1"):
        check_actions((tuple(a for a in first if a != Action(SEND_F, 0, 1)), second), 2, 2)
    with pytest.raises(InputError, match="1RECV_F1 occurs twice"):
        check_actions((first, (*second, Action(RECV_F, 1, 1))), 2, 2)
    with pytest.raises(InputError, match="runs on two ranks"):
        check_actions((first, (*second, Action(REDUCE, 0))), 2, 2)
