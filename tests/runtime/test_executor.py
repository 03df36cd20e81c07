"""What is checked of action lists before they run."""

from __future__ import annotations

import pytest

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.runtime.executor import check_channels
from autopar.simulate.schedules import Action, ActionKind, schedule_actions

F, B = ActionKind.FORWARD, ActionKind.BACKWARD


@pytest.mark.parametrize("schedule", [Schedule.GPIPE, Schedule.ONE_F_ONE_B])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_schedules_that_run(schedule: Schedule, stages: int, micro_batches: int) -> None:
    check_channels(schedule_actions(schedule, stages, micro_batches), stages, micro_batches)


def test_micro_batches_in_another_order_are_refused() -> None:
    first = tuple(Action(kind, 0, i) for kind in (F, B) for i in (0, 1))
    second = tuple(Action(kind, 1, i) for kind in (F, B) for i in (1, 0))
    with pytest.raises(InputError, match="a channel delivers in one order"):
        check_channels((first, second), 2, 2)


def test_a_deadlock_is_refused() -> None:
    first = (Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1))
    second = (Action(F, 1, 0), Action(F, 1, 1), Action(B, 1, 0), Action(B, 1, 1))
    with pytest.raises(InputError, match="deadlock"):
        check_channels((first, second), 2, 2)
