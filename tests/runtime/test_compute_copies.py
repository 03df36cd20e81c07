"""Copies of parameters in the compute dtype: what they compute, what their gradients become, when their memory goes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import runtime_models
import torch
from local_machines import slow_cluster
from torch import Tensor, nn

from autopar.graph.capture import capture
from autopar.plan.plan import Plan, Recompute, Schedule
from autopar.runtime.compute_copies import ComputeCopies, CopyUnit
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.degrees import Degrees, plan_from_degrees

PLANS: dict[str, dict[str, Any]] = {
    "two micro-batches": {"micro_batch": 4},
    "recompute": {"micro_batch": 8, "recompute": Recompute.FULL},
    "offload": {"micro_batch": 4, "offload_activations": True, "offload_optimizer": True},
    "replicas": {"dp_replicate": 2, "micro_batch": 2},
    "tensor axis": {"tp": 2, "micro_batch": 8},
    "zero bubble": {"pp": 2, "micro_batch": 2, "schedule": Schedule.ZERO_BUBBLE},
    "replicas of a pipeline": {"pp": 2, "dp_replicate": 2, "micro_batch": 2},
}


def mixed_plan(model: str, options: dict[str, Any]) -> Plan:
    """A plan that computes in float32 with parameters in float64, so that errors of copies show beside rounding."""
    module, batch, loss_fn = getattr(runtime_models, model)()
    graph = capture(module, batch, loss_fn=loss_fn, tag_rows=True).graph
    num_devices = options.get("pp", 1) * options.get("tp", 1) * options.get("dp_replicate", 1)
    wanted = Degrees(global_batch=8, dtype="float32", param_dtype="float32", **options)
    return replace(plan_from_degrees(graph, slow_cluster(num_devices), wanted), param_dtype="float64")


@pytest.mark.parametrize("name", PLANS)
def test_losses_gradients_and_steps_are_those_of_one_process(pool: LocalPool, name: str) -> None:
    """GPT-2, whose embedding is tied to its head."""
    report = compare(runtime_models.gpt2, mixed_plan("gpt2", PLANS[name]), steps=2, pool=pool)
    assert report.loss_error < 1e-6
    assert report.worst[1] < 2e-5


def test_memory_of_copies_goes_when_the_step_ends() -> None:
    model, batch, _ = runtime_models.gpt2()
    captured = capture(model, batch, tag_rows=True)
    trainer = Trainer(model, mixed_plan("gpt2", {"micro_batch": 4}), captured, lambda p: torch.optim.SGD(p, lr=0.1))
    copies = trainer.stages[0].copies
    assert copies is not None and len(copies.units) == 4  # embeddings, two layers, the last norm
    before = trainer.evaluate(batch)
    assert all(unit.flat.untyped_storage().nbytes() == 0 for unit in copies.units)
    trainer.step(batch)
    assert all(unit.flat.untyped_storage().nbytes() == 0 for unit in copies.units)
    assert {param.dtype for param in trainer.module.parameters()} == {torch.float64}
    assert trainer.evaluate(batch) < before  # the copies follow the parameters


def test_a_unit_goes_as_soon_as_its_last_gradients_are_there() -> None:
    layers = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    told: list[nn.Parameter] = []
    copies = ComputeCopies([list(layer.parameters()) for layer in layers], torch.float32, told.append)
    seen: list[list[bool]] = []

    def run(unit: CopyUnit, x: Tensor) -> Tensor:
        unit.refresh()
        copies.mark(unit, [x])
        x.register_hook(lambda _: seen.append([unit.is_fresh for unit in copies.units]))
        return nn.functional.linear(x, *unit.leaves)

    for step, ends in enumerate((False, True)):
        copies.ends = ends
        x = torch.ones(2, 3, requires_grad=True) * 1.0
        middle = run(copies.units[0], x)
        run(copies.units[1], middle).sum().backward()
        assert [unit.is_fresh for unit in copies.units] == [not ends] * 2
        assert len(told) == 4 * (step + 1)
    assert seen == [[True, True], [True, True], [True, False], [False, False]]  # the second unit's, then the first's
    for layer in layers:
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float64
    assert layers[1].bias.grad is not None
    torch.testing.assert_close(layers[1].bias.grad, torch.full((3,), 4.0, dtype=torch.float64))


def test_a_block_that_starts_the_graph_is_collected_after_the_backward() -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    copies = ComputeCopies([list(layer.parameters())], torch.float32, None)
    copies.units[0].refresh()
    received = torch.ones(2, 3, requires_grad=True)
    copies.mark(copies.units[0], [received])
    nn.functional.linear(received, *copies.units[0].leaves).sum().backward()
    assert layer.weight.grad is None
    copies.collect(is_last=False)
    assert layer.weight.grad is not None and copies.units[0].is_fresh


def test_what_needs_no_gradient_or_is_not_used_gets_none() -> None:
    used, frozen, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=i != 1) for i in range(3))
    copies = ComputeCopies([[used, frozen, unused]], torch.float32, None)
    copies.units[0].refresh()
    (copies.leaf(used) * copies.leaf(frozen)).sum().backward()
    copies.end()
    assert used.grad is not None and frozen.grad is None and unused.grad is None
    assert not copies.units[0].is_fresh


def test_copies_go_with_their_trainer() -> None:
    model, batch, _ = runtime_models.gpt2()
    captured = capture(model, batch, tag_rows=True)
    trainer = Trainer(model, mixed_plan("gpt2", {"micro_batch": 8}), captured, lambda p: torch.optim.SGD(p, lr=0.1))
    trainer.step(batch)
    assert trainer.stages[0].copies is not None
    units = [weakref.ref(unit) for unit in trainer.stages[0].copies.units]
    trainer.close()
    del trainer, model, captured
    gc.collect()
    assert [unit() for unit in units] == [None] * len(units)
