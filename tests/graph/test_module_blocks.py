"""Modules that are built alike are found, and what tells them apart."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.graph.capture import capture
from autopar.graph.module_blocks import comparable, find_candidates


class _Layer(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = partial(functional.gelu, approximate=approximate)  # made anew for each layer

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


def _attributes(*approximate: str) -> list[object]:
    model = nn.Sequential(*(_Layer(each) for each in approximate))
    return [candidate.attributes for candidate in find_candidates(model)]


def test_partials_of_one_function_do_not_tell_layers_apart() -> None:
    assert _attributes("tanh", "tanh") == [{}, {}]


def test_partials_with_other_arguments_do() -> None:
    first, second, third = _attributes("tanh", "none", "tanh")
    assert first == third != second


def test_a_partial_is_no_plain_value() -> None:
    assert comparable(partial(functional.gelu, approximate="tanh"))[0] == "object"  # type: ignore[index]


class _InLists(nn.Module):
    """Each layer is a list of its modules, which the model calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([nn.LayerNorm(4), nn.Identity()]), _Layer("none"), nn.Dropout(0.0)])
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for (norm, _), layer, dropout in self.layers:  # type: ignore[misc]
            x = x + dropout(layer(norm(x)))
        return x.square().mean()


def test_layers_that_are_lists_have_their_modules_as_blocks() -> None:
    model = _InLists()
    names = [name for number in range(3) for name in (f"layers.{number}.0.0", f"layers.{number}.1")]
    assert [candidate.fqn for candidate in find_candidates(model)] == names
    graph = capture(model, (torch.randn(2, 4),)).graph
    assert [block.name for block in graph.blocks if block.name.startswith("layers")] == names
    assert len({block.cls for block in graph.blocks if block.name in names[2:]}) == 2
