"""Models of other kinds than the language models, under plans with something odd in them, against one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import runtime_models
import torch

import autopar
from autopar.cluster.local import local_cluster
from autopar.graph.capture import capture
from autopar.plan.plan import Recompute
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, coarsest_dtype, compare
from autopar.search.degrees import Degrees, plan_from_degrees

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("degrees", [
    dict(pp=2, micro_batch=2, recompute=Recompute.FULL), dict(dp_shard=2, tp=2, zero=3, micro_batch=2),
], ids=["pp2", "fsdp2xtp2"])
def test_bert_whose_key_bias_has_no_gradient(pool: LocalPool, degrees: dict[str, Any]) -> None:
    size = degrees.get("pp", 1) * degrees.get("dp_shard", 1) * degrees.get("tp", 1)
    graph = capture_for(runtime_models.bert, "float64").graph
    wanted = Degrees(global_batch=8, dtype="float64", param_dtype="float64", optimizer="sgd", **degrees)
    plan = plan_from_degrees(graph, local_cluster(size, device="cpu"), wanted)
    report = compare(runtime_models.bert, plan, steps=2, pool=pool)
    assert report.passed, (report.loss_error, report.worst)


def test_a_stage_without_parameters_trains(pool: LocalPool) -> None:
    graph = capture_for(runtime_models.perceptron, "float64").graph
    wanted = Degrees(global_batch=8, dtype="float64", param_dtype="float64", optimizer="sgd", pp=3, micro_batch=2)
    plan = plan_from_degrees(graph, local_cluster(3, device="cpu"), wanted)
    bare = [i for i, block in enumerate(graph.blocks) if not block.params]
    cuts = [0, bare[0], bare[0] + 1, len(graph.blocks)]
    stages = tuple(
        replace(stage, first=first, last=last) for stage, (first, last) in zip(plan.stages, pairwise(cuts), strict=True)
    )
    report = compare(runtime_models.perceptron, replace(plan, stages=stages), steps=2, pool=pool)
    assert report.passed, (report.loss_error, report.worst)


@pytest.mark.parametrize("degrees", [dict(pp=2), dict(dp_shard=2, tp=2, zero=3)], ids=["pp2", "fsdp2xtp2"])
def test_a_model_that_casts_by_its_own_autocast(pool: LocalPool, degrees: dict[str, Any]) -> None:
    """The batch is a tuple. What one process rounds in bfloat16 the ranks round the same, or in sums of two halves."""
    graph = capture_for(runtime_models.under_autocast, "float32").graph
    size = degrees.get("pp", 1) * degrees.get("dp_shard", 1) * degrees.get("tp", 1)
    wanted = Degrees(global_batch=8, dtype="float32", param_dtype="float32", optimizer="sgd", micro_batch=2, **degrees)
    plan = plan_from_degrees(graph, local_cluster(size, device="cpu"), wanted)
    report = compare(runtime_models.under_autocast, plan, steps=2, pool=pool)
    assert report.passed and report.tolerance == 1e-1, (report.loss_error, report.worst)
    assert report.loss_error < 1e-3 and any("16 bits" in note for note in report.notes)
    if "pp" in degrees:
        assert report.worst[1] < 1e-2, report.worst


def test_autocast_around_a_step_must_be_around_the_capture_too() -> None:
    """Else a stage would send what its autocast rounds to one that takes what was captured."""
    model, (ids, labels), _ = runtime_models.under_autocast()
    plain = {"ids": ids, "labels": labels}

    def half() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    trainer = autopar.parallelize(model, plain, lambda params: torch.optim.SGD(params, lr=0.1), device="cpu")
    with half():
        for call in (trainer.step, trainer.forward_backward, trainer.evaluate):
            with pytest.raises(autopar.InputError, match="call parallelize inside of it too"):
                call(plain)
    without = trainer.step(plain)
    trainer.close()
    model, _, _ = runtime_models.under_autocast()
    with half():
        expected = model(**plain)
        trainer = autopar.parallelize(model, plain, lambda params: torch.optim.SGD(params, lr=0.1), device="cpu")
        assert trainer.evaluate(plain).item() == expected.item()
        assert trainer.forward_backward(plain).item() == expected.item() != without.item()
    assert trainer.forward_backward(plain).item() == expected.item()
    trainer.close()


def test_16_bits_without_gradient_loosen_nothing() -> None:
    class Biased(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = torch.arange(x.shape[-1]).bfloat16() * 0.5
            return super().forward(x + bias).square().mean()

    x = torch.randn(4, 8)
    assert coarsest_dtype(capture(Biased(8, 8), (x,)).graph, "float32") == "float32"
    assert coarsest_dtype(capture_for(runtime_models.under_autocast, "float32").graph, "float32") == "bfloat16"
