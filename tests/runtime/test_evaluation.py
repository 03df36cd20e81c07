"""An evaluation step has the loss of one process's model in evaluation, and leaves training as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import runtime_models
import torch
from local_machines import slow_cluster
from torch import nn

from autopar.graph.capture import Captured
from autopar.graph.model_graph import BlockClass, Op, Ref, TensorInfo
from autopar.plan.plan import Plan, Schedule
from autopar.runtime.engine import Trainer
from autopar.runtime.evaluation import evaluated
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, make_batch, make_model, precision
from autopar.search.degrees import Degrees, plan_from_degrees

ROWS = 8


class Normed(nn.Module):
    """Convolutions with batch norms, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 5),
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(x), y)


def normed() -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(3)
    batch = {"x": torch.randn(ROWS, 3, 4, 4, generator=generator), "y": torch.arange(ROWS) % 5}
    return Normed(), batch, None


FACTORIES = {"gpt2_dropout": runtime_models.gpt2_eager_dropout, "sdpa_dropout": runtime_models.gpt2_dropout,
             "normed": normed}


@cache
def captured(model: str) -> Captured:
    return capture_for(FACTORIES[model], "float64")


def plan_of(model: str, **degrees: Any) -> Plan:
    size = 1
    for axis in ("tp", "pp", "dp_replicate", "dp_shard", "cp"):
        size *= degrees.get(axis, 1)
    wanted = Degrees(global_batch=ROWS, dtype="float64", param_dtype="float64", optimizer="sgd", **degrees)
    return plan_from_degrees(captured(model).graph, slow_cluster(size), wanted)


def losses(model: str, plan: Plan, saw: Captured) -> tuple[list[float], list[float], list[float]]:
    """Losses of evaluations before, between and after two steps; losses of steps with and without them."""
    found: list[list[float]] = []
    evaluations: list[float] = []
    for evaluates in (True, False):
        module, example, _ = make_model(FACTORIES[model], "float64", 0)
        trainer = Trainer(module, plan, saw, lambda params: torch.optim.SGD(params, lr=0.1))
        steps = []
        for step in range(3):
            if evaluates:
                evaluations.append(trainer.evaluate(make_batch(example, ROWS, step)).item())
            if step < 2:
                steps.append(trainer.step(make_batch(example, ROWS, step)).item())
        found.append(steps)
        trainer.close()
    return evaluations, found[0], found[1]


def expected_first(model: str) -> float:
    """The loss of one process's model in evaluation, before any step."""
    module, example, _ = make_model(FACTORIES[model], "float64", 0)
    module.eval()
    with precision("float64"), torch.no_grad():
        output = module(**make_batch(example, ROWS, 0))
    return float(getattr(output, "loss", output))


@pytest.mark.processes
@pytest.mark.parametrize(("model", "degrees"), [
    ("gpt2_dropout", dict(tp=2, micro_batch=4, sequence_parallel=True)),
    ("gpt2_dropout", dict(pp=2, micro_batch=2, schedule=Schedule.ZERO_BUBBLE)),
    ("gpt2_dropout", dict(dp_shard=2, zero=3, micro_batch=2)),
    ("sdpa_dropout", dict(pp=2, dp_replicate=2, micro_batch=1)),
    ("normed", dict(tp=2, micro_batch=8)),
], ids=lambda value: value if isinstance(value, str) else "x".join(value))
def test_evaluation_on_processes(pool: LocalPool, model: str, degrees: dict[str, Any]) -> None:
    plan = plan_of(model, **degrees)
    results = pool.run(losses, model, plan, captured(model), num_ranks=plan.num_devices)
    evaluations, steps, without = results[0]
    assert evaluations[0] == pytest.approx(expected_first(model), rel=1e-9)
    assert len(set(evaluations)) == 3, "the weights change between them"
    assert steps == without, "evaluations change neither weights nor random numbers"
    assert all(result == results[0] for result in results), "every rank has the same"


def test_one_process_runs_its_norms_with_running_statistics() -> None:
    module, example, _ = make_model(normed, "float64", 0)
    plan = plan_of("normed", micro_batch=8)
    trainer = Trainer(module, plan, captured("normed"), lambda params: torch.optim.SGD(params, lr=0.1))
    for step in range(2):
        trainer.step(make_batch(example, ROWS, step))
    state = trainer.full_state_dict()
    plain = normed()[0].double().eval()
    plain.load_state_dict(state)
    assert state["layers.1.running_mean"].abs().max() > 0
    found = trainer.evaluate(example).item()
    assert found == pytest.approx(plain(**example).item(), rel=1e-12)
    assert all(torch.equal(value, state[name]) for name, value in trainer.full_state_dict().items())
    assert found == trainer.evaluate(example).item()


def test_what_trains_alone_is_switched_off() -> None:
    x = TensorInfo(name="x", shape=(2, 3), dtype="float32", requires_grad=True)
    drop = Op(name="d", target="aten.dropout.default", args=(Ref("x"), 0.5, True), outputs=("y",))
    named = replace(drop, args=(Ref("x"), 0.5), kwargs=(("train", True),))
    cls = BlockClass(name="c", inputs=("x",), params=(), buffers=(), outputs=("y",), ops=(drop, named),
                     tensors=(x, replace(x, name="y")))
    assert evaluated(cls).ops[0].args == (Ref("x"), 0.5, False)
    assert evaluated(cls).ops[1].kwargs == (("train", False),)
    assert evaluated(evaluated(cls)) == evaluated(cls)
    plain = replace(cls, ops=(replace(drop, target="aten.relu.default", args=(Ref("x"),)),))
    assert evaluated(plain) is plain
