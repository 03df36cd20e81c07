"""Models that keep something on their modules between forwards: caches, counters, buffers; and shared submodules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.errors import CaptureError
from autopar.graph.capture import Captured, capture
from autopar.graph.interpret import run


class _Layer(nn.Module):
    """Multiplies by a table of as many rows as the sequence is long, which it makes when first asked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)
        self.table: Any
        self.calls = 0
        if kind == "buffer":
            self.register_buffer("table", torch.zeros(1, 8), persistent=False)
        else:
            self.table = {} if kind == "dict" else None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        size = x.shape[1]
        if self.kind == "dict":
            if size not in self.table:
                self.table[size] = self._made(size)
            return x + self.linear(x * self.table[size])
        if self.table is None or self.table.shape[0] < size:
            self.table = self._made(size)
        return x + self.linear(x * self.table[:size])

    def _made(self, size: int) -> Tensor:
        return torch.sin(torch.arange(size * 8).view(size, 8) + 1.0)


class _Caching(nn.Module):
    """Layers, and the last of them inlined."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(kind) for _ in range(4))
        self.top, self.head = _Layer(kind), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(_Layer.forward(self.top, x)).mean(1)


def _entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _same(model: nn.Module, x: Tensor) -> Captured:
    batch = (x, torch.arange(len(x)) % 5)
    captured = capture(model, batch, loss_fn=_entropy)
    params = dict(model.named_parameters())
    found = run(captured.graph, inputs={"0": x, "1": batch[1]}, params=params, constants=captured.constants)
    expected = _entropy(model(x), batch)
    assert torch.equal(found, expected)
    for one, other in zip(torch.autograd.grad(found, list(params.values())),
                          torch.autograd.grad(expected, list(params.values())), strict=True):
        assert torch.equal(one, other)
    return captured


@pytest.mark.parametrize("kind", ["attribute", "buffer", "dict"])
def test_what_a_forward_caches_is_made_by_the_ops(kind: str) -> None:
    assert not _same(_Caching(kind), torch.randn(4, 6, 8)).constants


def test_a_capture_leaves_caches_and_counters_as_they_were() -> None:
    for kind in ("attribute", "buffer", "dict"):
        model = _Caching(kind)
        before = [layer.table for layer in model.layers]
        capture(model, (torch.randn(4, 6, 8), torch.arange(4)), loss_fn=_entropy)
        assert [layer.calls for layer in model.layers] == [0] * 4 and model.top.calls == 0
        assert all(layer.table is table for layer, table in zip(model.layers, before, strict=True))
        assert kind != "dict" or not any(before)


class _Average(nn.Module):
    """A running mean that is assigned, and not written into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.linear(x - self.mean)


class _Frozen(dict[str, int]):
    """A configuration that refuses changes, as those of diffusers do."""

    def clear(self) -> None:
        raise TypeError("frozen")

    def update(self, *_: object, **__: object) -> None:
        raise TypeError("frozen")

    def copy(self) -> dict[str, int]:
        raise TypeError("frozen")


def test_what_refuses_changes_and_was_not_changed_is_left_alone() -> None:
    model = _Caching("dict")
    config = model.config = _Frozen(width=8)
    model.layers[0].config = config
    captured = capture(model, (torch.randn(2, 4, 8), torch.tensor([0, 1])), loss_fn=_entropy)
    assert model.config is config
    assert config == {"width": 8}
    assert captured.graph.blocks
    assert all(not layer.table for layer in model.layers), "what can be changed is put back"


def test_a_state_that_is_assigned_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"buffer mean and assigns another .*self.mean.copy_") as caught:
        capture(_Average(), (torch.randn(4, 8), torch.arange(4)), loss_fn=_entropy)
    assert "\n" not in str(caught.value)


class _Sharing(nn.Module):
    """Layers that share a module with the model, which calls it itself too."""

    class Layer(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.shared, self.linear = shared, nn.Linear(8, 8)

        def forward(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
            return x + self.linear(self.shared(x)) * sizes[0] / sizes[1]

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.layers = nn.ModuleList(self.Layer(shared) for shared in (*self.shared, *self.shared))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared[0](x)
        for layer in self.layers:
            x = layer(x, (2, 3))
        return self.head(x)


def test_a_module_that_blocks_share_belongs_to_each() -> None:
    _same(_Sharing(), torch.randn(4, 8))


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.linear(x)
        return x if mask is None else x.masked_fill(mask, 0.0)


def test_a_label_that_the_model_took_for_its_own_is_named() -> None:
    x, y = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(CaptureError, match="'mask' got a part of it: give a dict") as caught:
        capture(_Masked(), (x, y), loss_fn=_entropy)
    assert "\n" not in str(caught.value)
    capture(_Masked(), {"x": x, "y": y}, loss_fn=lambda output, batch: F.cross_entropy(output, batch["y"]))
