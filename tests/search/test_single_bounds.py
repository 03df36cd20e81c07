"""Steps of one micro-batch in the search: the least time in memory is that of trying every variant."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from toy_graphs import cluster, mlp_chain

from autopar.plan.plan import Plan, Recompute, Variant
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, PlanRequest, candidates
from autopar.sharding.rewrites import rewritten
from autopar.simulate.simulator import simulate
from autopar.simulate.stage_cost import stage_cost

GRAPH = mlp_chain(num_layers=4, hidden=256, inner=1024, seq_len=128, vocab=512)
REQUEST = PlanRequest(global_batch=16, dtype="bfloat16")
EVERY = (Variant(), Variant(recompute=Recompute.FULL))


def engine_of(memory_bytes: float, devices: int) -> Engine:
    return Engine(GRAPH, cluster(1, devices, memory_gib=memory_bytes / 2**30), REQUEST)


def of_one_micro_batch(engine: Engine, pp: int) -> list[Candidate]:
    space = candidates(engine.cluster, REQUEST, engine.chooser, len(GRAPH.blocks))
    found = [c for c in space if c.num_micro_batches == 1 and c.pp == pp and c.tp == 1 and not c.offload_optimizer]
    by_zero = {(c.zero, c.dp_shard): c for c in found}
    return list(by_zero.values())


def peaks(plan: Plan, engine: Engine) -> tuple[float, float]:
    """The most that a rank holds, and what it were if all were there at once."""
    costs = [stage_cost(rewritten(GRAPH, plan.rewrites), engine.cluster, plan, i) for i in range(plan.num_stages)]
    return max(cost.peak_bytes(1) for cost in costs), max(
        cost.static.total + max(cost.held_bytes + cost.extra_bytes, cost.step_end_bytes) for cost in costs
    )


@pytest.mark.parametrize(("devices", "pp", "cuts"), [(1, 1, (0, 6)), (2, 1, (0, 6)), (2, 2, (0, 3, 6))])
def test_the_search_finds_what_trying_all_variants_finds(devices: int, pp: int, cuts: tuple[int, ...]) -> None:
    roomy = engine_of(2**34, devices)
    between = 0
    for c in of_one_micro_batch(roomy, pp):
        plain = roomy.plan_of(c, cuts)
        every = []
        for words in product(EVERY, repeat=4):
            layers = iter(words)
            stages = tuple(
                stage.with_variants([next(layers) for _ in range(plain.num_layers(stage))]) for stage in plain.stages
            )
            plan = replace(plain, stages=stages)
            timeline = simulate(GRAPH, roomy.cluster, plan, detail=False)
            every.append((timeline.step_time_s, timeline.peak_memory_bytes))
        kept, at_once = peaks(plain, roomy)
        assert kept == pytest.approx(every[0][1])
        least = min(peak for _, peak in every)
        usable = roomy.layout.kinds(c)[0].memory_limit_bytes / 2**34
        for limit in [*np.linspace(0.97 * least, 1.02 * kept, 4), (kept + at_once) / 2]:
            engine = engine_of(limit / usable, devices)
            best = min((time for time, peak in every if peak <= limit), default=None)
            found = engine.simulate(c, cuts)
            assert (found.step_time_s if found else None) == (pytest.approx(best) if best else None), (c, limit)
            bound = engine.bounds.of_cut(c, cuts)
            assert bound <= (best or np.inf) * (1 + 1e-9)
            assert np.isfinite(bound) == (best is not None)
            if kept < limit < at_once:
                between += 1
                assert found is not None
    assert between > 0
