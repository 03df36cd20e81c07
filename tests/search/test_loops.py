import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.plan.plan import Schedule
from autopar.search.balance import windows_of
from autopar.search.loops import PipelineBound, cut_time_s
from autopar.simulate.closed_form import closed_form_s, figures
from autopar.simulate.events import StageTimes, execute
from autopar.simulate.schedules import schedule_actions


def pipeline(rng: random.Random, num_blocks: int, p: int, m: int) -> PipelineBound:
    """Stages whose blocks take the longer the more micro-batches they hold, some ranges not fitting."""
    size = num_blocks + 1
    once = np.arange(size) * 0.5
    works, laters, owns, ends = [], [], [], []
    for stage in range(p):
        k = min(p - stage, m)
        work, later = np.full((size, size), np.inf), np.full((size, size), np.inf)
        for first in range(size):
            for last in range(first + 1, size):
                if (last - first) * k > 3 * num_blocks:
                    continue
                forward = (last - first) * (1 + 0.1 * k) + 0.3 * rng.random()
                work[first, last] = 3 * forward
                later[first, last] = (m - 1) * 2 * forward + (m - k) * forward
        works.append(work)
        laters.append(later)
        owns.append(later + work)
        ends.append(work + (once if stage == 0 else 0.4 * (np.arange(size) - np.arange(size)[:, None])))
    chain_s = sum(float(np.min(np.diag(work, 1))) for work in works)
    return PipelineBound(
        works=windows_of(works), with_ends=windows_of(ends), laters=windows_of(laters), owns=windows_of(owns),
        sends=0.2 * np.arange(p)[::-1], once=once, once_alone=once, chain_s=chain_s, num_micro_batches=m,
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_cut_is_below_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, p, m = rng.randint(5, 8), rng.randint(2, 5), rng.choice([1, 2, 4, 5, 9])
    made = pipeline(rng, num_blocks, p, m)
    every = [(0, *inner, num_blocks) for inner in combinations(range(1, num_blocks), p - 1)]
    best = min(made.time_s(cuts) for cuts in every)
    found = made.least()
    assert found.bound_s <= best * (1 + 1e-9)
    assert found.cuts is None or made.time_s(found.cuts) >= best * (1 - 1e-9)
    assert found.bound_s >= 0.85 * best or best == np.inf, "the bound is of use"
    for limit_s in (0.9 * best, 1.1 * best):
        if np.isfinite(best):
            assert min(made.least(limit_s).bound_s, limit_s) <= best * (1 + 1e-9)


def test_the_loop_behind_the_first_stage_is_seen() -> None:
    # As many micro-batches as stages: every backward of the first waits for all behind it, twice.
    p = m = 4
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * p
    later = [np.where(np.triu(np.ones((5, 5)), 1) > 0, (m - 1) * 2.0 + (m - min(p - s, m)) * 1.0, np.inf)
             for s in range(p)]
    work = np.where(np.triu(np.ones((5, 5)), 1) > 0, 3.0, np.inf)
    made = PipelineBound(
        works=windows_of([work] * p), with_ends=windows_of([work] * p), laters=windows_of(later),
        owns=windows_of([each + work for each in later]),
        sends=np.zeros(p), once=np.zeros(5), once_alone=np.zeros(5), chain_s=12.0, num_micro_batches=m,
    )
    assert made.least().bound_s == pytest.approx(closed_form_s(Schedule.ONE_F_ONE_B, stages, m)) == 21.0


@given(st.data())
def test_no_cut_is_above_its_execution(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 12))
    some = st.floats(0.0, 4.0, allow_subnormal=False)
    stages = [
        StageTimes(
            forward_s=data.draw(some), backward_s=data.draw(some), gather_s=data.draw(some), reduce_s=data.draw(some),
            send_forward_s=data.draw(some), send_backward_s=data.draw(some),
        ) for _ in range(p)
    ]
    forward, backward, there, back = figures(stages)
    ends = np.array([stage.gather_s + stage.reduce_s for stage in stages])
    later = (m - 1) * backward + np.maximum(m - np.arange(p, 0, -1), 0) * forward
    links = np.append(there[:-1] + back[1:], 0.0)[::-1]
    found = cut_time_s(
        forward + backward, forward + backward + ends, later, m * (forward + backward) + ends,
        np.cumsum(links)[::-1], float(ends[0]), m,
    )
    exact = execute(schedule_actions("1f1b", p, m), stages).end_s
    assert found <= exact * (1 + 1e-12)
