"""The optimizer's step from measurements: whole copies step as plain tensors do, shards as distributed tensors."""

from __future__ import annotations

from dataclasses import replace

import hand_made as hand
import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.measured import MeasuredOps, OpSample, OpTensor
from autopar.plan.plan import Mesh
from autopar.simulate.stage_cost import stage_cost

MODEL = hand.graph(4)


def samples(target: str, per_element_s: float) -> tuple[OpSample, ...]:
    return tuple(
        OpSample(
            target=target, settings="", dtype="float32", operands=(OpTensor(shape=(numel,), dtype="float32"),),
            outputs=(), forward_s=per_element_s * numel, backward_s=0.0,
        ) for numel in (4**power for power in range(4, 14))
    )


@pytest.mark.parametrize(("zero", "mesh", "expected_s"), [
    (0, Mesh(), 1e-9 * MODEL.num_params),
    (0, Mesh(dp_replicate=2), 1e-9 * MODEL.num_params),
    (1, Mesh(dp_shard=2), 1e-8 * MODEL.num_params / 2),
    (3, Mesh(dp_shard=4), 1e-8 * MODEL.num_params / 4),
])
def test_whole_copies_step_as_plain_tensors(zero: int, mesh: Mesh, expected_s: float) -> None:
    (node,) = hand.cluster().nodes
    measured = MeasuredOps(samples=samples("autopar.adamw", 1e-9) + samples("autopar.adamw_sharded", 1e-8))
    cluster = Cluster(name="measured", nodes=(replace(node, device=replace(node.device, measured=measured)),))
    cost = stage_cost(MODEL, cluster, hand.plan(MODEL, mesh=mesh, zero=zero), 0)
    assert cost.optimizer_s == pytest.approx(expected_s, rel=1e-3)
