"""Models whose forward swaps weights, draws distributions, counts or normalizes weights: as they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

import autopar
from autopar.errors import CaptureError
from autopar.graph.capture import capture

ROWS, WIDTH = 6, 8


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))


class OtherWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights = {name: param * 1.5 for name, param in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, (x,)).square().mean() + self.net(x).mean()


class LowRank(nn.Module):
    """Layers whose weights are given what a pair of thin matrices makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.left = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, 2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, left in zip(self.layers, self.left, strict=True):
            weights = {"weight": layer.weight.detach() + left @ left.T, "bias": layer.bias}
            x = torch.tanh(torch.func.functional_call(layer, weights, (x,)))
        return x.square().mean()


class Policy(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        choice = torch.distributions.Categorical(logits=out)
        normal = torch.distributions.Normal(out[:, 0], out[:, 1].exp())
        prior = torch.distributions.Normal(torch.zeros_like(out[:, 0]), torch.ones_like(out[:, 0]))
        gained = choice.log_prob(torch.zeros(x.shape[0], dtype=torch.long)) + choice.entropy()
        return (torch.distributions.kl_divergence(normal, prior) - gained).mean()


class Spectral(Base):
    def __init__(self, normed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net[0], self.net[2] = normed(self.net[0]), normed(self.net[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


class Handing(nn.Module):
    """Layers that read what their model puts on them."""

    class Layer(nn.Linear):
        gate: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x)) * self.gate

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.gate = x.mean(1, keepdim=True)
            x = x + layer(x)
        return x.square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "functional_call": OtherWeights, "low_rank": LowRank, "distributions": Policy,
    "spectral_norm": lambda: Spectral(nn.utils.parametrizations.spectral_norm),
    "old_spectral_norm": lambda: Spectral(nn.utils.spectral_norm), "old_weight_norm": lambda: Spectral(weight_norm),
    "handed": Handing,
}


def batch(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old spectral_norm is going
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_plain_pytorch_does(name: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(MODELS[name]().double())
    model, plain = models
    trainer = autopar.parallelize(model, batch(0), lambda params: torch.optim.SGD(params, lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        loss = plain(**batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(trainer.step(batch(step)), loss.detach(), rtol=1e-12, atol=0)
    state = trainer.full_state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-14)


def test_distributions_check_their_values_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch's compiler turns it off
    capture(Policy().double(), batch(0))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


class Penalized(Base):
    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(self.net(seen).sum(), seen, create_graph=True)
        return self.net(x).mean() + gradient.square().mean()


class Attacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().clone().requires_grad_()
        self.net(seen).sum().backward()
        assert seen.grad is not None
        return self.net(x + seen.grad.sign()).square().mean()


class Mapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.net(row).square().sum())(x).mean()


class Tangent(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1].square().mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, about what jvp uses itself
@pytest.mark.parametrize(("kind", "said"), [
    (Penalized, "computes gradients itself (grad)"), (Attacked, "computes gradients itself (backward)"),
    (Mapped, "transforms of torch.func"), (Tangent, "transforms of torch.func"),
])
def test_derivatives_inside_the_forward_are_refused(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(kind().double(), batch(0))
    assert said in str(error.value) and "test_unusual_models.py:" in str(error.value) and "\n" not in str(error.value)


class Annealed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.calls = 1.0, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.temperature *= 0.9
        return (self.net(x) / self.temperature).square().mean()


def test_a_number_that_the_forward_changes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Annealed().double()
    graph = capture(model, batch(0)).graph
    (note,) = [note for note in graph.notes if "changes the number" in note]
    assert "temperature" in note and note in caplog.text and model.temperature == 1.0


class Keywords(Base):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.net(x) * (2 if more else 1)


def test_what_a_model_of_any_keyword_gets_is_told() -> None:
    both = {**batch(0), "y": torch.zeros(ROWS, 2, dtype=torch.float64)}
    notes = capture(Keywords().double(), both, loss_fn=lambda out, given: F.mse_loss(out, given["y"])).graph.notes
    assert any("takes any keyword, and so 'y'" in note for note in notes)
