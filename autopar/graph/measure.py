"""What one ATen call costs: FLOPs forward and backward, and what autograd keeps of it.

The call runs on fake tensors with gradients on. FLOPs are counted by torch's own formulas (torch.utils.flop_counter)
for the matrix products and convolutions that the call turns into, the backward's by running the backward. What
autograd keeps is what it hands to `saved_tensors_hooks`. Calls whose CPU program is not what an accelerator
runs are described by hand: attention, dropout, rms_norm; so are the experts, which torch does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The call's result and its cost. `saved` has tensors that share the storage of what is kept."""

    result: Any
    flops: float = 0.0
    backward_flops: float = 0.0
    saved: tuple[Tensor, ...] = ()
    extra_bytes: int = 0  # besides `saved`, where `saved` is listed by hand


def _convolution_backward(
    grad: Tensor, data: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: list[bool], **_: Any,
) -> float:
    """As many as the forward for each of data and weight; torch's own formula has each group see all channels."""
    positions = (data if transposed else grad).shape[2:].numel()
    return 2.0 * data.shape[0] * positions * weight.numel() * sum(output_mask[:2])


_FORMULAS: dict[Any, Callable[..., float]] = {
    **flop_registry, torch.ops.aten.convolution_backward: _convolution_backward,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the FLOPs of the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: float = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += float(formula(*args, **(kwargs or {}), out_val=result))
        return result


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def measure(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Measured:
    """Runs `target` on fake tensors (call it under their mode) and returns what it gives and costs."""
    by_hand = _BY_HAND.get(str(target))
    if by_hand is not None:
        return by_hand(*args, **kwargs)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    counter = _Counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = target(*args, **kwargs)
    backward = _backward_flops(target, args, kwargs) if counter.flops else 0.0
    return Measured(result=result, flops=counter.flops, backward_flops=backward, saved=tuple(saved))


def _backward_flops(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """FLOPs of the call's own backward, on fresh leaves so that nothing before it is counted."""
    leaves: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            leaf = value.detach().requires_grad_()
            leaves.append(leaf)
            return leaf
        return value

    args, kwargs = pytree.tree_map(fresh, (args, kwargs))
    if not leaves:
        return 0.0
    outputs = [out for out in pytree.tree_leaves(target(*args, **kwargs))
               if isinstance(out, Tensor) and out.requires_grad]
    if not outputs:
        return 0.0
    with _Counter() as counter:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)
    return float(counter.flops)


def _differentiable(result: Tensor, *inputs: Tensor | None) -> Tensor:
    needs = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return result.requires_grad_() if needs else result


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Measured:
    """A fused kernel (flash): keeps q, k, v, the mask, the output and one float32 log-sum-exp a query.

    FLOPs: two products forward, five backward (FlashAttention-2, Dao 2023, section 3); a causal call computes half.
    The output lies in memory as (batch, seq, head, dim), as the fused kernels leave it.
    """
    *batch, num_queries, dim = query.shape
    value_dim, num_keys = value.shape[-1], key.shape[-2]
    if len(batch) == 2:
        out = query.new_empty((batch[0], num_queries, batch[1], value_dim)).transpose(1, 2)
    else:
        out = query.new_empty((*batch, num_queries, value_dim))
    rows = 1
    for size in batch:
        rows *= size
    flops = 2.0 * rows * num_queries * num_keys * (dim + value_dim) * (0.5 if is_causal else 1.0)
    out = _differentiable(out, query, key, value, attn_mask)
    if not out.requires_grad:
        return Measured(result=out, flops=flops)
    kept = tuple(tensor for tensor in (query, key, value, attn_mask, out) if tensor is not None)
    return Measured(result=out, flops=flops, backward_flops=2.5 * flops, saved=kept, extra_bytes=4 * rows * num_queries)


def _dropout(data: Tensor, p: float, train: bool) -> Measured:
    """Keeps a mask of one byte an element, as the fused kernels do."""
    out = _differentiable(torch.empty_like(data, requires_grad=False), data)
    return Measured(result=out, extra_bytes=data.numel() if train and p > 0 and out.requires_grad else 0)


def _rms_norm(data: Tensor, normalized_shape: list[int], weight: Tensor | None = None,
              eps: float | None = None) -> Measured:
    """A fused kernel: keeps the input, the weight and one float32 reciprocal a row."""
    out = _differentiable(torch.empty_like(data, requires_grad=False), data, weight)
    if not out.requires_grad:
        return Measured(result=out)
    rows = data.numel()
    for size in normalized_shape:
        rows //= size
    kept = (data,) if weight is None else (data, weight)
    return Measured(result=out, saved=kept, extra_bytes=4 * rows)


def _grouped_product(data: Tensor, weight: Tensor, offs: Tensor) -> Measured:
    """Experts: each row of `data` (rows, k) meets one of the matrices in `weight` (experts, k, n)."""
    out = _differentiable(data.new_empty((data.shape[0], weight.shape[-1])), data, weight)
    flops = 2.0 * data.shape[0] * data.shape[1] * weight.shape[-1]
    if not out.requires_grad:
        return Measured(result=out, flops=flops)
    return Measured(result=out, flops=flops, backward_flops=flops * (data.requires_grad + weight.requires_grad),
                    saved=(data, weight, offs))


def _experts(hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
             down_bias: Tensor | None, transposed: bool, gate: str) -> Measured:
    """Experts as one op: every token meets k of them. Keeps its inputs and the first products.

    The backward makes two products of each of the forward's, and none of the forward's again.
    """
    columns = up.shape[2 if transposed else 1]
    choices = index.numel()
    flops = 2.0 * choices * (up[0].numel() + down[0].numel())
    out = _differentiable(torch.empty_like(hidden, requires_grad=False), hidden, weights, up, down)
    kept = hidden.new_empty((choices, columns), requires_grad=False)
    if not out.requires_grad:
        return Measured(result=(out, kept), flops=flops)
    saved = tuple(tensor for tensor in (hidden, index, weights, up, down, up_bias, down_bias) if tensor is not None)
    return Measured(result=(out, kept), flops=flops, backward_flops=2 * flops, saved=saved,
                    extra_bytes=kept.numel() * kept.element_size())


_BY_HAND: dict[str, Callable[..., Measured]] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.dropout.default": _dropout,
    "aten.rms_norm.default": _rms_norm,
    "autopar.experts.default": _experts,
    "transformers.grouped_mm_fallback.default": _grouped_product,
}
