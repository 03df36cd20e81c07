"""The one-line call, alone and under torchrun, and what it says to bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_models
import torch

import autopar
from autopar.api import PlannedModel
from autopar.plan.plan import Recompute, Variant

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "train.py"


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)  # type: ignore[arg-type]


def planned(cluster: str = "1x4xH100-80GB", model: str = "llama") -> PlannedModel:
    module, batch, _ = getattr(runtime_models, model)()
    return autopar.plan(module, batch, cluster=cluster, global_batch=16, dtype="bf16")


def test_import_is_lazy() -> None:
    code = (
        "import sys, autopar; "
        "print([m for m in ('torch', 'transformers', 'ortools', 'autopar.api') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert set(dir(autopar)) >= {"parallelize", "plan", "simulate", "Plan"}
    with pytest.raises(AttributeError, match="no attribute 'paralelize'"):
        autopar.paralelize  # noqa: B018


def test_a_plan_is_printed_saved_and_simulated(tmp_path: Path) -> None:
    plan = planned()
    assert "LlamaForCausalLM on 1x4xH100-80GB" in str(plan)
    plan.save(tmp_path / "plan.json")
    timeline = autopar.simulate(plan)
    assert timeline.feasible
    loaded = autopar.load_plan(tmp_path / "plan.json")
    assert autopar.simulate(loaded, graph=plan.graph).step_time_s == timeline.step_time_s
    with pytest.raises(autopar.InputError, match="does not hold its model"):
        autopar.simulate(loaded)
    with pytest.raises(autopar.PlanMismatchError, match="was made for cluster"):
        autopar.simulate(plan, cluster="8xH100-80GB")


def test_training_alone() -> None:
    torch.manual_seed(0)
    module, batch, _ = runtime_models.llama()
    expected = module(**batch).loss.item()
    trainer = autopar.parallelize(module, batch, sgd, device="cpu")
    assert trainer.plan.num_devices == 1
    assert trainer.step(batch).item() == pytest.approx(expected, rel=1e-5)
    assert trainer.step(batch).item() < expected
    assert set(dict(trainer.module.named_parameters())) == set(dict(module.named_parameters()))
    assert set(trainer.module.state_dict()) == set(module.state_dict())


def test_training_alone_in_bfloat16_keeps_float32_parameters() -> None:
    torch.manual_seed(0)
    module, batch, _ = runtime_models.gpt2()
    expected = module(**batch).loss.item()
    trainer = autopar.parallelize(module, batch, sgd, dtype="bf16", micro_batch=2, device="cpu")
    try:
        assert (trainer.plan.dtype, trainer.plan.num_micro_batches) == ("bfloat16", 4)
        assert trainer.step(batch).item() == pytest.approx(expected, rel=1e-2)
        assert {param.dtype for param in trainer.module.parameters()} == {torch.float32}
        assert {param.dtype for param in module.parameters()} == {torch.float32}
    finally:
        trainer.close()
    assert not torch.distributed.is_initialized()


def test_batches_of_another_form_are_refused() -> None:
    module, batch, _ = runtime_models.llama()
    trainer = autopar.parallelize(module, {**batch, "return_dict": True}, sgd, device="cpu")
    ids, labels = batch["input_ids"], batch["labels"]
    assert trainer.step(batch).item() > 0  # a setting may be left out
    for bad, message in (
        ({"input_ids": ids[:3], "labels": labels[:3]}, r"'input_ids' has shape \[3, 16\]; the plan takes \[8, 16\]"),
        ({"input_ids": ids[:, :8], "labels": labels}, r"has shape \[8, 8\]; the plan takes \[8, 16\]"),
        ({"input_ids": ids}, "the batch has no 'labels'"),
        ({**batch, "mask": ids}, "the batch has 'mask'"),
        ({**batch, "return_dict": False}, "the batch has False as 'return_dict'; the model was captured with True"),
        ({"input_ids": ids.double(), "labels": labels}, "is float64; the model was captured with int64"),
    ):
        with pytest.raises(autopar.InputError, match=message) as caught:
            trainer.step(bad)
        assert "\n" not in str(caught.value)


def test_plans_that_do_not_fit_are_refused() -> None:
    module, batch, _ = runtime_models.llama()
    other, other_batch, _ = runtime_models.gpt2()
    plan = planned()
    alone = autopar.plan(module, batch, cluster="1xH100-80GB", global_batch=8)
    stage = replace(alone.stages[0], variants=((Variant(recompute=Recompute.SELECTIVE), 3),))
    wrong = replace(alone, stages=(stage,))
    for model, given, chosen, message in (
        (module, batch, plan, "the plan is for 4 devices, and the job has 1 processes"),
        (other, other_batch, alone, "the plan was made for model LlamaForCausalLM"),
        (module, batch, wrong, "the variants of stage 0 are counts of 3 layers, and it has 2"),
        (module, batch, replace(alone, dtype="float16"), "needs loss scaling"),
    ):
        with pytest.raises(autopar.InputError, match=message) as caught:
            autopar.parallelize(model, given, sgd, plan=chosen, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(autopar.InputError, match="unknown dtype 'int4'"):
        autopar.plan(module, batch, cluster="8xH100", global_batch=8, dtype="int4")


def test_axes_can_be_fixed() -> None:
    module, batch, _ = runtime_models.llama()
    found = autopar.plan(module, batch, cluster="1x4xH100-80GB", global_batch=16, mesh={"tp": 2, "pp": 2})
    assert {(stage.mesh.tp, stage.mesh.dp) for stage in found.stages} == {(2, 1)} and found.num_stages == 2
    alone = autopar.parallelize(module, batch, sgd, mesh={"tp": 1}, device="cpu")
    assert alone.plan.num_stages == 1
    alone.close()
    for mesh, message in (({"xp": 2}, "mesh has no axis 'xp'"), ({"tp": 0}, "mesh gives tp the size '0'"),
                          ({"tp": "2"}, "mesh gives tp the size '2'")):
        with pytest.raises(autopar.InputError, match=message):
            autopar.plan(module, batch, cluster="8xH100", global_batch=8, mesh=mesh)  # type: ignore[arg-type]


@pytest.mark.processes
@pytest.mark.slow
def test_the_example_gives_the_same_losses_alone_and_under_torchrun(tmp_path: Path) -> None:
    commands = ([sys.executable, str(EXAMPLE)],
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 str(EXAMPLE)])
    losses = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        losses.append([float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)])
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
