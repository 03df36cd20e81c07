import random
from itertools import combinations

import numpy as np
import pytest

from autopar.plan.plan import Schedule
from autopar.search.balance import windows_of
from autopar.search.loops import PipelineBound
from autopar.simulate.closed_form import closed_form_s
from autopar.simulate.events import StageTimes


def pipeline(rng: random.Random, num_blocks: int, p: int, m: int) -> PipelineBound:
    """Stages whose blocks take the longer the more micro-batches they hold, some ranges not fitting."""
    size = num_blocks + 1
    works, laters, owns = [], [], []
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
    once = np.arange(size) * 0.5
    chain_s = sum(float(np.min(np.diag(work, 1))) for work in works)
    return PipelineBound(
        works=windows_of(works), laters=windows_of(laters), owns=windows_of(owns), once=once, once_alone=once,
        chain_s=chain_s, num_micro_batches=m,
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
        works=windows_of([work] * p), laters=windows_of(later), owns=windows_of([each + work for each in later]),
        once=np.zeros(5), once_alone=np.zeros(5), chain_s=12.0, num_micro_batches=m,
    )
    assert made.least().bound_s == pytest.approx(closed_form_s(Schedule.ONE_F_ONE_B, stages, m)) == 21.0
