"""Modules of libraries whose code runs when it is needed, and not when they are imported.

A library imports much that one use of it never needs. `lazily` names modules of that kind: from then on an import of
one gives the module, empty, and its code runs in it at the first name that is asked of it. From then on it is what it
would have been.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from inspect import CO_OPTIMIZED
from types import ModuleType
from typing import Any

_IMPORTLIB = ("importlib._bootstrap", "_frozen_importlib")


def lazily(
    modules: Mapping[str, tuple[str, ...] | None], askers: tuple[str, ...], wakers: tuple[str, ...] = ()
) -> None:
    """Lets `modules` be lazy from here on, those that have not been imported.

    The names of each are functions and classes that modules of the libraries `askers` take out of it as they are
    imported themselves, to use them later: such a module gets stand-ins, whose first use runs the code and puts the
    real ones in their place. Any other name, and any other asker, runs the code at once. A package's code runs before
    that of its modules, save of those that have None for their names: they are as ever, and need no package's code.
    An import of one of `wakers`, which need what the lazy ones register, runs the code of all that have been imported.
    """
    _FINDER.known |= {name: (names, askers) for name, names in modules.items() if name not in sys.modules}
    _FINDER.wakers |= set(wakers)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Lazy(ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # the import system asks each module for it
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if f"{self.__name__}.{name}" in _FINDER.known:
            return import_module(f"{self.__name__}.{name}")
        names, askers = _FINDER.known[self.__name__]
        if names is not None and name in names and _is_imported_by(askers):
            return _StandIn(self, name)
        _run(self)
        return getattr(self, name)


_LOCK = threading.RLock()


def _run(module: ModuleType) -> None:
    """Runs the code of a lazy module in it, after that of its packages."""
    with _LOCK:
        package = sys.modules.get(module.__name__.rpartition(".")[0])
        if isinstance(package, _Lazy):
            _run(package)
        if not isinstance(module, _Lazy):  # it has run
            return
        spec: Any = module.__spec__
        lazy = spec.loader
        module.__class__ = ModuleType  # type: ignore[assignment]
        module.__loader__ = spec.loader = lazy.real
        try:
            spec.loader.exec_module(module)
        except BaseException:
            module.__class__, module.__loader__, spec.loader = _Lazy, lazy, lazy
            raise
        _give(module)


def _is_imported_by(askers: tuple[str, ...]) -> bool:
    """Whether what asks for a name is a module of these libraries or a class in it, and no function."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _IMPORTLIB:
        frame = frame.f_back
    library = str(frame.f_globals.get("__name__")).partition(".")[0]
    return library in askers and not frame.f_code.co_flags & CO_OPTIMIZED


class _StandIn:
    """A function or class of a module whose code has not run."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def _real(self) -> Any:
        _run(self._module)
        return getattr(self._module, self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self._real())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return self._real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real()


def _give(module: ModuleType) -> None:
    """Puts what the module has in the place of its stand-ins in other modules."""
    for asker in list(sys.modules.values()):
        names = getattr(asker, "__dict__", {})
        for name, value in list(names.items()):
            if type(value) is _StandIn and value._module is module:
                names[name] = value._real()


class _Loader:
    """Loads a module lazily; `real` is the loader that runs its code."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.real.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Lazy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _Loaded:
    """Loads a module that its package's code has imported while it was being found: it is the one that is there."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def spec(self) -> ModuleSpec:
        """The module's own for now, since the import system takes that one."""
        self._module.__spec__ = spec = ModuleSpec(self._module.__name__, self)  # type: ignore[arg-type]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Finder:
    """Finds the lazy modules, and runs the code of a lazy package before that of a module of it."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {}
        self.wakers: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in self.wakers:
            for lazy in [module for module in list(sys.modules.values()) if isinstance(module, _Lazy)]:
                _run(lazy)
        if name not in self.known:
            package = sys.modules.get(name.rpartition(".")[0])
            if not isinstance(package, _Lazy):
                return None
            _run(package)
            return _Loaded(sys.modules[name]).spec() if name in sys.modules else None
        if self.known[name][0] is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                    return spec
        return None


_FINDER = _Finder()
