"""What one plan saves, another loads: the next losses are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import runtime_models
import torch
from test_parity import captured_of, plan_of

from autopar.errors import InputError
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, precision

pytestmark = pytest.mark.processes


def make_trainer(model: str, plan: Plan, seed: int, learning_rate: float) -> Trainer:
    factory = getattr(runtime_models, model)
    torch.manual_seed(seed)
    module = factory()[0].double()
    return Trainer(
        module, plan, captured_of(model, "float64"), lambda p: torch.optim.AdamW(p, lr=learning_rate, foreach=False)
    )


def train(trainer: Trainer, first: int, last: int) -> list[float]:
    example = runtime_models.causal_batch()
    with precision("float64"):
        return [trainer.step(make_batch(example, 8, step)).item() for step in range(first, last)]


def save_and_go_on(model: str, plan: Plan, directory: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train, save twice (the second replaces the first), go on: the later losses, and what was saved."""
    trainer = make_trainer(model, plan, seed=0, learning_rate=1e-2)
    train(trainer, 0, 2)
    trainer.save(directory)
    train(trainer, 2, 4)
    trainer.save(directory)
    saved = trainer.full_state_dict()
    return train(trainer, 4, 6), saved


def load_and_go_on(model: str, plan: Plan, directory: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Other weights and settings, then those of the file: the later losses, and what was loaded."""
    trainer = make_trainer(model, plan, seed=1, learning_rate=5.0)
    train(trainer, 0, 1)
    trainer.load(directory)
    loaded = trainer.full_state_dict()
    losses = train(trainer, 4, 6)
    trainer.close()
    return losses, loaded


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [("gpt2", "tp2xpp2_m2", "fsdp2xtp2"), ("llama", "fsdp2_zero2", "pp2xdp2_m2"), ("llama_untied", "hsdp2x2", "tp4"),
     ("gpt2_uneven", "tp4", "fsdp2xtp2")],
)
def test_a_checkpoint_loads_under_another_plan(
    pool: LocalPool, tmp_path: Path, model: str, before: str, after: str
) -> None:
    directory = str(tmp_path / "state")
    first, second = plan_of(model, before, "float64"), plan_of(model, after, "float64")
    losses, saved = pool.run(save_and_go_on, model, first, directory, num_ranks=first.num_devices)[0]
    found, loaded = pool.run(load_and_go_on, model, second, directory, num_ranks=second.num_devices)[0]
    assert found == pytest.approx(losses, rel=1e-9)
    names = set(getattr(runtime_models, model)()[0].state_dict())
    assert set(saved) == set(loaded) == names
    assert all(torch.equal(saved[name], loaded[name]) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["state"], "nothing is left beside the checkpoint"


def test_what_is_no_checkpoint_is_refused(pool: LocalPool, tmp_path: Path) -> None:
    plan = plan_of("llama", "dp2", "float64")
    with pytest.raises(InputError, match="is no checkpoint"):
        pool.run(load_and_go_on, "llama", plan, str(tmp_path), num_ranks=2)
