"""One op for several linears of one input: `autopar::linears`, whose backward adds nothing up.

As ops of their own, k linears of one input give k gradients of it, which autograd writes one by one and adds. Here each
product of the backward adds onto the last. The forward may besides be one product with the weights laid together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LINEARS_OP = "autopar.linears.default"


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor, joined: bool, num: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases = tensors[:num], tensors[num:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(data, *weights)
        ctx.num_biases = len(biases)
        if joined:
            out = F.linear(data, torch.cat(weights), torch.cat(biases) if biases else None)
            return tuple(out.split_with_sizes([weight.shape[0] for weight in weights], dim=-1))
        return tuple(F.linear(data, w, b) for w, b in zip(weights, biases or (None,) * num, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        data, *weights = ctx.saved_tensors
        needs_data, _, _, *needs = ctx.needs_input_grad
        rows = data.reshape(-1, data.shape[-1])
        of_data: Tensor | None = None
        of_weights: list[Tensor | None] = []
        of_biases: list[Tensor | None] = []
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            flat = None if grad is None else grad.reshape(-1, weight.shape[0])
            if flat is not None and needs_data:
                of_data = flat @ weight if of_data is None else of_data.addmm_(flat, weight)
            of_weights.append(flat.t() @ rows if flat is not None and needs[i] else None)
            if ctx.num_biases:
                of_biases.append(flat.sum(0) if flat is not None and needs[len(weights) + i] else None)
        return None if of_data is None else of_data.view(data.shape), None, None, *of_weights, *of_biases


def linears(data: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], joined: bool) -> list[Tensor]:
    """`F.linear(data, weight, bias)` for each weight and its bias (no biases at all: without).

    Shapes: data (..., k), weights (n_i, k), biases (n_i), results (..., n_i). `joined`: one product in the forward,
    with the weights laid together (a copy of them that lives as long as the product); the results then share their
    memory, and are not contiguous.
    """
    return list(_Linears.apply(data, joined, len(weights), *weights, *biases))  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linears(Tensor data, Tensor[] weights, Tensor[] biases, bool joined) -> Tensor[]")  # type: ignore[no-untyped-call]
_LIBRARY.impl("linears", linears, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
