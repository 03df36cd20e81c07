"""torch.autocast inside a model, inside its loss, and around the capture: the same casts, as ops of the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.graph.capture import Captured, capture
from autopar.graph.interpret import run


def _half(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _Layers(nn.Module):
    """Layers under autocast, or not; the head outside of it."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList([_Layer() for _ in range(5)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        with _half(self.dtype) if self.dtype is not None else contextlib.nullcontext():
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


class _ManyOps(nn.Module):
    """Ops of each of autocast's kinds: in 16 bits, in float32, of the widest operand; and a region in it without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.first = nn.Conv1d(16, 16, 1), nn.Linear(16, 16), nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.bare = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with _half():
            y = self.conv(x.transpose(1, 2)).transpose(1, 2)
            y = torch.cat([self.gate(x).sigmoid() * y, x], -1).unflatten(-1, (2, 16)).sum(2)
            with torch.autocast("cpu", enabled=False):
                z = self.bare(x) + self.first(x)
            z = torch.einsum("bti,io->bto", z, self.mix)
            z.mul_(0.5)
            return (F.layer_norm(z, (16,)) @ y.transpose(1, 2)).softmax(-1) @ torch.stack([y, x]).mean(0)


def _same(model: nn.Module, batch: tuple[Tensor, ...], loss_fn: Callable[[Any, Any], Tensor], *,
          around: bool = False) -> Captured:
    """Captures, asserting that loss and gradients are the model's own, to the last bit."""
    with _half() if around else contextlib.nullcontext():
        captured = capture(model, batch, loss_fn=loss_fn)
        expected = loss_fn(model(batch[0]), batch)
    params = dict(model.named_parameters())
    inputs = {str(index): value for index, value in enumerate(batch)}
    found = run(captured.graph, inputs=inputs, params=params, constants=captured.constants)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    for one, other in zip(torch.autograd.grad(found, list(params.values())),
                          torch.autograd.grad(expected, list(params.values())), strict=True):
        assert torch.equal(one, other)
    return captured


def _tokens() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, 32, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    return ids, labels


def _entropy(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_a_region(dtype: torch.dtype) -> None:
    graph = _same(_Layers(dtype), _tokens(), _entropy).graph
    layer, = (cls for cls in graph.classes if cls.name == "_Layer")
    product = next(op for op in layer.ops if op.name == "linear")
    assert layer.tensor[product.outputs[0]].dtype == str(dtype).removeprefix("torch.")
    assert sum(block.cls == "_Layer" for block in graph.blocks) == 5


def test_layers_in_and_out_of_a_region_are_two_classes() -> None:
    class Half(_Layers):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for number, layer in enumerate(self.layers):
                with _half() if number < 3 else contextlib.nullcontext():
                    x = layer(x)
            return self.head(x)

    graph = _same(Half(None), _tokens(), _entropy).graph
    assert [block.cls for block in graph.blocks if "_Layer" in block.cls] == ["_Layer"] * 3 + ["_Layer.1"] * 2


def test_ops_of_every_kind() -> None:
    _same(_ManyOps(), (torch.randn(4, 6, 16), torch.randn(4, 6, 16)),
          lambda output, batch: F.mse_loss(output, batch[1].bfloat16()))


def test_a_loss_under_autocast() -> None:
    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        with _half():
            return _entropy(output @ output.transpose(1, 2) @ output, batch)

    _same(_Layers(None), _tokens(), loss)


def test_autocast_around_the_capture() -> None:
    inside, around = _Layers(None), _Layers(None)
    around.load_state_dict(inside.state_dict())
    captured = _same(around, _tokens(), _entropy, around=True)
    assert any(info.dtype == "bfloat16" for cls in captured.graph.classes for info in cls.tensors)
    assert not torch.is_autocast_enabled("cpu")


def test_what_runs_in_one_dtype_already_has_no_casts() -> None:
    with _half():
        captured = capture(_Layers(torch.bfloat16), _tokens(), loss_fn=_entropy, dtype="bfloat16")
    layer, = (cls for cls in captured.graph.classes if cls.name == "_Layer")
    assert not [op for op in layer.ops if op.name == "to" and op.module.endswith(("qkv", "out"))]
