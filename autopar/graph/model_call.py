"""How a model is called with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def model_output(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], *, has_loss_fn: bool) -> Any:
    """What the model returns for a batch, a dict of keyword arguments or a sequence of positional ones.

    Where a loss function reads the batch too, it may hold more than the model takes: labels, say. They come last in a
    sequence.
    """
    taken = inspect.signature(model.forward).parameters if has_loss_fn else {}
    kinds = [param.kind for param in taken.values()]
    if not isinstance(batch, Mapping):
        if has_loss_fn and inspect.Parameter.VAR_POSITIONAL not in kinds:
            batch = batch[: len(kinds) - kinds.count(inspect.Parameter.KEYWORD_ONLY)
                          - kinds.count(inspect.Parameter.VAR_KEYWORD)]
        return model(*batch)
    if has_loss_fn and inspect.Parameter.VAR_KEYWORD not in kinds:
        batch = {key: value for key, value in batch.items() if key in taken}
    return model(**batch)
