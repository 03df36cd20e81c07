"""Optimizers and learning-rate schedulers step under any plan as one process steps the whole; others are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import runtime_models
import torch
from test_parity import captured_of, plan_of
from torch import Tensor

from autopar.errors import InputError
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, make_model, precision

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, foreach=True)),
    "adamw_foreach": ("AdamW", dict(lr=1e-2, eps=1e-4, foreach=True, amsgrad=True)),
    "adamw_fused": ("AdamW", dict(lr=1e-2, eps=1e-4, fused=True)),
    "adagrad": ("Adagrad", dict(lr=1e-2, eps=1e-4)),
    "adafactor": ("Adafactor", dict(lr=1e-2, eps=(1e-4, 1e-3))),
    "muon": ("Muon", dict(lr=1e-2)),
    "rprop": ("Rprop", dict(lr=1e-3)),
}
STEPS = 4


def make(name: str, params: Any) -> tuple[torch.optim.Optimizer, Any]:
    kind, settings = OPTIMIZERS[name]
    if kind == "Muon":  # steps matrices alone
        params = [param for param in params if param.dim() == 2]
    optimizer = getattr(torch.optim, kind)(params, **settings)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def trained(plan: Plan) -> dict[str, tuple[list[float], list[float], dict[str, Tensor]]]:
    """For each optimizer: losses, learning rates, and the parameters at the end (on rank 0)."""
    found = {}
    captured = captured_of("llama", "float64")
    for name in OPTIMIZERS:
        model, example, _ = make_model(runtime_models.llama, "float64", 0)
        trainer = Trainer(model, plan, captured, lambda params, name=name: make(name, params)[0])  # type: ignore[misc]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, T_max=STEPS)
        losses, rates = [], []
        for step in range(STEPS):
            losses.append(trainer.step(make_batch(example, 8, step)).item())
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        found[name] = (losses, rates, trainer.full_state_dict())
        trainer.close()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("name", ["fsdp2xtp2", "pp2xfsdp2_zero1", "dp2"])
def test_optimizers_and_a_scheduler_step_as_one_process(pool: LocalPool, name: str) -> None:
    plan = plan_of("llama", name, "float64")
    results = pool.run(trained, plan, num_ranks=plan.num_devices)[0]
    for kind, (losses, rates, state) in results.items():
        model, example, _ = make_model(runtime_models.llama, "float64", 0)
        optimizer, scheduler = make(kind, model.parameters())
        for step in range(STEPS):
            with precision("float64"):
                loss = model(**make_batch(example, 8, step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            assert losses[step] == pytest.approx(loss.item(), rel=1e-9), kind
            assert rates[step] == scheduler.get_last_lr()[0]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-11, msg=f"{kind}: {key}")


def refused(plan: Plan, kind: str) -> str:
    model, _, _ = make_model(runtime_models.llama, "float64", 0)
    captured = captured_of("llama", "float64")
    try:
        Trainer(model, plan, captured, getattr(torch.optim, kind))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.processes
def test_what_no_shard_can_step_is_refused(pool: LocalPool) -> None:
    for message in pool.run(refused, plan_of("llama", "fsdp2_zero2", "float64"), "SparseAdam", num_ranks=2):
        assert "SparseAdam" in message and "stage 0 shards its states (zero 2)" in message and "\n" not in message
    assert "use AdamW" in pool.run(refused, plan_of("llama", "dp2", "float64"), "LBFGS", num_ranks=2)[0]


def adafactor_goes_on(plan: Plan, source: str | None, target: str) -> list[float]:
    """Train and save, or load; the losses that follow."""
    model, example, _ = make_model(runtime_models.llama, "float64", 0 if source is None else 5)
    trainer = Trainer(
        model, plan, captured_of("llama", "float64"), lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-4, 1e-3))
    )
    if source is not None:
        trainer.load(source)
    else:
        for step in range(2):
            trainer.step(make_batch(example, 8, step))
        trainer.save(target)
    losses = [trainer.step(make_batch(example, 8, step)).item() for step in (2, 3)]
    trainer.close()
    return losses


@pytest.mark.processes
def test_state_of_whole_parameters_loads_under_another_plan(pool: LocalPool, tmp_path: Path) -> None:
    place = str(tmp_path / "state")
    losses = pool.run(adafactor_goes_on, plan_of("llama", "fsdp2xtp2", "float64"), None, place, num_ranks=4)[0]
    again = pool.run(adafactor_goes_on, plan_of("llama", "dp2", "float64"), place, "", num_ranks=2)[0]
    assert again == pytest.approx(losses, rel=1e-9)


class Unknown(torch.optim.SGD):
    """An optimizer of a user's own."""


def warned(plan: Plan) -> list[str]:
    model, _, _ = make_model(runtime_models.llama, "float64", 0)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("autopar.runtime.optimizers")
    logger.addHandler(handler)
    Trainer(model, plan, captured_of("llama", "float64"), lambda params: Unknown(params, lr=0.1))
    logger.removeHandler(handler)
    return seen


@pytest.mark.processes
def test_an_unknown_optimizer_is_named_in_the_log(pool: LocalPool) -> None:
    (message,) = pool.run(warned, plan_of("llama", "tp2", "float64"), num_ranks=2)[0]
    assert message.startswith("Unknown is not known to step each element by itself")
