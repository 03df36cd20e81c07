"""An op of the user's own, with its backward and its rule, and a model that runs it in every layer."""

from __future__ import annotations

from typing import Any

import torch
from entry import ROWS, Built
from torch import Tensor, nn

import autopar


@torch.library.custom_op("zoo::gated_product", mutates_args=())
def gated_product(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """(x * silu(gate)) @ weight.T, of x and gate (rows, tokens, features) and weight (out, features)."""
    return torch.einsum("bti,oi->bto", x * torch.nn.functional.silu(gate), weight)


@gated_product.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        x, gate, weight = leaves
        product = torch.einsum("bti,oi->bto", x * torch.nn.functional.silu(gate), weight)
    return torch.autograd.grad(product, leaves, grad)


gated_product.register_autograd(_backward, setup_context=_keep)

RULE = ("zoo.gated_product.default", "b t i, b t i, o i -> b t o")
autopar.register_rule(*RULE)


class Layer(nn.Module):
    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, inner)
        self.gate = nn.Linear(features, inner)
        self.down = nn.Parameter(torch.randn(features, inner) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + gated_product(self.up(x), self.gate(x), self.down)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Layer(16, 32) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.mse_loss(self.head(x), y)


def build() -> Built:
    generator = torch.Generator().manual_seed(3)
    batch = {"x": torch.randn(ROWS, 6, 8, generator=generator), "y": torch.randn(ROWS, 6, 4, generator=generator)}
    return Model(), batch, None
