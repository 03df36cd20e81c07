"""Trainers that are given parts of one model: each trains a copy of its own, which is said where it matters."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar

WIDTH, ROWS = 8, 4


class Layers(nn.Module):
    """A generator, or a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Mean(nn.Module):
    """The loss of some networks, one after another."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        for network in self.networks:
            x = network(x)
        return x.square().mean()


def made(model: nn.Module) -> autopar.Trainer:
    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    return autopar.parallelize(model, batch(), sgd)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "another trainer" in record.getMessage()]


@pytest.mark.parametrize("frozen_in", [None, "first", "second"])
def test_a_module_of_two_trainers_is_told_once(caplog: pytest.LogCaptureFixture, frozen_in: str | None) -> None:
    generator, discriminator = Layers(), Layers()
    first = made(Mean(discriminator.requires_grad_(frozen_in != "first"), Layers()))
    second = made(Mean(generator, discriminator.requires_grad_(frozen_in != "second")))
    assert warnings(caplog) == []
    for _ in range(2):
        first.step(batch())
        second.step(batch())
    (text,) = warnings(caplog)
    assert text.startswith(
        "networks.0.layers.0.weight and 5 more parameters of Mean are also in the model (Mean) of another trainer"
    )
    assert "\n" not in text


def test_what_is_told_to_do_hands_the_weights_over() -> None:
    discriminator = Layers()
    first, second = made(Mean(discriminator)), made(Mean(Layers(), discriminator))
    before = {name: param.clone() for name, param in discriminator.named_parameters()}
    first.step(batch())
    trained = first.module.state_dict()
    second.module.load_state_dict(
        {name.replace("networks.0", "networks.1"): value for name, value in trained.items()}, strict=False
    )
    after = second.full_state_dict()
    for name, value in before.items():
        assert torch.equal(discriminator.get_parameter(name), value), "the user's module follows neither"
        assert not torch.equal(after[f"networks.1.{name}"], value)
        assert torch.equal(after[f"networks.1.{name}"], first.full_state_dict()[f"networks.0.{name}"])


def test_a_third_trainer_is_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    shared = Layers()
    trainers = [made(Mean(shared)), made(Mean(Layers(), shared))]
    trainers[0].step(batch())
    trainers.append(made(Mean(shared, Layers())))
    for trainer in trainers:
        trainer.step(batch())
    assert len(warnings(caplog)) == 2


def test_a_trainer_that_takes_anothers_place_is_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    model = Mean(Layers())
    trainer = made(model)
    trainer.step(batch())
    trainer = made(model)  # the old one lives until here
    trainer.step(batch())
    trainer.close()
    again = made(model)
    again.step(batch())
    assert warnings(caplog) == []


def test_frozen_parameters_may_be_shared_and_plans_are_no_trainers(caplog: pytest.LogCaptureFixture) -> None:
    backbone = Layers().requires_grad_(False)
    trainers = [made(Mean(backbone, Layers())), made(Mean(backbone, Layers()))]
    for _ in range(2):
        autopar.plan(Mean(backbone, Layers()), batch(), cluster="1xA100-80GB", global_batch=ROWS)
    for trainer in trainers:
        trainer.step(batch())
    assert warnings(caplog) == []


def test_no_parameter_is_kept_alive() -> None:
    model = Mean(Layers())
    param = weakref.ref(model.networks[0].layers[0].weight)  # type: ignore[index, union-attr]
    trainer = made(model)
    trainer.step(batch())
    del model
    gc.collect()
    assert param() is None
    trainer.step(batch())
