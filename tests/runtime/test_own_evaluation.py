"""A model whose own code computes otherwise in evaluation is told there; what operators know is switched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar import parallelize
from autopar.errors import InputError
from autopar.runtime.engine import Trainer


class _DropPath(nn.Module):
    """Leaves whole rows out, as vision models write it."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(1 - self.rate)  # DROPS
        return x * kept / (1 - self.rate)


class _Layer(nn.Module):
    def __init__(self, change: nn.Module):
        super().__init__()
        self.linear, self.change = nn.Linear(8, 8), change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(F.dropout(self.linear(x), 0.2, self.training))


class _Model(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(make(index)) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class _First(nn.LSTM):
    """An LSTM's outputs alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def _trained(model: nn.Module, batch: tuple[Tensor, ...]) -> Trainer:
    trainer = parallelize(model, batch, lambda params: torch.optim.SGD(params, lr=0.1))
    trainer.step(batch)
    return trainer


@pytest.mark.parametrize("make", [
    lambda index: _DropPath(0.0), lambda index: nn.RReLU(), lambda index: nn.Dropout(0.3),
    lambda index: _First(8, 8, 2, dropout=0.5, batch_first=True), lambda index: nn.InstanceNorm1d(5),
])
def test_operators_are_switched(make: Callable[[int], nn.Module]) -> None:
    model, batch = _Model(make), (torch.randn(4, 5, 8),)
    plain = copy.deepcopy(model)
    trainer = _trained(model, batch)
    plain.load_state_dict(trainer.full_state_dict())
    torch.testing.assert_close(trainer.evaluate(batch), plain.eval()(*batch))


def test_code_of_the_models_own_is_refused() -> None:
    trainer = _trained(_Model(lambda index: _DropPath(0.1 * index)), (torch.randn(4, 5, 8),))
    with pytest.raises(InputError, match=r"evaluation \(test_own_evaluation.py:\d+.*full_state_dict") as caught:
        trainer.evaluate((torch.randn(4, 5, 8),))
    assert "\n" not in str(caught.value)


def test_an_auxiliary_loss_of_training_is_refused() -> None:
    class Aided(_Model):
        def forward(self, x: Tensor) -> Tensor:
            loss = super().forward(x)
            return loss + 0.1 * x.abs().mean() if self.training else loss

    trainer = _trained(Aided(lambda index: nn.ReLU()), (torch.randn(4, 5, 8),))
    with pytest.raises(InputError, match="computes otherwise in evaluation"):
        trainer.evaluate((torch.randn(4, 5, 8),))


def test_a_model_that_is_in_evaluation_already_is_as_it_is() -> None:
    model, batch = _Model(lambda index: _DropPath(0.3)).eval(), (torch.randn(4, 5, 8),)
    trainer = _trained(model, batch)
    assert not any(module.training for module in model.modules())
    trainer.evaluate(batch)


def test_an_evaluation_is_no_batch_that_a_norm_counts() -> None:
    model, batch = _Model(lambda index: nn.BatchNorm1d(5)), (torch.randn(4, 5, 8),)
    trainer = _trained(model, batch)
    before = trainer.full_state_dict()
    trainer.evaluate(batch)
    after = trainer.full_state_dict()
    assert before["layers.1.change.num_batches_tracked"] == 1
    assert all(torch.equal(value, after[name]) for name, value in before.items())
