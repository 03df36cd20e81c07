"""Closed forms: never above the exact time, equal to it where they say so, and known small cases."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_samples import any_times, named_schedules

from autopar.errors import InputError
from autopar.plan.plan import Schedule
from autopar.simulate.closed_form import closed_form_s
from autopar.simulate.events import StageTimes, execute
from autopar.simulate.schedules import one_f_one_b, schedule_actions


@settings(deadline=None)
@given(st.data())
def test_never_above_the_exact_time(data: st.DataObject) -> None:
    name, p, m, v = data.draw(named_schedules())
    stages = data.draw(st.lists(any_times, min_size=p * v, max_size=p * v))
    exact = execute(schedule_actions(name, p, m, v), stages).end_s
    found = closed_form_s(name, stages, m, num_chunks=v)
    assert found <= exact * (1 + 1e-12)
    if name is Schedule.GPIPE:
        assert found == pytest.approx(exact)


@settings(deadline=None)
@given(st.data())
def test_never_above_it_under_any_warmup(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 10))
    warmup = sorted(data.draw(st.lists(st.integers(0, 8), min_size=p, max_size=p)), reverse=True)
    stages = data.draw(st.lists(any_times, min_size=p, max_size=p))
    exact = execute(one_f_one_b(p, m, warmup), stages).end_s
    assert closed_form_s("1f1b", stages, m, warmup=warmup) <= exact * (1 + 1e-12)


@given(st.integers(1, 8), st.integers(1, 24), st.sampled_from([(3, 2, 1), (2, 2, 2), (2, 3, 0)]))
def test_zero_bubble_is_that_of_its_paper(p: int, m: int, times: tuple[int, int, int]) -> None:
    f, i, w = times
    stage = StageTimes(forward_s=f, backward_s=i + w, input_backward_s=i, weight_backward_s=w)
    exact = execute(schedule_actions("zb", p, m), [stage] * p).end_s
    assert closed_form_s("zb", [stage] * p, m) == exact
    if m >= 2 * p:
        assert exact == m * (f + i + w) + (p - 1) * (f + i - w)


def layers(counts: tuple[int, ...]) -> list[StageTimes]:
    return [StageTimes(forward_s=count, backward_s=2 * count) for count in counts]


@pytest.mark.parametrize(("counts", "seconds"), [((8, 8, 8, 14), 1416), ((8, 10, 10, 10), 1044)])
def test_a_head_worth_six_layers(counts: tuple[int, ...], seconds: float) -> None:
    """32 layers and a head of six on four stages, 32 micro-batches: cut evenly and in balance."""
    stages = layers(counts)
    assert closed_form_s("1f1b", stages, 32) == execute(schedule_actions("1f1b", 4, 32), stages).end_s == seconds


def test_the_best_cut_with_that_head() -> None:
    cuts = [(*cut, 38 - sum(cut)) for cut in product(range(8, 12), repeat=3) if sum(cut) < 32]
    lists = schedule_actions("1f1b", 4, 32)
    assert min(execute(lists, layers(cut)).end_s for cut in cuts) == 1038
    assert min(closed_form_s("1f1b", layers(cut), 32) for cut in cuts) == 1038


def test_rounds_on_the_slowest_stage_behind() -> None:
    stages = [StageTimes(forward_s=f, backward_s=b) for f, b in ((1, 1), (1, 2), (2, 4), (3, 2))]
    exact = execute(schedule_actions("1f1b", 4, 10), stages).end_s
    # The first micro-batch, a round on each of the last two stages, and the seven that are left on the slower one.
    assert closed_form_s("1f1b", stages, 10) == exact == 16 + (6 + 5) + 7 * 6


def test_a_slow_link_in_the_middle() -> None:
    stages = [
        StageTimes(forward_s=1, backward_s=2, send_forward_s=3.0 * (i == 1), send_backward_s=3.0 * (i == 2))
        for i in range(4)
    ]
    assert closed_form_s("1f1b", stages, 32) == 200  # 201 exactly
    assert 110 <= closed_form_s("1f1b", stages, 32, warmup=(5, 4, 1, 0)) <= 111


def test_other_schedules_take_no_warmup() -> None:
    with pytest.raises(InputError, match="no warm-up"):
        closed_form_s("gpipe", layers((1, 1)), 4, warmup=(1, 0))
