"""torch.export under fake tensors: the whole model with its blocks as opaque ops, and each block alone."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from autopar.errors import CaptureError
from autopar.graph.autocast import autocast_as
from autopar.graph.collected import collecting
from autopar.graph.explain import explained
from autopar.graph.left_behind import LeftBehind
from autopar.graph.module_blocks import Candidate
from autopar.graph.record import BlockCall, Recording, patched_forwards, take_tensors
from autopar.graph.stretches import Shortcut, Stretch

BLOCK_OP = "autopar.block.default"
_active_calls: list[BlockCall] = []


@torch.library.custom_op("autopar::block", mutates_args=())
def _block(inputs: list[Tensor], call: int) -> list[Tensor]:
    """The stand-in of a block's call while the rest of the model is traced. It never runs."""
    raise AssertionError("autopar::block runs only under fake tensors")


_BLOCK = torch.ops.autopar.block.default


@_block.register_fake
def _(inputs: list[Tensor], call: int) -> list[Tensor]:
    return [torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)
            for meta in _active_calls[call].outputs]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    export_log = logging.getLogger("torch.export")
    level = export_log.level
    export_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        export_log.setLevel(level)


def _export(module: nn.Module, inputs: list[Tensor]) -> ExportedProgram:
    with _quiet():
        return torch.export.export(module, tuple(inputs), strict=False)


class _KeepContiguous(TorchFunctionMode):
    """Records `contiguous()` also where it changes nothing, so that the ops do not depend on the batch size.

    torch's own method returns early for a contiguous tensor; labels[:, 1:] of one row is one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Whole(nn.Module):
    """The user's model from batch tensors to the scalar loss."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], restart: Callable[[], None], left_behind: LeftBehind
    ):
        super().__init__()
        self.model = model
        self._loss = loss
        self._restart = restart
        self._left_behind = left_behind

    def forward(self, *batch: Tensor) -> Tensor:
        self._restart()
        _Hidden.in_forward = True
        try:
            with self._left_behind.removed(), _KeepContiguous():
                return self._loss(*batch)
        finally:
            _Hidden.in_forward = False


class _Alone(nn.Module):
    """One block from its tensor inputs to its tensor outputs, those that hooks collect inside among them."""

    def __init__(self, call: BlockCall):
        super().__init__()
        self.model = call.candidate.module
        self._call = call

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        args, kwargs = self._call.arguments.fill(list(inputs))
        gradients = contextlib.nullcontext() if self._call.grad_enabled else torch.no_grad()
        casts, collects = autocast_as(self._call.autocast), collecting(self._call.collected)
        left_behind = LeftBehind(self.model)
        with left_behind.removed(), gradients, casts, _KeepContiguous(), collects as collected:
            result = type(self.model).forward(self.model, *args, **kwargs)
        return take_tensors((result, collected))[1]


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A model with its recorded block calls as `autopar::block` ops, whose `call` indexes the recording.

    Of a stretch of calls, `program` has the two ends alone.
    """

    program: ExportedProgram
    stretches: dict[int, Stretch]  # by the last call


def trace_outer(model: nn.Module, loss: Callable[..., Tensor], batch: list[Tensor], recording: Recording) -> Outer:
    """What a model does outside its blocks."""
    position = 0
    shortcut = Shortcut(())

    def restart() -> None:
        nonlocal position
        position = 0

    def replace(candidate: Candidate, arguments: Any) -> Any:
        nonlocal position
        index, position = position, position + 1
        call = recording.calls[index]
        template, tensors, _ = take_tensors(arguments)
        if call.candidate.fqn != candidate.fqn or template.leaves != call.arguments.leaves:
            raise CaptureError(f"{candidate.fqn}: it is called with other arguments each time that the model is "
                               "traced; remove what the forward keeps between calls")
        return call.answer(shortcut.answer(
            index, tensors, lambda inputs: list(_BLOCK(inputs, index))))

    folded = list({call.candidate.fqn: call.candidate for call in recording.calls}.values())
    whole = _Whole(model, loss, restart, LeftBehind(model, [candidate.module for candidate in folded]))
    _active_calls[:] = recording.calls
    try:
        with patched_forwards(folded, replace):
            if len({(param.dtype, param.device, param.requires_grad) for param in model.parameters()}) == 1:
                # Without what is inside the blocks, which the rest does not read, and without the middles of
                # stretches, this is several times faster.
                for shortcut in _shortcuts(recording):
                    with contextlib.suppress(Exception), _without_contents(folded):
                        program = _export(whole, batch)
                        if shortcut.holds(program, _BLOCK):
                            return Outer(program=program, stretches=shortcut.stretches)
            shortcut = Shortcut(())
            with explained(model):
                return Outer(program=_export(whole, batch), stretches={})
    finally:
        _active_calls.clear()


def _shortcuts(recording: Recording) -> list[Shortcut]:
    """What to try in turn: the middles of stretches left out, where there are any, and nothing left out."""
    found = Shortcut(recording.calls)
    return [found, Shortcut(())] if found else [Shortcut(())]


class _Hidden(dict[str, Any]):
    """An empty table in the place of a module's parameters or submodules. The model's forward may not ask for those."""

    in_forward = False

    def __init__(self, table: Mapping[str, Any]):
        super().__init__()
        self._names = frozenset(table)

    def _asked(self) -> None:
        if _Hidden.in_forward:
            raise LookupError("the forward looks into a block from outside")

    def items(self) -> Any:
        self._asked()
        return super().items()

    values = keys = __iter__ = items

    def __len__(self) -> int:
        self._asked()
        return 0

    def __contains__(self, name: object) -> bool:
        if name in self._names:
            self._asked()
        return False


@contextlib.contextmanager
def _without_contents(candidates: list[Candidate]) -> Iterator[None]:
    """While inside, the candidates have no parameters and no submodules.

    LookupError where the forward asks for them (as for all weights, where they are penalized).
    """
    saved = [(candidate.module.__dict__, name, candidate.module.__dict__[name])
             for candidate in candidates for name in ("_parameters", "_modules")]
    try:
        for attributes, name, table in saved:
            attributes[name] = _Hidden(table)
        yield
    finally:
        for attributes, name, table in saved:
            attributes[name] = table


def trace_block(call: BlockCall, mode: FakeTensorMode) -> ExportedProgram:
    """The ops of one recorded block call."""
    with mode:
        inputs = [meta.make() for meta in call.inputs]
    with explained(call.candidate.module, call.candidate.fqn):
        return _export(_Alone(call), inputs)


