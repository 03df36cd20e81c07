"""torch.autocast around and inside of a model: its state is recorded, and its casts become ops of the graph.

An exported program has the ops of an autocast region as the model wrote them, each with the dtype of its result. The
casts that autocast does before an op follow from that dtype: its rules cast all floating operands of an op to one,
which is the result's (https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import InputError

AutocastState: TypeAlias = "tuple[tuple[str, torch.dtype], ...]"
_DEVICE_TYPES = ("cpu", "cuda")
_CAST = (torch.float16, torch.bfloat16, torch.float32)  # autocast leaves float64 alone


def autocast_state() -> AutocastState:
    """The device types for which autocast is on, and to which dtype."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind))


@contextlib.contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """While inside, autocast is as in `state`, on top of what surrounds it."""
    with contextlib.ExitStack() as stack:
        for kind, dtype in state:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind, _ in autocast_state():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def as_captured(captured: AutocastState) -> Iterator[None]:
    """While inside, what a graph has computes as captured: its casts are ops, and autocast adds none.

    InputError where autocast is on now and was not around the capture.
    """
    if missed := [item for item in autocast_state() if item not in captured]:
        kind, dtype = missed[0]
        raise InputError(
            f"torch.autocast({kind!r}, {dtype}) is on, and was not when the model was captured: call parallelize "
            "inside of it too, and its casts are part of the program; or give parallelize a dtype, as in dtype='bf16'"
        )
    with without_autocast():
        yield


def cast_before(target: Any, args: Any, kwargs: Any, traced: Any) -> torch.dtype | None:
    """The dtype that autocast gives the floating operands of an op; None where it leaves them as they are.

    `args` and `kwargs` are fake tensors, `traced` is what the op returned in the region. Call it under the fake mode,
    outside of autocast.
    """
    wanted = _dtype(traced)
    operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_cast(leaf)]
    if wanted is None or all(operand.dtype == wanted for operand in operands):
        return None
    try:
        with torch.no_grad():
            alone = _dtype(target(*args, **kwargs))
    except RuntimeError:  # operands of several dtypes, which only autocast makes one
        return wanted
    return wanted if alone != wanted else None


def is_cast(value: Any) -> bool:
    """Whether autocast may change the dtype of an operand."""
    return isinstance(value, Tensor) and value.dtype in _CAST


def _dtype(result: Any) -> torch.dtype | None:
    return next((leaf.dtype for leaf in pytree.tree_leaves(result) if is_cast(leaf)), None)
