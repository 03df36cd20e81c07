"""Factories that put their model on a GPU, on a machine that has none."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_CUDA = re.compile(r"cuda(:\d+)?")


class _OnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        args, kwargs = pytree.tree_map(_stay, (args, kwargs or {}))
        return func(*args, **kwargs)


def _stay(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and _CUDA.fullmatch(value) else value


def cpu_alone() -> contextlib.AbstractContextManager[Any]:
    """While inside, what is made on a CUDA device or sent to one stays on the CPU, or on the meta device."""
    return _OnCpu()


def cpu_without_cuda() -> contextlib.AbstractContextManager[Any]:
    """`cpu_alone`, where CUDA is not available."""
    return contextlib.nullcontext() if torch.cuda.is_available() else cpu_alone()
