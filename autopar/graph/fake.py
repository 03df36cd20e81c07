"""Fake tensors: shapes without storage. The one file that touches torch's private FakeTensorMode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

DATA_DEPENDENT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def new_fake_mode() -> FakeTensorMode:
    """A mode whose tensors have static shapes and in which reading a tensor's value is an error."""
    return FakeTensorMode(
        shape_env=ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False, tracked_fakes=[]),
        allow_non_fake_inputs=True,
    )


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def fake_device(tensor: Tensor) -> torch.device:
    """The device that a fake stand-in of `tensor` claims: its own, or the CPU for meta tensors."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def fake_like(mode: FakeTensorMode, tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A fake tensor of the same dtype, layout and requires_grad; `shape` replaces the shape (then contiguous)."""
    device = fake_device(tensor)
    with mode:
        if shape is None or shape == tuple(tensor.shape):
            fake = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
        else:
            fake = torch.empty(shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


class FakedModel:
    """Puts fake tensors in the place of a model's parameters and buffers, and everything back on `restore`.

    `restore` also undoes whatever the forward left on the modules: caches, patched methods, swapped classes, flags.
    No weight is copied. `fakes` maps the id of each fake to the canonical (first) FQN of its tensor.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode):
        self._saved = [
            (module, type(module), dict(module.__dict__), dict(module._parameters), dict(module._buffers),
             dict(module._modules), set(module._non_persistent_buffers_set))
            for module in model.modules()
        ]
        stand_in: dict[int, Tensor] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in stand_in:
                            stand_in[id(tensor)] = fake_like(mode, tensor)
                        table[name] = stand_in[id(tensor)]  # type: ignore[assignment]

    def restore(self) -> None:
        for module, cls, attributes, parameters, buffers, modules, non_persistent in self._saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, saved in ((module._parameters, parameters), (module._buffers, buffers),
                                 (module._modules, modules)):
                table.clear()  # type: ignore[attr-defined]
                table.update(saved)  # type: ignore[attr-defined]
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)


@contextlib.contextmanager
def faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """While inside, the model's parameters and buffers are fake; afterwards the model is as it was."""
    state = FakedModel(model, mode)
    try:
        yield
    finally:
        state.restore()
