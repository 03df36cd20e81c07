"""What Hugging Face's hooks collect beside a model's results: the logits of routers, for the loss that balances them.

A hook inside a block puts tensors into lists of the running model's. While a block is captured alone, and where a
recorded call stands for it, they are results of the block's instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

Collected = dict[str, list[Any]]
_KEPT_BY_THE_MODEL = "hidden_states"  # collected at the blocks' own borders, where hooks run as they are


def can_be_collected() -> bool:
    """Whether this release of transformers collects in the way that is known here."""
    return _active() is not None


def _active() -> Any:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    return _active_collector


def collected_names() -> tuple[str, ...]:
    """The names of the lists of the running model's."""
    return tuple(_lists())


def _lists() -> Collected:
    active = _active()
    found = None if active is None else active.get()
    return {
        name: own for name, own in (found or {}).items() if isinstance(own, list) and name != _KEPT_BY_THE_MODEL
    }


@contextlib.contextmanager
def taking_collected() -> Iterator[Collected]:
    """Yields lists of what is collected inside, once it is left; the running model has nothing of it."""
    lists = _lists()
    before = {name: len(own) for name, own in lists.items()}
    taken: Collected = {}
    yield taken
    for name, own in lists.items():
        taken[name] = own[before[name]:]
        del own[before[name]:]


def hand_on(taken: Collected) -> None:
    """Puts into the running model's lists what a block has collected."""
    lists = _lists()
    for name, own in taken.items():
        lists[name] += own


@contextlib.contextmanager
def collecting(names: tuple[str, ...]) -> Iterator[Collected]:
    """Yields lists of these names into which all is collected inside, where no model runs."""
    made: Collected = {name: [] for name in names}
    active = _active()
    if active is None or not names:
        yield made
        return
    token = active.set(made)
    try:
        yield made
    finally:
        active.reset(token)
