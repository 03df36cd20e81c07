import random

import hand_made as hand
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.plan.plan import Mesh
from autopar.simulate.events import StageTimes, execute, peak_activation_bytes
from autopar.simulate.one_f_one_b import run_one_f_one_b
from autopar.simulate.schedules import one_f_one_b
from autopar.simulate.simulator import simulate


@given(st.integers(1, 9), st.integers(1, 20), st.booleans(), st.integers(0, 10**6))
def test_it_is_what_the_action_lists_take(num_stages: int, num_micro_batches: int, links: bool, seed: int) -> None:
    rng = random.Random(seed)

    def some(most: float) -> float:
        return rng.choice([0.0, rng.random() * most])

    stages = [
        StageTimes(
            forward_s=rng.random(), backward_s=3 * rng.random(), send_forward_s=some(2.0) if links else 0.0,
            send_backward_s=some(2.0) if links else 0.0, gather_s=some(9.0), reduce_s=some(9.0),
        ) for _ in range(num_stages)
    ]
    lists = one_f_one_b(num_stages, num_micro_batches)
    exact, quick = execute(lists, stages), run_one_f_one_b(stages, num_micro_batches)
    assert quick.rank_end_s == exact.rank_end_s, "to the last bit: what a search compares must not depend on the way"
    assert quick.start_s == tuple(starts[0] for starts in exact.starts)
    held, extra = [rng.random() for _ in stages], [some(3.0) for _ in stages]
    peaks = [quick.peak_bytes(rank, held[rank], extra[rank]) for rank in range(num_stages)]
    assert peaks == list(peak_activation_bytes(lists, held, extra))


@pytest.mark.parametrize(("zero", "micro_batches"), [(0, 8), (2, 2), (3, 5), (0, 1)])
def test_figures_without_detail_are_those_with_it(zero: int, micro_batches: int) -> None:
    model, machine = hand.graph(4), hand.cluster(2, per_node=6)
    plan = hand.plan(
        model, cuts=(0, 1, 4, 6), mesh=Mesh(dp_shard=4) if zero else Mesh(dp_replicate=4), zero=zero,
        num_micro_batches=micro_batches,
    )
    with_, without = (simulate(model, machine, plan, detail=detail) for detail in (True, False))
    assert without.step_time_s == with_.step_time_s
    assert without.rank_peak_bytes == with_.rank_peak_bytes
    assert [(own.start_s, own.end_s) for own in without.groups] == [(own.start_s, own.end_s) for own in with_.groups]
    assert without.feasible == with_.feasible
    for part in ("compute", "tp_comm", "dp_comm", "optimizer"):
        assert getattr(without.breakdown, part) == getattr(with_.breakdown, part)
    assert without.breakdown.bubble == pytest.approx(with_.breakdown.bubble + with_.breakdown.pp_comm, abs=1e-12)
