"""How a model is called with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = "Mapping[str, Any] | tuple[Any, ...]"


def model_output(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], *, has_loss_fn: bool) -> Any:
    """What the model returns for a batch, a dict of keyword arguments or a sequence of positional ones.

    Where a loss function reads the batch too, it may hold more than the model takes: labels, say. They come last in a
    sequence. A model that takes any keyword (`**kwargs`) gets all of a dict.
    """
    if not isinstance(batch, Mapping):
        return model(*(batch[:_num_positional(model)] if has_loss_fn else batch))
    taken = inspect.signature(model.forward).parameters if has_loss_fn else {}
    if has_loss_fn and inspect.Parameter.VAR_KEYWORD not in [param.kind for param in taken.values()]:
        batch = {key: value for key, value in batch.items() if key in taken}
    return model(**batch)


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its tensors changed."""
    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: changed(value) for name, value in batch.items()}
    return tuple(changed(value) for value in batch)


def _num_positional(model: nn.Module) -> int | None:
    """How many positional arguments the model takes; None for any number."""
    kinds = [param.kind for param in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return len(kinds) - kinds.count(inspect.Parameter.KEYWORD_ONLY) - kinds.count(inspect.Parameter.VAR_KEYWORD)


def any_keywords(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Which of these keywords the model takes only since it takes any."""
    params = inspect.signature(model.forward).parameters
    takes_any = any(param.kind is param.VAR_KEYWORD for param in params.values())
    return [name for name in names if takes_any and not name.isdigit() and name not in params]


def perhaps_label(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any]) -> str | None:
    """The first optional parameter of the model that a sequence reaches: what it gets may be meant for the loss."""
    if isinstance(batch, Mapping):
        return None
    given = list(inspect.signature(model.forward).parameters.values())[:min(len(batch), _num_positional(model) or 0)]
    return next((param.name for param in given[1:] if param.default is not param.empty), None)
