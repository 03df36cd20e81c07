"""Modules that are built alike are found, and what tells them apart."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

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
