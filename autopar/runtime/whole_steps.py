"""The step of an optimizer that looks at whole parameters, where ranks hold parts of them.

Each parameter and its gradient are gathered, stepped whole on every rank that has a part, and cut again, one after the
other. The optimizer's state is of whole parameters and on all of these ranks: little of Adafactor's, as much as the
parameters themselves of Muon's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autopar.runtime.groups import Groups
from autopar.runtime.layout import ParamLayout
from autopar.runtime.parts import gathered, laid_out

# Each parameter's step follows from that parameter alone, but all of it (Rprop's from each element, but torch writes
# into its gradients by index, which DTensors do not support).
WHOLE = frozenset(("Adafactor", "Muon", "Rprop"))


class WholeSteps:
    """Steps the optimizer of these parameters, which stand in one order on all ranks of a stage."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, held: Sequence[tuple[ParamLayout, nn.Parameter]], groups: Groups
    ) -> None:
        self.optimizer, self.groups = optimizer, groups
        self.held = list({id(param): (layout, param) for layout, param in held}.values())

    @torch.no_grad()
    def step(self) -> None:
        """One step; hooks that a user registers on the optimizer's step run once a parameter."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group_of = {id(param): group for group in groups for param in group["params"]}
        for layout, param in self.held:
            if id(param) not in group_of or param.grad is None:
                continue
            whole = nn.Parameter(gathered(param.detach(), layout, self.groups))
            whole.grad = gathered(param.grad.detach(), layout, self.groups)
            if param in optimizer.state:
                optimizer.state[whole] = optimizer.state.pop(param)
            optimizer.param_groups = [{**group_of[id(param)], "params": [whole]}]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
                if whole in optimizer.state:
                    optimizer.state[param] = optimizer.state.pop(whole)
            param.copy_(laid_out(whole.detach(), layout, param, self.groups))
