"""What a training loop does between the trainer's calls is honoured, or refused in one line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import AutoparError, InputError
from autopar.runtime.local import LocalPool
from autopar.runtime.step_checks import _digest

ROWS, WIDTH = 8, 64


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def made(optimizer: Any = sgd, *, frozen: bool = False, **options: Any) -> autopar.Trainer:
    torch.manual_seed(0)
    model = Layers().double()
    model.layers[0].requires_grad_(not frozen)
    return autopar.parallelize(model, batch(), optimizer, **options)


def batch(seed: int = 1) -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}


def own_batches(mesh: dict[str, int]) -> list[str]:
    """What is said where each rank gives its own batch, in training and in evaluation."""
    trainer, own = made(mesh=mesh), batch(torch.distributed.get_rank())
    found = []
    for call in (trainer.step, trainer.evaluate):
        try:
            call(own)
        except InputError as error:
            found.append(str(error))
    trainer.close()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("axis", ["dp", "pp"])
def test_ranks_with_batches_of_their_own_are_refused(pool: LocalPool, axis: str) -> None:
    for said in pool.run(own_batches, {axis: 2}, num_ranks=2):
        assert len(said) == 2
        assert all(text.startswith("rank 1 was given another batch than rank 0 ('x' differs)") for text in said)


def thawed(mesh: dict[str, int] | None, frozen: bool) -> str:
    trainer = made(frozen=frozen, mesh=mesh)
    trainer.step(batch())
    for param in trainer.module.parameters():
        param.requires_grad_(True) if frozen else param.requires_grad_(False)
    try:
        trainer.step(batch())
    except InputError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


@pytest.mark.processes
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mesh", [{"dp_replicate": 2}, {"dp_shard": 2}])
def test_what_is_trained_stays_so(pool: LocalPool, mesh: dict[str, int], frozen: bool) -> None:
    for said in pool.run(thawed, mesh, frozen, num_ranks=2):
        assert f"layers.0.weight was {'unfrozen' if frozen else 'frozen'} after the plan was made" in said
    assert f"layers.0.weight was {'unfrozen' if frozen else 'frozen'}" in thawed(None, frozen)


def test_gradients_that_no_step_used_are_not_replaced_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    trainer = made()
    with caplog.at_level(logging.WARNING, logger="autopar.runtime.step_checks"):
        trainer.forward_backward(batch())
        trainer.optimizer_step()
        trainer.forward_backward(batch())
        trainer.optimizer.zero_grad()
        trainer.forward_backward(batch())
        trainer.optimizer.step()
        trainer.step(batch())
        assert not caplog.records
        trainer.forward_backward(batch())
        trainer.forward_backward(batch())
    assert "do not accumulate" in caplog.text


def test_a_shorter_last_batch_is_explained() -> None:
    trainer = made()
    with pytest.raises(InputError, match=r"shape \[3, 64\]; the plan takes \[8, 64\] .*DataLoader\(drop_last=True\)"):
        trainer.step({"x": batch()["x"][:3]})
    with pytest.raises(InputError, match=r"every rank\)$"):
        trainer.step({"x": batch()["x"].repeat(2, 1)})


def stepped_alone(mesh: dict[str, int]) -> str:
    trainer = made(lambda params: torch.optim.Adafactor(params), mesh=mesh)
    trainer.step(batch())
    trainer.forward_backward(batch())
    try:
        trainer.optimizer.step()
    except AutoparError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


@pytest.mark.processes
def test_an_optimizer_that_is_stepped_in_parts_is_not_stepped_alone(pool: LocalPool) -> None:
    for said in pool.run(stepped_alone, {"dp_shard": 2}, num_ranks=2):
        assert said.startswith("call trainer.optimizer_step()")


@pytest.mark.parametrize("value", [
    torch.zeros(3, 0), torch.tensor(1.5), torch.ones(2, 3, dtype=torch.bfloat16).T, torch.tensor([1j, 0]),
    torch.tensor([True, False]),
])
def test_a_digest_is_of_the_values(value: Tensor) -> None:
    assert _digest(value) == _digest(value.clone())
    if value.numel():
        assert _digest(value) != _digest(torch.zeros_like(value))


def matrices(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([param for param in params if param.dim() == 2], lr=0.01)


def losses(mesh: dict[str, int] | None) -> list[float]:
    trainer = made(matrices, mesh=mesh)
    found = [trainer.step(batch(seed)).item() for seed in range(3)]
    trainer.close()
    return found


@pytest.mark.processes
def test_an_optimizer_of_matrices_alone(pool: LocalPool) -> None:
    """Three stages for three layers: the last may have no matrix, and the planner makes the optimizer too."""
    alone = losses(None)
    for found in pool.run(losses, {"dp_shard": 2}, num_ranks=2):
        assert found == pytest.approx(alone, rel=1e-9)
    for found in pool.run(losses, {"pp": 4}, num_ranks=4):
        assert found == pytest.approx(alone, rel=1e-9)


def averaged(mesh: dict[str, int]) -> tuple[str, float]:
    """What AveragedModel says, and how far a mean that is kept by name, as it advises, is from one process's."""
    trainer, said = made(mesh=mesh), ""
    torch.manual_seed(0)
    alone = Layers().double()
    try:
        torch.optim.swa_utils.AveragedModel(trainer.module)
    except InputError as error:
        said = str(error)
    stepping = sgd(alone.parameters())
    whole = {name: param.detach().clone() for name, param in alone.named_parameters()}
    mean = {name: param.detach().clone() for name, param in trainer.module.named_parameters()}
    for step in range(3):
        trainer.step(batch(step))
        stepping.zero_grad()
        alone(**batch(step)).backward()
        stepping.step()
        for kept, module in ((mean, trainer.module), (whole, alone)):
            for name, param in module.named_parameters():
                kept[name].lerp_(param.detach(), 0.1)
    found = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in mean.items()}
    trainer.close()
    return said, max(float((found[name] - whole[name]).abs().max()) for name in whole)


@pytest.mark.processes
def test_a_copy_of_sharded_modules_is_refused_and_a_mean_by_name_is_right(pool: LocalPool) -> None:
    for said, error in pool.run(averaged, {"dp_shard": 2}, num_ranks=2):
        assert "cannot be copied" in said and "\n" not in said
        assert error < 1e-14
