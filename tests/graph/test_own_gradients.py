"""What a model's own code does to gradients is named, since its graph does not hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar import parallelize
from autopar.errors import CaptureError, InputError
from autopar.graph.capture import capture


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


@torch.library.custom_op("autopar_tests::doubled", mutates_args=())
def _doubled(x: Tensor) -> Tensor:
    return 2 * x


_doubled.register_fake(lambda x: torch.empty_like(x))
_doubled.register_autograd(lambda ctx, grad: 2 * grad)


def _halve(grad: Tensor) -> Tensor:
    return grad / 2


def _hooked(x: Tensor) -> Tensor:
    x = x * 1
    if x.requires_grad:
        x.register_hook(_halve)
    return x


class _Layer(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.change = nn.Linear(8, 8), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


class _Model(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.layers = nn.ModuleList((_Layer(torch.tanh), _Layer(change)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def _found(model: nn.Module) -> str:
    """What is found; a Trainer refuses it in one line, and a plan may still be made."""
    batch = (torch.randn(4, 8),)
    found = capture(model, batch).own_gradients
    if not found:
        parallelize(model, batch, lambda params: torch.optim.SGD(params, lr=0.1)).close()
        return ""
    with pytest.raises(InputError, match="would lose what the model does to gradients") as caught:
        parallelize(model, batch, lambda params: torch.optim.SGD(params, lr=0.1))
    assert "\n" not in str(caught.value)
    assert found[0] in str(caught.value)
    return found[0]


def _line(mark: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{next(i for i, text in enumerate(lines, 1) if text.strip().startswith(mark))}"


def test_functions_with_a_backward_of_their_own() -> None:
    def rounded(x: Tensor) -> Tensor:
        return _Rounding.apply(x)

    text = _found(_Model(rounded))
    assert "backward of _Rounding" in text
    assert _line("return _Rounding.apply") in text


def test_a_reentrant_checkpoint() -> None:
    text = _found(_Model(lambda x: checkpoint(torch.sin, x, use_reentrant=True)))
    assert "use_reentrant=False" in text
    assert not _found(_Model(lambda x: checkpoint(torch.sin, x, use_reentrant=False)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_that_is_one_reentrant_checkpoint() -> None:
    class Whole(_Model):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    with pytest.raises(CaptureError, match=r"no gradient.*use_reentrant=True"):
        capture(Whole(), (torch.randn(4, 8),))


def test_hooks_on_gradients() -> None:
    assert _line("x.register_hook") in _found(_Model(_hooked))
    model = _Model()
    model.layers[1].linear.weight.register_hook(_halve)
    assert _found(model) == "a hook on the gradient of parameter layers.1.linear.weight"
    model = _Model()
    model.layers[0].linear.bias.register_post_accumulate_grad_hook(lambda param: None)
    assert _found(model) == "a hook on the gradient of parameter layers.0.linear.bias"
    model = _Model()
    model.layers[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    assert _found(model) == "a backward hook of module layers.1"


def test_what_keeps_the_derivative_is_not_named() -> None:
    def within_no_grad(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = _Doubling.apply(x.detach())
        return x * scale

    assert not _found(_Model(within_no_grad))
    assert not capture(_Model(_doubled), (torch.randn(4, 8),)).own_gradients


def test_torch_functions_are_as_before_after_a_capture() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    capture(_Model(_Rounding.apply), (torch.randn(4, 8),))
    assert torch.autograd.Function.__dict__["apply"] is before
    x = torch.ones(2, requires_grad=True)
    _Doubling.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]
