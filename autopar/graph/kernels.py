"""Ops of this project's own that keep less for the backward than the calls they stand for.

`autopar::gated` is the product of a gate's activation and a second tensor: a SwiGLU or GEGLU without its products. It
keeps its two inputs and computes the activation again in the backward. `autopar::cross_entropy` takes logits of any
floating dtype and computes in float32: it keeps one float32 tensor of their size, and the gradient is made in their own
dtype, some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GATED_OP = "autopar.gated.default"
CROSS_ENTROPY_OP = "autopar.cross_entropy.default"
KERNELS = (GATED_OP, CROSS_ENTROPY_OP)
CHUNK_NUMEL = 1 << 24  # of the wide temporaries of a gradient: 64 MiB, enough to fill any device with work
MEAN, SUM = 1, 2  # aten's numbers for the reduction of a loss
# The activations that a gate may have: the aten call, and its name here.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _activation(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        found: Tensor = torch.ops.aten.silu_backward(grad, gate)
    elif activation == "relu":
        found = torch.ops.aten.threshold_backward(grad, gate, 0)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        found = torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activation(gate, activation) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        of_up = grad * _activation(gate, ctx.activation) if ctx.needs_input_grad[1] else None
        of_gate = _activation_backward(grad * up, gate, ctx.activation) if ctx.needs_input_grad[0] else None
        return of_gate, of_up, None


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`, for tensors of one shape and dtype; `activation` is one of ACTIVATIONS."""
    return _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call, no-any-return]


def logits_gradient(
    probabilities: Tensor, place: Tensor, scale: Tensor, picked: Tensor, dtype: torch.dtype, *, is_log: bool = False
) -> Tensor:
    """`probabilities * scale`, less `picked` at each row's `place`, in `dtype`: the gradient of a loss's logits.

    Shapes: (rows, classes), and (rows, 1) for `place`, `scale` and `picked`. Wide temporaries are of some rows alone.
    """
    grad = torch.empty_like(probabilities, dtype=dtype)
    num_rows = max(1, CHUNK_NUMEL // max(1, probabilities.shape[-1]))
    for first in range(0, probabilities.shape[0], num_rows):
        rows = slice(first, first + num_rows)
        wide = probabilities[rows].exp().mul_(scale[rows]) if is_log else probabilities[rows] * scale[rows]
        grad[rows] = wide.scatter_add_(-1, place[rows], -picked[rows])
    return grad


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row; its log-probabilities are kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kept = torch.log_softmax(logits, dim=-1, dtype=wide)
        ignored = target == ignore_index
        place = target.masked_fill(ignored, 0).unsqueeze(-1)
        losses = -kept.gather(-1, place).squeeze(-1)
        ctx.save_for_backward(kept, place, ignored)
        ctx.dtype = logits.dtype
        return losses.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, place, ignored = ctx.saved_tensors
        scale = grads[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return logits_gradient(kept, place, scale, scale, ctx.dtype, is_log=True), None, None


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits (rows, classes) and class numbers (rows), in float32 (float64 for float64 logits).

    The arguments are those of `aten::cross_entropy_loss`; class weights and label smoothing are not for this op.
    """
    assert weight is None and label_smoothing == 0.0, "class weights and label smoothing are left to aten's op"
    losses: Tensor = _CrossEntropy.apply(logits, target, ignore_index)  # type: ignore[no-untyped-call]
    if reduction == MEAN:
        return losses.sum() / (target != ignore_index).sum()
    return losses.sum() if reduction == SUM else losses


_LIBRARY = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("gated(Tensor gate, Tensor up, str activation) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gated", gated, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "cross_entropy(Tensor self, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
    "float label_smoothing=0.0) -> Tensor"
)
_LIBRARY.impl("cross_entropy", cross_entropy, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
