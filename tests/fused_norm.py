"""aten.rms_norm as accelerators run it: one kernel, which keeps its input, its weight and a float32 number a row.

On a CPU torch makes several ops of it, which keep more; what is predicted is the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _norm(data: Tensor, dims: list[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = data if data.dtype == torch.float64 else data.float()
    scale = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = (wide * scale).to(data.dtype)
    return out if weight is None else out * weight, scale


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor, dims: list[int], weight: Tensor | None, eps: float) -> Tensor:
        out, scale = _norm(data, dims, weight, eps)
        ctx.save_for_backward(data, weight, scale.float())
        ctx.dims, ctx.eps = dims, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        data, weight, _ = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in (data, weight) if value is not None]
            out, _ = _norm(leaves[0], ctx.dims, leaves[1] if weight is not None else None, ctx.eps)
        found = torch.autograd.grad(out, leaves, grads[0])
        return found[0], None, found[1] if weight is not None else None, None


@contextmanager
def one_kernel() -> Iterator[None]:
    """Inside, rms_norm is one kernel on the CPU too."""

    def rms_norm(data: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        dims = list(range(data.dim() - len(shape), data.dim()))
        found: Tensor = _Kernel.apply(data, dims, weight, torch.finfo(data.dtype).eps if eps is None else eps)
        return found

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("rms_norm", rms_norm, "AutogradCPU")
        yield
    finally:
        library._destroy()
