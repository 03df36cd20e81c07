"""Attention of some queries to some of their keys, as a piece that can be merged with others.

The one place that calls torch's attention kernels with their log-sums: flash attention's on a GPU and on a CPU, by the
names that they have in torch 2.11 to 2.13; elsewhere the scores are written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.runtime.causal import can_use_flash

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The attention (..., heads, q, e) of these keys alone, and the logarithms of the rows' sums (..., heads, q).

    `is_causal` is for as many queries as keys, the first with the first. Keys may have fewer heads, each shared by
    neighbouring queries' heads.
    """
    if _is_gpu_flash(query, key, value):
        out, log_sum, *_ = _flash(query, key, value, 0.0, is_causal, False, scale=scale)
    elif _is_cpu_flash(query, key, value):
        out, log_sum = _cpu_flash(query, key, value, 0.0, is_causal, scale=scale)
    else:
        heads = (query.shape[-3], key.shape[-3]) if query.dim() > 2 else (1, 1)
        scores = _scores(_grouped(query, heads), _grouped(key, heads, shared=True), is_causal, scale)
        log_sum = scores.logsumexp(dim=-1)
        weights = (scores - log_sum.unsqueeze(-1)).exp()
        out = (weights @ _grouped(value, heads, shared=True).to(weights.dtype)).to(query.dtype)
        out, log_sum = out.view(*query.shape[:-1], value.shape[-1]), log_sum.view(query.shape[:-1])
    return out, log_sum


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; `out`, its `grad` and `log_sum` are those of all keys of the rows."""
    if _is_gpu_flash(query, key, value):
        random = torch.zeros(2, dtype=torch.int64, device=query.device)  # read with dropout alone
        grads = _flash_backward(
            grad, query, key, value, out, log_sum.contiguous(), None, None, query.shape[-2], key.shape[-2], 0.0,
            is_causal, random, random, scale=scale,
        )
        return grads[0], grads[1], grads[2]
    if _is_cpu_flash(query, key, value):
        grads = _cpu_flash_backward(
            grad, query, key, value, out, log_sum.contiguous(), 0.0, is_causal, scale=scale
        )
        return grads[0], grads[1], grads[2]
    heads = (query.shape[-3], key.shape[-3]) if query.dim() > 2 else (1, 1)
    q, g, o = (_grouped(x, heads) for x in (query, grad, out))
    k, v = (_grouped(x, heads, shared=True) for x in (key, value))
    scores = _scores(q, k, is_causal, scale)
    weights = (scores - _grouped(log_sum.unsqueeze(-1), heads)).exp()
    g, o, v = (x.to(weights.dtype) for x in (g, o, v))
    slopes = weights * (g @ v.transpose(-2, -1) - (g * o).sum(dim=-1, keepdim=True)) * scale
    grad_query = (slopes @ k.to(slopes.dtype)).to(query.dtype).view(query.shape)
    grad_key = slopes.transpose(-2, -1) @ q.to(slopes.dtype)
    grad_value = weights.transpose(-2, -1) @ g
    if heads[0] != heads[1]:
        grad_key, grad_value = grad_key.sum(dim=-3), grad_value.sum(dim=-3)
    return grad_query, grad_key.to(key.dtype).view(key.shape), grad_value.to(value.dtype).view(value.shape)


def _is_gpu_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return can_use_flash(query, key, value, 0.0, query.dim() > 2 and query.shape[-3] != key.shape[-3])


def _is_cpu_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.dim() == 4 and query.shape[-1] == value.shape[-1]


def _grouped(x: Tensor, heads: tuple[int, int], *, shared: bool = False) -> Tensor:
    """With fewer heads of keys than of queries: heads as (heads of keys, those that share one)."""
    if heads[0] == heads[1]:
        return x
    if shared:
        return x.unsqueeze(-3)
    return x.reshape(*x.shape[:-3], heads[1], heads[0] // heads[1], *x.shape[-2:])


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """In float32 at least."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores
