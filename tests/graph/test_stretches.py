"""Stretches of calls alike: traced by their ends, and captured as if every call had been traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.graph import stretches
from autopar.graph.capture import capture
from autopar.graph.model_graph import ModelGraph

LAYERS = 7


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.linear(x) * scale


class _Model(nn.Module):
    """Layers in a row, with what `kind` says between and behind them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        kind, hidden, between = self.kind, self.first(x), []
        scale, others = x.mean(-1, keepdim=True), x.new_zeros(())
        for number, layer in enumerate(self.layers):
            if kind == "other scales":
                scale = x.mean(-1, keepdim=True) + number
            hidden = layer(hidden, scale)
            between.append(hidden)
            if kind == "sums of each":
                others = others + hidden.mean()
            if kind == "unread sums":
                hidden.sum()
            if kind == "looks" and not (hidden.requires_grad and hidden.shape[-1] == 8):
                raise AssertionError
            if kind == "in place" and number == 3:
                hidden.add_(1)
            if kind == "doubled" and number == 3:
                hidden = hidden * 2
            if kind == "unread op" and number == 3:
                torch.rand(3)
            if kind == "detached" and number == 3:
                hidden = hidden.detach()
            if kind == "without gradient" and number == 3:
                with torch.no_grad():
                    others = others + hidden.max()
        if kind == "twice":
            for layer in self.layers:
                hidden = layer(hidden, scale)
        if kind == "all stacked":
            hidden = torch.stack(between)
        if kind == "a skip":
            hidden = hidden + between[2]
        if kind == "a skip from the last but one":
            hidden = hidden + between[-2]
        if kind == "a layer on earlier":
            hidden = hidden + self.layers[0](between[2], scale)
        return hidden.mean() + others


def _graph(kind: str) -> ModelGraph:
    torch.manual_seed(0)
    return capture(_Model(kind), (torch.ones(2, 4, 8),), tag_rows=True).graph


@pytest.mark.parametrize(("kind", "ends"), [
    ("plain", [6]), ("looks", [6]), ("twice", [13]), ("detached", [3]),
    *((kind, []) for kind in (
        "other scales", "sums of each", "unread sums", "in place", "doubled", "unread op", "without gradient",
        "all stacked", "a skip", "a skip from the last but one", "a layer on earlier",
    )),
])
def test_a_stretch_is_captured_as_if_each_call_was_traced(
    monkeypatch: pytest.MonkeyPatch, kind: str, ends: list[int]
) -> None:
    shortcuts: list[list[int]] = []
    holds = stretches.Shortcut.holds

    def noted(self: stretches.Shortcut, *args: object) -> bool:
        found = holds(self, *args)  # type: ignore[arg-type]
        shortcuts.extend([list(self.stretches)] if found else [])
        return found

    monkeypatch.setattr(stretches.Shortcut, "holds", noted)
    graph = _graph(kind)
    assert shortcuts == [ends]
    monkeypatch.setattr(stretches, "SHORTEST", 1000)
    assert graph == _graph(kind)
    assert shortcuts == [ends, []]


class _Asking(nn.Module):
    """Its forward depends on what its layers hold."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x.new_ones(())) * (2.0 if hasattr(layer, self.name) else 3.0)
        return x.mean()


@pytest.mark.parametrize(("name", "factor"), [("linear", 2.0), ("bias", 3.0)])
def test_a_forward_is_told_what_is_inside_a_block(name: str, factor: float) -> None:
    graph = capture(_Asking(name), (torch.ones(2, 4, 8),), tag_rows=True).graph
    factors = {arg for cls in graph.classes for op in cls.ops for arg in op.args if isinstance(arg, float)}
    assert factors == {factor}
