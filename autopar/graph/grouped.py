"""Products of rows that lie sorted in groups, each group with a matrix of its own.

One kernel where torch has one (torch.nn.functional.grouped_mm: bfloat16, widths that are multiples of 16 bytes), else
a product a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Spans = Sequence[tuple[int, int, int]]  # (group, first row, last row + 1) of the groups that have rows
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
_ALIGNED = 8  # elements of two bytes
_LEAST_CAPABILITY = (8, 0)


def _in_one_kernel(rows: Tensor, width: int) -> bool:
    if _grouped_mm is None or rows.dtype is not torch.bfloat16 or rows.shape[-1] % _ALIGNED or width % _ALIGNED:
        return False
    return len(rows) > 0 and (not rows.is_cuda or torch.cuda.get_device_capability(rows.device) >= _LEAST_CAPABILITY)


def _ends(spans: Spans, num_groups: int, device: torch.device) -> Tensor:
    """The last row + 1 of every group."""
    ends, end = [], 0
    known = {group: last for group, _, last in spans}
    for group in range(num_groups):
        end = known.get(group, end)
        ends.append(end)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def grouped_product(rows: Tensor, weight: Tensor, spans: Spans) -> Tensor:
    """Each row (rows, in) with its group's matrix of `weight` (groups, in, out)."""
    if _in_one_kernel(rows, weight.shape[-1]):
        one: Tensor = _grouped_mm(rows, weight, offs=_ends(spans, len(weight), rows.device))
        return one
    out = rows.new_empty((len(rows), weight.shape[-1]))
    for group, start, end in spans:
        torch.mm(rows[start:end], weight[group], out=out[start:end])
    return out


def grouped_weight_gradient(rows: Tensor, grads: Tensor, weight: Tensor, spans: Spans) -> Tensor:
    """The gradient of `weight` in `grouped_product(rows, weight)`, laid out in memory as the weight is."""
    if len(spans) == len(weight) and _in_one_kernel(rows, weight.shape[-1]):  # a group without rows takes the loop
        ends = _ends(spans, len(weight), rows.device)
        if weight.stride(-1) == 1:
            one: Tensor = _grouped_mm(rows.t(), grads, offs=ends)
            return one
        swapped: Tensor = _grouped_mm(grads.t(), rows, offs=ends)
        return swapped.transpose(1, 2)
    out = torch.zeros_like(weight)
    for group, start, end in spans:
        out[group].add_(rows[start:end].t() @ grads[start:end])
    return out
