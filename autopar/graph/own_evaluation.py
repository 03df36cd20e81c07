"""What a model's own code computes in training alone, or in evaluation alone.

A graph is captured in training. The operators that know evaluation, as torch's modules call them, are switched
(`autopar.runtime.evaluation`); an `if self.training` in the model's code has left nothing in it to switch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autopar.graph.explain import is_users_file, line_of

# Torch's own modules: what these do in training alone is in the operators that they call.
_TORCH_MODULES = str(Path(torch.__file__).parent / "nn")
_SWITCHED = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})


class _Lines(TorchFunctionMode):
    """Keeps the function and the line of every call of a torch function in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, line = getattr(func, "__name__", str(func)), _own_line()
        if line is not None and name not in _SWITCHED:
            self.found[name, line] = None
        return func(*args, **(kwargs or {}))


def _own_line() -> str | None:
    """The user's innermost line, if no module of torch's lies between."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_users_file(frame.f_code.co_filename):
        if frame.f_code.co_filename.startswith(_TORCH_MODULES) and frame.f_code.co_name == "forward":
            return None
        frame = frame.f_back
    return line_of(frame) if frame is not None else None


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def lines_of_one_mode(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """The lines whose torch functions `run`, a forward of the model, calls in only one of training and evaluation."""
    if not any(module.training for module in model.modules()):
        return ()
    with _Lines() as training:
        run()
    with _in_evaluation(model), _Lines() as evaluation:
        run()
    return tuple(dict.fromkeys(line for call in (*training.found, *evaluation.found)
                               if (call in training.found) != (call in evaluation.found) for line in call[1:]))
