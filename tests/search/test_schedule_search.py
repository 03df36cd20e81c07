"""Searched schedules: known small cases, memory, and the exact order of few micro-batches."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.plan.actions import Action, B, F, check_actions, most_in_flight
from autopar.search.cpsat import Shop, Task, solve_shop
from autopar.search.list_schedules import timed_list_schedule
from autopar.search.schedule_search import lower_bound_s, repeated, search_schedule
from autopar.simulate.events import StageTimes, execute
from autopar.simulate.schedules import one_f_one_b


def stage(forward: float, backward: float, up: float = 0.0, down: float = 0.0, weights: float = 0.0) -> StageTimes:
    return StageTimes(
        forward_s=forward, backward_s=backward, input_backward_s=backward - weights, weight_backward_s=weights,
        send_forward_s=up, send_backward_s=down,
    )


def layers(*counts: int) -> list[StageTimes]:
    """Stages of so many layers of f = 1, b = 2, half of it for weights."""
    return [stage(float(n), 2.0 * n, weights=float(n)) for n in counts]


def test_a_slow_middle_link_is_hidden() -> None:
    stages = [stage(1, 2), stage(1, 2, up=3), stage(1, 2, down=3), stage(1, 2)]
    assert execute(one_f_one_b(4, 32), stages).end_s == 201
    found = search_schedule(stages, 32, [32] * 4, exact=False)
    assert found.step_s <= 111
    tight = search_schedule(stages, 32, [4, 3, 2, 1], exact=False)
    assert tight.step_s <= 201


def test_slow_links_everywhere_with_six_in_flight() -> None:
    stages = [stage(10, 20, up=10, down=10)] * 4
    found = search_schedule(stages, 8, [6] * 4, exact=False)
    assert found.step_s <= 390
    assert max(most_in_flight(actions)[r] for r, actions in enumerate(found.lists)) <= 6


def test_layers_and_a_head() -> None:
    """32 layers and a head worth six: 38 layers' work on four stages is 912 at the least for 32 micro-batches."""
    assert execute(one_f_one_b(4, 32), layers(8, 8, 8, 14)).end_s == 1416
    assert execute(one_f_one_b(4, 32), layers(10, 10, 10, 8)).end_s <= 1044
    found = search_schedule(layers(10, 10, 9, 9), 32, [8] * 4, split_backward=True, exact=False)
    assert found.step_s <= 970 == found.lower_bound_s  # whole layers: no stage of 38 / 4
    assert search_schedule(layers(10, 10, 9, 9), 32, [4] * 4, split_backward=True, exact=False).step_s <= 986


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*(st.integers(0, 5),) * 5), min_size=1, max_size=4), st.integers(1, 7), st.booleans(),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_found_schedules_run_and_hold_memory(
    times: list[tuple[int, ...]], m: int, split: bool, held: list[int]
) -> None:
    stages = [stage(1 + f, b + w, up, down, w) for f, b, up, down, w in times]
    limits = held[: len(stages)]
    found = search_schedule(stages, m, limits, split_backward=split, exact=False)
    check_actions(found.lists, len(stages), m)
    for rank, actions in enumerate(found.lists):
        assert most_in_flight(actions)[rank] <= limits[rank]
    assert found.lower_bound_s <= found.step_s == execute(found.lists, stages).end_s
    if all(limit >= len(stages) - rank for rank, limit in enumerate(limits)):
        assert found.step_s <= execute(one_f_one_b(len(stages), m), stages).end_s
    assert search_schedule(stages, m, limits, split_backward=split, exact=False) == found


def test_few_micro_batches_are_ordered_exactly() -> None:
    """Two stages, two micro-batches: CP-SAT against every order of the actions."""
    stages, m = [stage(2, 3, up=1, down=2), stage(3, 1)], 2
    best = float("inf")
    for own in permutations([Action(kind, 0, i) for kind in (F, B) for i in range(m)]):
        for other in permutations([Action(kind, 1, i) for kind in (F, B) for i in range(m)]):
            try:
                check_actions((own, other), 2, m)
            except InputError:
                continue
            best = min(best, execute((own, other), stages).end_s)
    found = search_schedule(stages, m, [2, 2])
    assert found.step_s == pytest.approx(best)


def test_the_solver_proves_a_small_shop() -> None:
    """Two jobs through two machines; one store has room for one of them at a time."""
    tasks = tuple(
        task for first in (0, 2) for task in (
            Task(machine=0, duration=2, store=0, change=1),
            Task(machine=1, duration=3, after=(first,), store=0, change=-1),
        )
    )
    free, tight = (
        solve_shop(Shop(tasks=tasks, limits=(room,), hint=(0, 2, 5, 7), horizon=20, lower=0, work_limit=1.0))
        for room in (2, 1)
    )
    assert (free.end, free.lower) == (8, 8)
    assert (tight.end, tight.lower) == (10, 10)


def test_a_repeating_part_is_repeated() -> None:
    assert repeated(one_f_one_b(3, 6), 6, 40) == one_f_one_b(3, 40)
    assert repeated(one_f_one_b(3, 8, (4, 3, 1)), 8, 30) == one_f_one_b(3, 30, (4, 3, 1))
    assert repeated(tuple(one_f_one_b(3, 2)), 2, 9) is None  # nothing repeats in so few


def test_bad_limits_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        search_schedule([stage(1, 2)], 2, [0])


def test_the_bound_counts_the_way_to_a_rank_and_back() -> None:
    assert lower_bound_s([stage(1, 2, up=2), stage(1, 2)], 10) == 1 + 2 + 30 + 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*(st.floats(0.0, 5.0),) * 6), min_size=1, max_size=4), st.integers(1, 7), st.booleans(),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_list_schedules_end_when_they_are_executed(
    times: list[tuple[float, ...]], m: int, split: bool, caps: list[int]
) -> None:
    """They are not executed where by their own ends they are no better than the best."""
    stages = [
        StageTimes(
            forward_s=forward, backward_s=back + weights, input_backward_s=back, weight_backward_s=weights,
            send_forward_s=up, send_backward_s=down, gather_s=gather,
        ) for forward, back, weights, up, down, gather in times
    ]
    lists, ends_s = timed_list_schedule(stages, m, caps[: len(stages)], split_backward=split)
    check_actions(lists, len(stages), m)
    assert execute(lists, stages).rank_end_s == tuple(ends_s)
    assert all(most_in_flight(own)[r] <= caps[r] for r, own in enumerate(lists))
