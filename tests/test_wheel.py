"""The built wheel holds the package autopar alone and whole, and works beside a user's files of the same names."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKED = {"__pycache__", "page"}  # autopar/viz/page: what autopar/viz/assets is built from
SHADOWS = ("profiler.py", "cost_models.py", "graph.py", "plan.py", "errors.py", "files.py", "cli.py")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The paths in a wheel that is built from a copy of the sources that git would take."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("autopar", "cost_models", "profiler"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and not {"__pycache__", "node_modules"}.intersection(path.parts):
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("cost_models", "profiler"):
        (source / "autopar" / name).symlink_to(f"../{name}")
    built = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "-c",
                    "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))", str(built)],
                   cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_autopar_is_the_only_top_level_name(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"autopar"}


def test_every_source_and_data_file_is_in_the_wheel(wheel_names: set[str]) -> None:
    rooms = [path for path in (ROOT / "autopar").iterdir() if path.is_dir()]
    files = [path for room in rooms for path in room.rglob("*")] + list((ROOT / "autopar").iterdir())
    packed = [path for path in files if path.is_file() and not NOT_PACKED.intersection(path.parts)]
    wanted = {str(path.relative_to(ROOT)) for path in packed}
    assert {"autopar/cost_models/__init__.py", "autopar/profiler/__init__.py", "autopar/py.typed"} <= wanted
    assert wanted - wheel_names == set()


def test_files_of_the_same_names_beside_train_py_are_left_alone(tmp_path: Path) -> None:
    for name in SHADOWS:
        (tmp_path / name).write_text("raise RuntimeError('the wrong module was imported')\n")
    train = tmp_path / "train.py"
    train.write_text(
        "import autopar, autopar.cost_models, autopar.profiler\n"
        "import autopar.cli, autopar.plan.file, autopar.cluster.cluster, autopar.graph.model_graph\n"
        "print(autopar.cost_models.__name__, autopar.profiler.__name__)\n"
    )
    run = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["autopar.cost_models", "autopar.profiler"], run.stderr
