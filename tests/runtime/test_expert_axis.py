"""Experts that lie on data ranks, whatever the other axes are, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runtime_models
import torch
from local_machines import slow_cluster
from test_parity import captured_of

from autopar.graph.capture import capture
from autopar.plan.plan import Plan, Recompute
from autopar.runtime.dry_run import dry_run
from autopar.runtime.engine import Trainer
from autopar.runtime.fake_job import fake_mode
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.simulator import simulate


def plan_of(dtype: str, **degrees: Any) -> Plan:
    captured = captured_of("mixture", dtype)
    size = 1
    for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp"):
        size *= degrees.get(axis, 1)
    return plan_from_degrees(captured.graph, slow_cluster(size), Degrees(
        global_batch=8, micro_batch=1, dtype=dtype, param_dtype=degrees.pop("param_dtype", dtype), **degrees,
    ))


@pytest.mark.processes
@pytest.mark.parametrize("degrees", [
    {"dp_replicate": 4, "ep": 2}, {"dp_shard": 4, "ep": 2, "zero": 3, "recompute": Recompute.FULL},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero": 2, "sequence_parallel": True},
    {"pp": 2, "dp_shard": 2, "ep": 2, "zero": 1},
    {"dp_shard": 2, "cp": 2, "ep": 2, "zero": 3},
], ids=["copies", "fsdp_recomputed", "tensor", "pipeline", "context"])
def test_the_numbers_are_those_of_one_process(pool: LocalPool, degrees: dict[str, Any]) -> None:
    captured = captured_of("mixture", "float64")
    report = compare(runtime_models.mixture, plan_of("float64", **degrees), steps=2, pool=pool, captured=captured)
    assert report.passed, (report.loss_error, report.worst)
    assert len(report.gradient_errors) == len(captured.graph.params)


def train(plan: Plan, load: str | None, save: str | None) -> tuple[list[float], tuple[int, ...]]:
    """Losses and norms of gradients of two steps and the loss in evaluation; the local shape of some experts."""
    torch.manual_seed(0)
    model, batch, _ = runtime_models.mixture()
    captured = captured_of("mixture", plan.dtype)
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.AdamW(params, lr=1e-3))
    if load is not None:
        trainer.load(load)
    found = []
    for _ in range(2):
        loss = trainer.forward_backward(batch)
        found += [loss.item(), trainer.clip_gradients(0.5).item()]
        trainer.optimizer_step()
    if save is not None:
        trainer.save(save)
    found.append(trainer.evaluate(batch).item())
    experts = trainer.named_parameters()["model.layers.0.mlp.experts.gate_up_proj"]
    local = experts.to_local() if isinstance(experts, torch.distributed.tensor.DTensor) else experts
    trainer.close()
    return found, tuple(local.shape)


@pytest.mark.processes
def test_clipping_evaluation_and_checkpoints(pool: LocalPool, tmp_path: Path) -> None:
    alone, apart = plan_of("float32"), plan_of("float32", dp_shard=2, ep=2, zero=3)
    copies = plan_of("float32", dp_replicate=2, ep=2)
    whole, shape = pool.run(train, alone, None, str(tmp_path / "alone"), num_ranks=1)[0]
    assert shape == (8, 32, 48)
    found, shape = pool.run(train, apart, None, str(tmp_path / "apart"), num_ranks=2)[1]
    assert shape == (4, 32, 48)  # half of the experts
    assert found == pytest.approx(whole, rel=1e-5)
    went_on, _ = pool.run(train, alone, str(tmp_path / "apart"), None, num_ranks=1)[0]
    found, shape = pool.run(train, copies, str(tmp_path / "alone"), None, num_ranks=2)[1]
    assert shape == (4, 32, 48)
    assert found == pytest.approx(went_on, rel=1e-5)


def test_a_dry_run_of_it() -> None:
    with fake_mode():
        model, batch, _ = runtime_models.mixture()
    captured = capture(model, batch, tag_rows=True)
    cluster = slow_cluster(4)
    plan = plan_from_degrees(captured.graph, cluster, Degrees(
        global_batch=8, micro_batch=2, dp_shard=4, ep=2, zero=3, dtype="float32", param_dtype="float32",
    ))
    ran = dry_run(model, captured, plan, simulate(captured.graph, cluster, plan))
    assert ran.problems == ()
    (states,) = [row for row in ran.memory if row.kind == "optimizer"]
    assert states.program_bytes == pytest.approx(states.predicted_bytes, rel=0.1)
