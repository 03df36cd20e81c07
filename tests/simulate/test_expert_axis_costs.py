"""What an expert axis costs and saves, against counts by hand."""

from __future__ import annotations

import pytest
from mixtures import LENGTH, mixture

from autopar.cluster.cluster import Cluster
from autopar.cluster.parse import parse_cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.graph.expert_params import expert_params
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.reshard import Collective
from autopar.simulate.stage_cost import StageCost, stage_cost

CLUSTER = parse_cluster("1x8xH100-80GB")


def cost(cluster: Cluster = CLUSTER, **degrees: int) -> StageCost:
    plan = plan_from_degrees(mixture(), cluster, Degrees(global_batch=8, **degrees))
    return stage_cost(mixture(), cluster, plan, 0)


def numels() -> tuple[int, int]:
    """Elements of experts, and of all other parameters."""
    graph = mixture()
    experts = sum(
        graph.param[name].numel for block in graph.blocks
        for own, name in zip(graph.block_class[block.cls].params, block.params, strict=True)
        if own in expert_params(graph.block_class[block.cls])
    )
    return experts, sum(info.numel for info in graph.params) - experts


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_states(zero: int) -> None:
    """In bytes an element: 4 of parameters, 8 of AdamW's state, 4 of gradients; 2 of a copy to compute with."""
    experts, others = numels()
    axis = {"dp_shard": 8} if zero else {"dp_replicate": 8}
    static = cost(zero=zero, ep=4, **axis).static
    rank, group = (8, 2) if zero else (1, 1)  # ranks that share out others, and the same experts
    shared = others / rank + experts / 4 / group
    assert static.optimizer == pytest.approx(8 * shared)
    assert static.gradients == pytest.approx(4 * (shared if zero >= 2 else others + experts / 4))
    if zero < 3:
        assert static.parameters == pytest.approx(4 * shared + 2 * (others + experts / 4))


def test_tokens_are_sent_there_and_back_each_way() -> None:
    """Of 2 layers, each token twice to its experts, in bfloat16; the counts that go first are small."""
    alone, apart = cost(dp_shard=8, zero=1), cost(dp_shard=8, zero=1, ep=8)
    assert alone.forward_tp_s == alone.backward_tp_s == 0
    tokens = LENGTH  # of each rank's row
    group = CLUSTER.group(tuple(range(8)))
    once = collective_time_s(Collective.ALL_TO_ALL, 8 * tokens * 2 * 32 * 2, group)
    counts = collective_time_s(Collective.ALL_TO_ALL, 8 * 8 * 8, group)
    assert apart.backward_tp_s == pytest.approx(2 * 2 * once)
    assert apart.forward_tp_s == pytest.approx(2 * (2 * once + counts))


def test_gradients_of_experts_are_reduced_among_those_that_have_them() -> None:
    """Where each rank has its own, nothing of them is sent; others go as before."""
    experts, _ = numels()
    alone, apart = cost(dp_replicate=8), cost(dp_replicate=8, ep=8)
    assert apart.step_end_s < alone.step_end_s
    assert apart.param_numel == pytest.approx(alone.param_numel - experts * 7 / 8)
