"""A loss that goes through all parameters, a penalty on weights, is captured whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.graph.capture import capture
from autopar.graph.interpret import run


class _Model(nn.Module):
    def __init__(self, norm: str):
        super().__init__()
        self.norm = norm
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def penalty(self) -> Tensor:
        ways = {
            "parameters": lambda: self.parameters(),
            "named": lambda: (param for name, param in self.named_parameters() if "weight" in name),
            "state": lambda: self.state_dict(keep_vars=True).values(),
            "table": lambda: (param for layer in self.layers for param in layer[0]._parameters.values()),
            "direct": lambda: (layer[0].weight for layer in self.layers),
        }
        return sum(param.square().sum() for param in ways[self.norm]())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean() + 0.1 * self.penalty()


@pytest.mark.parametrize("way", ["parameters", "named", "state", "table", "direct"])
def test_a_penalty_on_all_weights(way: str) -> None:
    model, x = _Model(way), torch.randn(4, 8)
    captured = capture(model, (x,))
    assert len(captured.graph.blocks) >= 3
    params = dict(model.named_parameters())
    found = run(captured.graph, inputs={"0": x}, params=params, constants=captured.constants)
    expected = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found_grads = torch.autograd.grad(found, list(params.values()))
    for one, other in zip(found_grads, torch.autograd.grad(expected, list(params.values())), strict=True):
        torch.testing.assert_close(one, other)
