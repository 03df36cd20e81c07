"""How a model is called with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def model_output(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], *, has_loss_fn: bool) -> Any:
    """What the model returns for a batch, a dict of keyword arguments or a sequence of positional ones.

    Where a loss function reads the batch too, a dict may hold more than the model takes: labels, say.
    """
    if not isinstance(batch, Mapping):
        return model(*batch)
    if has_loss_fn:
        taken = inspect.signature(model.forward).parameters
        if not any(param.kind is inspect.Parameter.VAR_KEYWORD for param in taken.values()):
            batch = {key: value for key, value in batch.items() if key in taken}
    return model(**batch)
