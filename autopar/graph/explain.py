"""One line about what in the user's model cannot be captured: which module, which source line, what to do."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType, TracebackType

import torch
from torch import nn

from autopar.errors import AutoparError, CaptureError
from autopar.graph.fake import DATA_DEPENDENT_ERRORS

_TORCH = os.path.dirname(torch.__file__)
_AUTOPAR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

NO_TRANSFORMS = ("transforms of torch.func (vmap, grad, jvp, ...) cannot be captured; write the batch dim, or the "
                 "derivative, as operators of the forward")


@contextlib.contextmanager
def explained(model: nn.Module, prefix: str = "") -> Iterator[None]:
    """Turns an error that the model's code raises while it is traced into a CaptureError of one line.

    `prefix` is the FQN of `model` in the user's model.
    """
    try:
        with _without_torchs_report():
            yield
    except AutoparError:
        raise
    except Exception as error:
        place = _place(error.__traceback__, model, prefix)
        if _is_data_dependent(error):
            raise CaptureError(
                f"{place}: the code branches on a tensor's value or makes a tensor whose shape depends on one "
                f"(.item(), bool(tensor), nonzero, tensor[mask]); rewrite it with torch.where or fixed shapes"
            ) from error
        if "functorch transform" in str(error):
            raise CaptureError(f"{place}: {NO_TRANSFORMS}") from error
        lines = str(error).strip().splitlines()
        raise CaptureError(f"{place}: {type(error).__name__}: {lines[0] if lines else 'no message'}") from error


@contextlib.contextmanager
def _without_torchs_report() -> Iterator[None]:
    """While inside, torch does not log the traceback of an op that fails on fake tensors: the error says it all."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_data_dependent(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, DATA_DEPENDENT_ERRORS):
            return True
        error = error.__cause__ or error.__context__
    return False


@cache
def is_users_file(path: str) -> bool:
    """Whether a source file is neither torch's nor autopar's own."""
    path = os.path.abspath(path)
    if path.startswith((_TORCH + os.sep, _AUTOPAR + os.sep)):
        return False
    return "site-packages" in path or not path.startswith(_STDLIB + os.sep)


_STDLIB = os.path.dirname(os.__file__)


def calling_line() -> str:
    """"modeling_llama.py:312": the user's innermost line that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users_file(frame.f_code.co_filename):
        frame = frame.f_back
    return line_of(frame) if frame is not None else "unknown line"


def line_of(frame: FrameType) -> str:
    """"modeling_llama.py:312": the line that a frame is at."""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _place(traceback: TracebackType | None, model: nn.Module, prefix: str) -> str:
    """'model.layers.3.mlp (moe.py:41)': the innermost user frame, and the module whose code it is."""
    names = {id(module): name for name, module in model.named_modules()}
    module_name: str | None = None
    line = ""
    while traceback is not None:
        frame = traceback.tb_frame
        if is_users_file(frame.f_code.co_filename):
            line = f"{os.path.basename(frame.f_code.co_filename)}:{traceback.tb_lineno}"
            first = frame.f_code.co_varnames[:1]  # "self", or what else a method calls its first argument
            owner = frame.f_locals.get(first[0]) if first else None
            if id(owner) in names:
                module_name = names[id(owner)]
        traceback = traceback.tb_next
    full = ".".join(part for part in (prefix, module_name or "") if part)
    where = full or type(model).__name__
    return f"{where} ({line})" if line else where


def short_source(stack_trace: str | None) -> str:
    """"modeling_llama.py:312" from the stack trace that torch puts on a traced op: the user's innermost line."""
    found = ""
    for line in (stack_trace or "").splitlines():
        head = line.strip()
        if head.startswith('File "'):
            path, _, rest = head[6:].partition('"')
            number = rest.partition("line ")[2].split(",")[0]
            if is_users_file(path):
                found = f"{os.path.basename(path)}:{number}"
    return found


