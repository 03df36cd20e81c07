"""Rooms import only downwards; what each floor may lean on is checked in the sources, without importing them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autopar"

# Ground first. A room imports only from the floors before its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files",),
    ("graph",),
    ("cluster",),
    ("sharding",),
    ("cost_models",),
    ("plan",),
    ("simulate",),
    ("search",),
    ("gloo",),
    ("profiler",),
    ("runtime",),
    ("export", "viz"),
    ("api", "local_check", "doctor"),
    ("demo", "hugging_face"),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PURE_ROOMS = ("graph", "cluster", "sharding", "cost_models", "plan", "simulate", "search")
FILES = sorted(PACKAGE.glob("*.py")) + [
    path for room in PACKAGE.iterdir() if room.is_dir() for path in sorted(room.rglob("*.py"))
]


def room_of(path: Path) -> str:
    """The room of a source file: its folder in autopar, or its own name where it lies at the top."""
    parts = path.relative_to(PACKAGE).parts
    return one_name(parts[0].removesuffix(".py"))


def one_name(room: str) -> str:
    """The command line is one room in several files."""
    return "cli" if room.startswith("cli_") else room


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports or reaches for by `torch.distributed`, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((arg.value, node.lineno) for arg in node.args
                        if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def imports_of(path: Path) -> list[tuple[str, int]]:
    package = ("autopar", *path.relative_to(PACKAGE).parts[:-1])
    return list(imports(ast.parse(path.read_text()), package))


def under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_source_is_seen_and_every_room_has_its_floor() -> None:
    assert {"graph", "cost_models", "profiler"} <= {room_of(path) for path in FILES}, "the links were not followed"
    assert {room_of(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    for name, line in imports_of(path):
        assert name.split(".")[0] not in ("cost_models", "profiler"), f"{path}:{line}: write autopar.{name}"
        if not under(name, "autopar"):
            continue
        parts = name.split(".")
        target = one_name(parts[1]) if len(parts) > 1 else "__init__"
        if target not in FLOOR:  # a name out of autopar/__init__.py
            target = "__init__"
        below = target == room or FLOOR[target] < FLOOR[room]
        assert below, f"{path}:{line}: {room} imports {name}, which is not on a lower floor"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in PURE_ROOMS], ids=name_of)
def test_pure_rooms_do_not_know_torch_distributed(path: Path) -> None:
    for name, line in imports_of(path):
        assert not under(name, "torch.distributed"), f"{path}:{line}: {name}"


def test_one_adapter_a_solver_knows_ortools() -> None:
    users = {path for path in FILES if any(under(name, "ortools") for name, _ in imports_of(path))}
    adapters = {"search/mathopt.py", "search/cpsat.py"}
    assert set(map(name_of, users)) <= adapters, f"ortools is imported in {sorted(map(name_of, users))}"
    assert all(room_of(path) == "search" for path in users)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_transformers_is_imported_only_where_it_is_used(path: Path) -> None:
    """It takes seconds to import and not every run needs it: never at a module's top level."""
    tree = ast.parse(path.read_text())
    top_level = ast.Module(body=[node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)],
                           type_ignores=[])
    names = [name for name, _ in imports(top_level, ("autopar",))]
    assert not any(under(name, "transformers") for name in names)


def test_the_tops_of_the_command_line_need_no_torch() -> None:
    """`autopar --help` answers at once: no room that needs torch is imported before a command needs it."""
    heavy = ("torch", "transformers", "autopar.runtime", "autopar.search", "autopar.simulate", "autopar.profiler")
    for path in FILES:
        if room_of(path) not in ("cli", "errors"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, line in imports(node, ("autopar",)):
                    assert not any(under(name, module) for module in heavy), f"{path}:{line}: {name}"
