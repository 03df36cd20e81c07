"""What of a model's gradients is code of its own. A graph holds the forward alone, so that training with it loses this.

Such are functions with a backward of their own (`torch.autograd.Function`), gradient hooks, and checkpoints that are
reentrant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from autopar.errors import CaptureError
from autopar.graph.explain import calling_line

# Their backward is the derivative of their forward.
_DERIVATIVES = {
    ("transformers.models.bloom.modeling_bloom", "GeLUFunction"),
    ("transformers.models.sew_d.modeling_sew_d", "XSoftmax"),
}
_BACKWARDS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


def hooked_gradients(model: nn.Module) -> list[str]:
    """The parameters and modules of a model that hooks on gradients hang on, in words."""
    found = []
    for name, param in model.named_parameters():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            found.append(f"a hook on the gradient of parameter {name}")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            found.append(f"a backward hook of module {name or type(model).__name__}")
    return found


class _InModelCode(TorchFunctionMode):
    """On while the model's own code runs, and off inside the operators that it calls."""

    def __init__(self, found: dict[str, None]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BACKWARDS:
            raise CaptureError(f"{calling_line()}: the forward computes gradients itself ({func.__name__}), and a plan "
                               "has the gradients of the loss alone: write the derivative as operators of the forward")
        if func in _HOOKS:
            self.found[f"a hook on the gradient of a tensor ({calling_line()})"] = None
        return func(*args, **(kwargs or {}))


def _takes_gradients(args: tuple[Any, ...]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(args))


def _described(function: type[Any]) -> str | None:
    """Which function this is, if its backward need not be the derivative of its forward."""
    if issubclass(function, CheckpointFunction):
        return (f"torch.utils.checkpoint with use_reentrant=True ({calling_line()}; give use_reentrant=False, or none: "
                "plans choose what is computed again)")
    room = function.__module__.partition(".")[0]
    if room in ("torch", "autopar") or (function.__module__, function.__name__) in _DERIVATIVES:
        return None
    return (f"the backward of {function.__name__} ({calling_line()}; make it an operator with torch.library.custom_op "
            "and register_autograd, or write x + (f(x) - x).detach() for a straight-through estimate)")


@contextlib.contextmanager
def noting_own_gradients(found: dict[str, None]) -> Iterator[None]:
    """Adds to `found`, in order, what the code that runs inside does to gradients, in words."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        in_model = torch._C._len_torch_function_stack() > 0
        if in_model and torch.is_grad_enabled() and (issubclass(cls, CheckpointFunction) or _takes_gradients(args)):
            text = _described(cls)
            if text is not None:
                found[text] = None
        return original.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(apply)
    try:
        with _InModelCode(found):
            yield
    finally:
        function.apply = original
