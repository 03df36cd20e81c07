"""The backward in two parts, first the gradients of a stage's inputs (I), later those of its weights (W).

The one place that calls `stage_backward_input` and `stage_backward_weight` of torch.distributed.pipelining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

Pending = list[dict[str, Any]]  # what W needs of its I: torch's own form


def backward_input(
    roots: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> Pending:
    """Adds the gradients of `inputs` to them, and gives what `backward_weight` needs. `roots` are no views."""
    _, pending = stage_backward_input(list(roots), list(gradients), list(inputs), iter(weights))  # type: ignore[arg-type] # any leaf will do
    return pending


def backward_weight(weights: Sequence[Tensor], pending: Pending) -> None:
    """Adds the gradients of `weights` to them."""
    stage_backward_weight(iter(weights), pending)  # type: ignore[arg-type]
