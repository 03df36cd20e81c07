"""torch's fused optimizer steps: one kernel for many parameters, without temporaries."""

from __future__ import annotations

from torch import Tensor, nn
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


def place_step_counts(optimizer: Optimizer, param: nn.Parameter) -> None:
    """Puts a parameter's step count where the optimizer keeps it: beside the parameter if it steps fused."""
    group = next((group for group in optimizer.param_groups if any(param is own for own in group["params"])), None)
    count = optimizer.state.get(param, {}).get("step")
    if group is None or not isinstance(count, Tensor):
        return
    beside = group.get("fused") or group.get("capturable")
    optimizer.state[param]["step"] = count.to(param.device if beside else "cpu")
