"""Memory of the host beside a device's own."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_on_host(shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A tensor in host memory, unwritten. Called through this module, so that a dry run can tell what it makes."""
    return torch.empty(shape, dtype=dtype, pin_memory=pinned)
