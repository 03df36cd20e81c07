"""transformers without the list of all its models, which takes longer to make than most of the models.

The own code of the packages `transformers` and `transformers.models` reads the thousands of files of all models, to
know in which of them each public name is. Their modules do without. `lean_transformers` puts packages in their place
whose own code runs only when they are asked for a name that is none of their modules.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package whose modules can be imported; its own code runs when it is asked for another name."""

    _whole: ModuleType | None = None  # the package after its own code

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__package__, self.__path__ = spec.name, spec.submodule_search_locations or []

    def __getattr__(self, name: str) -> Any:
        if self._whole is not None:
            return getattr(self._whole, name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return import_module(f"{self.__name__}.{name}")
        return getattr(self._run(), name)

    def _run(self) -> ModuleType:
        """Runs the package's own code, which may put another module in the package's place."""
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self._whole = sys.modules[self.__name__] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(self._whole)
        except BaseException:
            self._whole, sys.modules[self.__name__] = None, self
            raise
        self._whole = sys.modules[self.__name__]
        return self._whole


def lean_transformers() -> None:
    """Lets transformers be imported lean from here on, unless it has been imported. ImportError where there is none."""
    if "transformers" in sys.modules:
        return
    spec = importlib.util.find_spec("transformers")
    try:
        found = version("transformers")
    except PackageNotFoundError:  # a folder on the path: its own code knows its version
        spec = None
    if spec is None:
        import_module("transformers")
        return
    try:
        _place(spec, found)
    except Exception:  # a release that is laid out in another way
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        import_module("transformers")


def _place(spec: ModuleSpec, found: str) -> None:
    """Puts the two packages there, and imports what all models use."""
    package = sys.modules["transformers"] = _Package(spec)
    package.__dict__["__version__"] = found
    models = importlib.util.find_spec("transformers.models")
    assert models is not None
    package.__dict__["models"] = sys.modules["transformers.models"] = _Package(models)
    import_module("transformers.dependency_versions_check")  # as its own code does
    utils = import_module("transformers.utils")
    direct = getattr(utils, "direct_transformers_import", None)
    if direct is not None:  # with which processing_utils, which all models use, runs the package's own code
        utils.__dict__["direct_transformers_import"] = lambda path, file="__init__.py": package
        try:
            import_module("transformers.processing_utils")
        finally:
            utils.__dict__["direct_transformers_import"] = direct
