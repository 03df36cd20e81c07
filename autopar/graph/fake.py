"""Fake tensors: shapes without storage. The one file that touches torch's private FakeTensorMode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

DATA_DEPENDENT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def new_fake_mode() -> FakeTensorMode:
    """A mode whose tensors have static shapes and in which reading a tensor's value is an error."""
    return FakeTensorMode(
        shape_env=ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False, tracked_fakes=[]),
        allow_non_fake_inputs=True,
    )


@contextlib.contextmanager
def outside_other_modes() -> Iterator[None]:
    """While inside, no dispatch mode of the caller's (a FakeTensorMode, say) is on."""
    with _disable_current_modes():
        yield


@contextlib.contextmanager
def traced_under(mode: FakeTensorMode) -> Iterator[None]:
    """While inside, `mode` is on and code that asks whether it is being exported is told so."""
    with mode, _compiling_state_context():
        yield


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def fake_device(tensor: Tensor) -> torch.device:
    """The device that a fake stand-in of `tensor` claims: its own, or the CPU for meta tensors."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def fake_like(mode: FakeTensorMode, tensor: Tensor, shape: tuple[int, ...] | None = None,
              float_dtype: torch.dtype | None = None) -> Tensor:
    """A fake tensor of the same dtype, layout and requires_grad.

    `shape` replaces the shape (then contiguous); `float_dtype` replaces the dtype of floating-point tensors.
    """
    dtype = float_dtype if float_dtype is not None and tensor.is_floating_point() else tensor.dtype
    with outside_other_modes():
        if shape is None or shape == tuple(tensor.shape):
            meta = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=dtype, device="meta")
        else:
            meta = torch.empty(shape, dtype=dtype, device="meta")
    fake: Tensor = FakeTensor(mode, meta, fake_device(tensor))  # a factory's call under the mode takes ten times longer
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True  # what nn.Parameter marks tensors of other classes with, after a detach under the mode
    return fake.requires_grad_(tensor.requires_grad)


def untraced_like(fake: Tensor) -> Tensor:
    """Another fake tensor like this one, of which a tracer that is on learns nothing."""
    assert isinstance(fake, FakeTensor)
    return fake_like(fake.fake_mode, fake)


class FakedModel:
    """Puts fake tensors in the place of a model's parameters and buffers, and everything back on `restore`.

    `restore` also undoes whatever the forward left on the modules: caches, patched methods, swapped classes, flags.
    No weight is copied. `float_dtype` is the dtype that floating-point parameters (not buffers) claim.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode, float_dtype: torch.dtype | None = None):
        self._saved = [
            (module, type(module), dict(module.__dict__), dict(module._parameters), dict(module._buffers),
             dict(module._modules), set(module._non_persistent_buffers_set))
            for module in model.modules()
        ]
        stand_in: dict[int, Tensor] = {}
        for module in model.modules():
            for table, dtype in ((module._parameters, float_dtype), (module._buffers, None)):
                for name, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in stand_in:
                            stand_in[id(tensor)] = fake_like(mode, tensor, float_dtype=dtype)
                        table[name] = stand_in[id(tensor)]  # type: ignore[assignment]

    def restore(self) -> None:
        for module, cls, attributes, parameters, buffers, modules, non_persistent in self._saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            tables: list[tuple[Any, Any]] = [(module._parameters, parameters), (module._buffers, buffers),
                                             (module._modules, modules)]
            for table, saved in tables:
                table.clear()
                table.update(saved)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)


@contextlib.contextmanager
def faked(model: nn.Module, mode: FakeTensorMode, float_dtype: torch.dtype | None = None) -> Iterator[None]:
    """While inside, the model's parameters and buffers are fake; afterwards the model is as it was."""
    state = FakedModel(model, mode, float_dtype)
    try:
        yield
    finally:
        state.restore()


class _RealTensor(Tensor):
    """A tensor that keeps its values under a fake mode, and so do tensors made from it alone."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run: Any = super().__torch_function__
        if any(is_fake(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            return run(func, types, args, kwargs)
        with outside_other_modes():
            return run(func, types, args, kwargs)


def is_in_fake_mode() -> bool:
    """Whether tensors that are made now are fake."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@contextlib.contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """While inside, attributes (owner, name) have these values."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """While inside, under a fake mode, tensors are made on the meta device, as transformers makes models to be loaded.

    That is several times faster than fake tensors. What `torch.nn.init` has for the values of parameters does nothing.
    `torch.linspace` gives real numbers unless a device is named.
    """
    if not is_in_fake_mode():
        yield
        return
    linspace = torch.linspace

    def real_linspace(*args: Any, **kwargs: Any) -> Tensor:
        return linspace(*args, **{"device": "cpu", **kwargs})

    initializers = [(nn.init, name, _unless_meta(function)) for name, function in vars(nn.init).items()
                    if name.endswith("_") and not name.startswith("_")]
    with outside_other_modes(), torch.device("meta"), _replaced((torch, "linspace", real_linspace), *initializers):
        yield


def _unless_meta(initialize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What gives a tensor its first values, but leaves one alone that has none."""
    def initialized(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if tensor.is_meta else initialize(tensor, *args, **kwargs)

    return initialized


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """While inside, torch's transformer modules apply the masks that they are given, and do not ask if one is causal.

    That asks for the mask's values, to take the same result from another kernel.
    """
    from torch.nn.modules import transformer

    def told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    if not hasattr(transformer, "_detect_is_causal_mask"):
        yield
        return
    with _replaced((transformer, "_detect_is_causal_mask", told)):
        yield


def _converted() -> Any:
    """An nn.Module._apply (what `to`, `float` and `bfloat16` do) for fake parameters, which torch's cannot exchange.

    Modules that shared a parameter share the new one.
    """
    from torch.nn import Parameter

    new: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the old ones are kept, so that no other gets their ids

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for module in self.children() if recurse else ():
            module._apply(fn)  # type: ignore[no-untyped-call]
        for name, param in self._parameters.items():
            if param is None:
                continue
            with torch.no_grad():
                applied = fn(param)
            if applied is not param:
                fresh = Parameter(applied, requires_grad=param.requires_grad)
                self._parameters[name] = new.setdefault(id(param), (param, fresh))[1]  # type: ignore[assignment]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    return apply


@contextlib.contextmanager
def values_not_needed() -> Iterator[None]:
    """While inside, under a fake mode, building a model does not ask fake tensors for values, and may convert it.

    `trunc_normal_`, which resamples, is left out. `torch.linspace` on the CPU gives real numbers: models read the rate
    of each layer from it.
    """
    from torch.nn import init

    if not is_in_fake_mode():
        yield
        return
    linspace = torch.linspace

    def real_linspace(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return linspace(*args, **kwargs)
        with outside_other_modes():
            return linspace(*args, **kwargs).as_subclass(_RealTensor)

    replaced: list[tuple[Any, str, Any]] = [(torch, "linspace", real_linspace), (nn.Module, "_apply", _converted())]
    if hasattr(init, "_no_grad_trunc_normal_"):
        replaced.append((init, "_no_grad_trunc_normal_", lambda tensor, *args, **kwargs: tensor))
    with _replaced(*replaced):
        yield
