"""Plans whose experts lie on several ranks, tokens exchanged, against one process."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import runtime_models
from local_machines import slow_cluster
from test_parity import captured_of
from test_several_axes import graph_of, random_shardings

from autopar.plan.plan import Mesh, Plan, Recompute
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.shardings import at_rows
from autopar.sharding.lowering import Lowering
from autopar.sharding.state import shard
from autopar.sharding.strategy import ClassSharding

pytestmark = pytest.mark.processes


def exchanged(plan: Plan) -> bool:
    return any(s.lowering == Lowering.EXPERT_EXCHANGE for choice in plan.shardings for _, s in choice.ops)


@pytest.mark.parametrize(("tp", "dp_shard", "recompute"), [
    (2, 1, Recompute.NONE), (4, 1, Recompute.NONE), (2, 2, Recompute.FULL),
], ids=["tp2", "tp4", "fsdp2xtp2_recomputed"])
def test_exchanged_tokens_give_the_numbers_of_one_process(
    pool: LocalPool, tp: int, dp_shard: int, recompute: Recompute
) -> None:
    graph = graph_of("mixture", "float64")
    wanted = Degrees(
        global_batch=8, micro_batch=2, tp=tp, dp_shard=dp_shard, zero=3 if dp_shard > 1 else 0, dtype="float64",
        param_dtype="float64", optimizer="sgd", sequence_parallel=True,
    )
    plan = plan_from_degrees(graph, slow_cluster(tp * dp_shard), wanted)
    assert exchanged(plan)
    plan = replace(plan, stages=tuple(replace(stage, recompute=recompute) for stage in plan.stages))
    report = compare(
        runtime_models.mixture, plan, steps=2, pool=pool, captured=captured_of("mixture", "float64")
    )
    assert report.passed, (report.loss_error, report.worst)
    assert len(report.gradient_errors) == len(graph.params)


def test_tokens_that_two_axes_split_are_exchanged_over_one(pool: LocalPool) -> None:
    graph = graph_of("mixture", "float64")
    plan = plan_from_degrees(graph, slow_cluster(4), Degrees(
        global_batch=8, micro_batch=2, dp_replicate=4, dtype="float64", param_dtype="float64", optimizer="sgd",
    ))
    names = dict.fromkeys(block.cls for block in graph.blocks)

    def drawn(seed: int) -> list[ClassSharding]:
        chance, boundary = random.Random(seed), (shard(1),) * 2
        return [own for name in names for own in random_shardings(graph.block_class[name], boundary, chance)]

    def exchanges(shardings: list[ClassSharding]) -> bool:
        chosen = {own.axis: own.strategy["experts"].factor for own in shardings if "experts" in own.strategy}
        return chosen["cp"].startswith("t") and chosen["tp"].startswith("t+e")

    shardings = next(found for seed in range(100) if exchanges(found := drawn(seed)))
    plan = replace(
        plan, shardings=at_rows(tuple(shardings), graph, plan.micro_batch), num_micro_batches=4,
        stages=(replace(plan.stages[0], mesh=Mesh(cp=2, tp=2)),),
    )
    report = compare(
        runtime_models.mixture, plan, steps=2, pool=pool, captured=captured_of("mixture", "float64")
    )
    assert report.passed, (report.loss_error, report.worst)
