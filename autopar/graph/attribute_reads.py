"""Which of a module's attributes a forward reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from autopar.graph.module_blocks import AttributeKey

_watched: dict[int, tuple[str, frozenset[str], set[AttributeKey]]] = {}
_made: dict[Any, Any] = {}


def _watching(cls: Any) -> Any:
    """A subclass of `cls`, equal in all but that reads of watched attributes are noted."""
    if cls in _made:
        return _made[cls]

    def read(self: nn.Module, name: str) -> Any:
        watched = _watched.get(id(self))
        if watched is not None and name in watched[1]:
            watched[2].add((watched[0], name))
        return cls.__getattribute__(self, name)

    members = {"__getattribute__": read, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    _made[cls] = type(cls)(cls.__name__, (cls,), members)
    return _made[cls]


@contextlib.contextmanager
def watch_reads(block: nn.Module, keys: Iterable[AttributeKey]) -> Iterator[set[AttributeKey]]:
    """Yields a set that fills with those `keys` (submodule path, attribute) that are read while inside.

    A read through `vars(module)` is not seen.
    """
    names: dict[str, set[str]] = {}
    for path, name in keys:
        names.setdefault(path, set()).add(name)
    seen: set[AttributeKey] = set()
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for path, attributes in names.items():
            module = block.get_submodule(path)
            swapped.append((module, type(module)))
            _watched[id(module)] = (path, frozenset(attributes), seen)
            module.__class__ = _watching(type(module))
        yield seen
    finally:
        for module, cls in swapped:
            module.__class__ = cls
            _watched.pop(id(module), None)
