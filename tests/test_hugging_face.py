"""transformers.Trainer under a plan logs what it logs without one; what a planned step cannot honour is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24 * 8).reshape(24, 8) % 31]


def trainer(folder: Path, *, kind: type | None = None, seed: int = 0, **settings: Any) -> Any:
    """A Trainer of a Llama of two layers; the first of 24 rows have labels that do not count."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16, intermediate_size=32,
        vocab_size=32, max_position_embeddings=8, bos_token_id=0, eos_token_id=0,
    )
    rows = [dict(row) for row in ROWS]
    for count, row in enumerate(rows[:6]):
        row["labels"] = torch.where(torch.arange(8) < count, -100, row["labels"])
    chosen = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_train_epochs": 1, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 2,
        "dataloader_drop_last": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "prediction_loss_only": True,
    } | settings
    args = transformers.TrainingArguments(str(folder), **chosen)
    return (kind or transformers.Trainer)(
        transformers.LlamaForCausalLM(config), args, train_dataset=rows, eval_dataset=rows[:8]
    )


@pytest.fixture(autouse=True)
def libraries_warn() -> Any:
    """Other packages' own deprecations are not this test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logged(made: Any, key: str) -> list[float]:
    return [entry[key] for entry in made.state.log_history if key in entry]


def test_it_logs_what_the_plain_trainer_logs(tmp_path: Path) -> None:
    plain, planned = trainer(tmp_path / "plain"), trainer(tmp_path / "planned")
    assert autopar.parallelize_trainer(planned) is planned
    for made in (plain, planned):
        made.train()
        made.save_model()
    for key in ("loss", "grad_norm", "learning_rate"):
        assert len(logged(plain, key)) == 6
        assert logged(planned, key) == pytest.approx(logged(plain, key), rel=1e-4), key
    assert max(logged(plain, "grad_norm")) > 0.5, "nothing was clipped"
    (expected,), (found,) = ([made.evaluate()["eval_loss"]] for made in (plain, planned))
    assert found == pytest.approx(expected, rel=1e-3)  # the Trainer weighs each of its batches alike
    one, other = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "planned"))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_it_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, rest = (trainer(tmp_path / name, save_strategy="steps", save_steps=3, seed=seed)
                   for name, seed in (("whole", 0), ("rest", 1)))
    for made in (whole, rest):
        autopar.parallelize_trainer(made)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert logged(rest, "loss")[3:] == pytest.approx(logged(whole, "loss")[3:], rel=1e-5)
    assert (checkpoint / "model.safetensors").is_file()
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="no planned Trainer saved"):
        rest._load_optimizer_and_scheduler(str(tmp_path / "plain"))


class OwnLoss(transformers.Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(("settings", "word"), [
    ({"kind": OwnLoss}, "OwnLoss.compute_loss"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    ({"neftune_noise_alpha": 5.0}, "NEFTune"),
])
def test_what_a_planned_step_would_leave_out_is_refused(tmp_path: Path, settings: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        autopar.parallelize_trainer(trainer(tmp_path, **settings))


def test_other_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a LlamaForCausalLM"):
        autopar.parallelize_trainer(trainer(tmp_path).model)
    twice = autopar.parallelize_trainer(trainer(tmp_path))
    with pytest.raises(InputError, match="before"):
        autopar.parallelize_trainer(twice)
    ragged = autopar.parallelize_trainer(trainer(tmp_path, per_device_train_batch_size=5, dataloader_drop_last=False))
    with pytest.raises(InputError, match="dataloader_drop_last=True"):
        ragged.train()
    uneven = autopar.parallelize_trainer(trainer(tmp_path, gradient_accumulation_steps=5))
    with pytest.raises(InputError, match="gradient_accumulation_steps"):
        uneven.train()
