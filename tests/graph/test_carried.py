"""What a forward leaves on the model's modules for the next one: refused where the loss depends on it, no harm else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopar.errors import CaptureError
from autopar.graph.capture import capture

WIDTH = 8


class _Layer(nn.Module):
    """`step` is what a forward does with its module, its input's projection and a number a channel."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj, self.step = nn.Linear(WIDTH, WIDTH), step
        self.state: Any = None
        self.mean, self.log = torch.zeros(WIDTH), 0.0
        self.memory: list[Tensor] = []
        self.table: dict[str, Any] = {}
        self.of_numpy, self.worst = np.arange(3.0), float("nan")
        self.links = torch.eye(WIDTH).to_sparse()
        self.register_buffer("rates", torch.rand(WIDTH))
        self.register_buffer("running", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, self.proj(x))


class _Model(nn.Module):
    def __init__(self, step: Callable[[Any, Tensor], Tensor], num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(step) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def hidden_state(layer: Any, x: Tensor) -> Tensor:
    if layer.state is not None:
        x = x + layer.state
    layer.state = torch.tanh(x).detach()
    return x


def of_a_list(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.memory[-1] if layer.memory else x
    layer.memory.append(x.detach())
    return x


def of_a_dict(layer: Any, x: Tensor) -> Tensor:
    x = x * layer.table.get("scale", 1.0)
    layer.table["scale"] = x.detach().mean(0)
    return x


def last_input(layer: Any, x: Tensor) -> Tensor:
    before, layer.state = layer.state, x
    return x if before is None else x + before.detach()


def running_mean(layer: Any, x: Tensor) -> Tensor:
    layer.mean = 0.9 * layer.mean + 0.1 * x.detach().mean(0)
    return x - layer.mean


def drawn_once(layer: Any, x: Tensor) -> Tensor:
    if layer.state is None:
        layer.state = torch.rand(WIDTH)
    return x * layer.state


def last_seen(layer: Any, x: Tensor) -> Tensor:
    layer.state, layer.mean = x, x.detach().mean(0)
    layer.table["last"] = [x]
    return x


def only_logged(layer: Any, x: Tensor) -> Tensor:
    layer.log = layer.log * 0.9 + x.detach().mean()
    return x


def table_of_the_shape(layer: Any, x: Tensor) -> Tensor:
    if layer.state is None or layer.state.shape[0] < x.shape[1]:
        layer.state = torch.arange(x.shape[1], dtype=x.dtype)
    return x + layer.state


def table_of_a_buffer(layer: Any, x: Tensor) -> Tensor:
    if layer.state is None:
        layer.state = torch.outer(torch.arange(3.0), layer.rates).cos()
    return x + layer.state[1]


def own_weights(layer: Any, x: Tensor) -> Tensor:
    layer.memory[:] = [layer.proj.weight, layer.rates]
    return x @ layer.memory[0].t() * layer.memory[1]


def buffer(layer: Any, x: Tensor) -> Tensor:
    layer.running.copy_(0.9 * layer.running + 0.1 * x.detach().mean(0))
    return x - layer.running


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("step", "attribute"), [
    (hidden_state, "state"), (last_input, "state"),
    (of_a_list, "memory"), (of_a_dict, "table"), (running_mean, "mean"), (drawn_once, "state"),
])
def test_what_the_next_loss_depends_on_is_refused(
    step: Callable[[Any, Tensor], Tensor], attribute: str, num_layers: int
) -> None:
    model = _Model(step, num_layers)
    with pytest.raises(CaptureError, match=rf"left in the attribute 'layers\.0\.{attribute}'"):
        capture(model, {"x": torch.rand(4, WIDTH)}, tag_rows=True)
    assert model.layers[0].state is None and not model.layers[0].memory and not model.layers[0].table


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("step", [last_seen, only_logged, table_of_the_shape, table_of_a_buffer, own_weights, buffer])
def test_what_it_does_not_depend_on_is_no_harm(step: Callable[[Any, Tensor], Tensor], num_layers: int) -> None:
    captured = capture(_Model(step, num_layers), {"x": torch.rand(4, WIDTH)}, tag_rows=True)
    assert not [note for note in captured.graph.notes if "worst" in note]
