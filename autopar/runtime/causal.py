"""Causal attention of a part of the queries: the one place that calls torch's flash attention by its own name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

_attention = torch.ops.aten.scaled_dot_product_attention.default
_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_FLASH_HEAD_MULTIPLE = 8  # torch pads other head dims before it calls the kernel; here they take the mask


def attend_from(
    query: Tensor, start: int, key: Tensor, value: Tensor, dropout_p: float = 0.0, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of queries (..., rows, d), which are rows `start` to `start + rows` of all, to keys (..., q, d).

    Only the keys up to the last of these rows are read. The flash kernel aligns its causal mask to the lower right of
    (rows, start + rows), which `scaled_dot_product_attention` cannot say: it is called directly where torch says that
    it can run. Elsewhere a mask of (rows, start + rows) booleans is made.
    """
    rows = query.shape[-2]
    reach = start + rows
    key, value = key[..., :reach, :], value[..., :reach, :]
    keywords: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if start == 0:
        whole: Tensor = _attention(query, key, value, None, dropout_p, True, **keywords)
        return whole
    if can_use_flash(query, key, value, dropout_p, enable_gqa):
        return _flash(query, key, value, dropout_p, True, False, scale=scale)[0]  # type: ignore[no-any-return]
    mask = torch.ones(rows, reach, dtype=torch.bool, device=query.device).tril(diagonal=start)
    masked: Tensor = _attention(query, key, value, mask, dropout_p, False, **keywords)
    return masked


def can_use_flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool) -> bool:
    """Whether the flash kernel of GPUs takes these tensors."""
    if not query.is_cuda or query.dim() != 4 or query.shape[-1] % _FLASH_HEAD_MULTIPLE:
        return False
    if query.shape[-1] != value.shape[-1]:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, dropout_p, False, enable_gqa))
