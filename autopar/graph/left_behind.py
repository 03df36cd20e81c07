"""What a forward leaves on the model's modules: caches, masks, counters. Every trace starts without them.

A cache that a trace finds would be a tensor of another trace; what fills it would be missing from the ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_TABLES = ("_parameters", "_buffers", "_modules")


class LeftBehind:
    """What a forward of `model` leaves on its modules; of those in `without`, and what is inside, nothing is known.

    `replaced` has the names of buffers in whose place a forward has put others, `counted` those of numbers that it has
    changed, and `kept` those of attributes that hold tensors which they did not hold before.
    """

    def __init__(self, model: nn.Module, without: Iterable[nn.Module] = (), name: str = "") -> None:
        self._modules = dict(_modules(model, set(map(id, without)), name))
        self.replaced: dict[str, None] = {}
        self.counted: dict[str, None] = {}
        self.kept: dict[str, None] = {}

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Afterwards the modules' attributes, tables, and lists and dicts among these, are as they were before."""
        states = [(name, module, _State(module)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for name, module, state in states:
                prefix = f"{name}." if name else ""
                self.replaced |= {prefix + buffer: None for buffer in state.replaced(module)}
                self.counted |= {prefix + number: None for number in state.counted(module)}
                self.kept |= {prefix + attribute: None for attribute in state.kept(module)}
                state.restore(module)


def _modules(module: nn.Module, seen: set[int], name: str) -> Iterator[tuple[str, nn.Module]]:
    if id(module) not in seen:
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from _modules(child, seen, f"{name}.{child_name}" if name else child_name)


class _State:
    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(module.__dict__)
        # Tables of another kind are empty while the outside of blocks is traced.
        self.containers = [(value, _copy(value)) for name, value in self.attributes.items()
                           if isinstance(value, (dict, list, set)) and (type(value) is dict or name not in _TABLES)]

    def replaced(self, module: nn.Module) -> Iterator[str]:
        """The names of the buffers that are others now."""
        saved: Any = next((saved for table, saved in self.containers if table is self.attributes["_buffers"]), {})
        now = module.__dict__["_buffers"]
        return (name for name, buffer in saved.items() if buffer is not None and now.get(name) is not buffer)

    def counted(self, module: nn.Module) -> Iterator[str]:
        """The names of the numbers that are others now."""
        numbers = {name: value for name, value in self.attributes.items() if type(value) in (int, float)}
        now = {name: module.__dict__.get(name) for name in numbers}
        return (
            name for name, value in numbers.items()
            if now[name] is not value and not isinstance(now[name], Tensor) and now[name] != value  # NaN is not NaN
        )

    def kept(self, module: nn.Module) -> Iterator[str]:
        """The names of the attributes that hold other tensors now, themselves or in lists, dicts and the like."""
        copies = {id(value): saved for value, saved in self.containers}
        for name, value in module.__dict__.items():
            before = self.attributes.get(name)
            known = set(map(id, tensors_in(name, copies.get(id(before), before))))
            if any(id(tensor) not in known for tensor in tensors_in(name, value)):
                yield name

    def restore(self, module: nn.Module) -> None:
        module.__dict__.clear()
        module.__dict__.update(self.attributes)
        for value, saved in self.containers:
            _refill(value, saved)


def tensors_in(name: str, value: Any) -> list[Tensor]:
    """The tensors in a module's attribute of this name; none of its parameters, buffers and submodules."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (dict, list, set, tuple)) or not value or name in _TABLES:
        return []
    leaves = value if isinstance(value, set) else pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)


def _refill(value: Any, saved: Any) -> None:
    """Puts back what it held; what holds that still is left alone, as it may refuse changes (a frozen dict)."""
    if isinstance(value, list):
        if list(map(id, value)) != list(map(id, saved)):
            value[:] = saved
    elif _ids(value) != _ids(saved):
        value.clear()
        value.update(saved)


def _ids(value: Any) -> list[tuple[int, int]] | set[int]:
    """What it holds, by identity."""
    if isinstance(value, dict):
        return [(id(key), id(item)) for key, item in value.items()]
    return set(map(id, value))
