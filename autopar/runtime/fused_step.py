"""torch's fused optimizer steps: one kernel for many parameters, without temporaries."""

from __future__ import annotations

from torch.optim import Adam, AdamW, Optimizer


def prefer_fused(optimizer: Optimizer) -> bool:
    """Makes Adam and AdamW step fused where nobody said how they should; whether it did.

    torch's own default on a GPU (foreach) holds temporaries of the size of all stepped parameters at once.
    """
    if type(optimizer) not in (Adam, AdamW) or optimizer.defaults.get("differentiable"):
        return False
    groups = [group for group in optimizer.param_groups if group.get("fused") is None and group.get("foreach") is None]
    for group in groups:
        group["fused"] = True
    return bool(groups)
