"""Lazy modules of a small library, each test in a process of its own, since a module is imported once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "lib/__init__.py": "LOG = []\n",
    "lib/heavy/__init__.py": "import lib\nlib.LOG.append('heavy')\nfrom lib.heavy.parts import part\nVALUE = 1\n",
    "lib/heavy/parts.py": "import lib\nlib.LOG.append('parts')\ndef part(): return 'part'\n",
    "lib/heavy/tools.py": """import lib
lib.LOG.append('tools')
class Tool:
    pass
def use(): return Tool()
""",
    "lib/heavy/constants.py": "import lib\nlib.LOG.append('constants')\nC = 3\n",
    "lib/user.py": """import lib.heavy
from lib.heavy.tools import Tool, use
from lib.heavy.constants import C
class Asks:
    def noted(self) -> Tool: ...
def made(): return use()
def is_tool(value): return isinstance(value, Tool)
def same(): from lib.heavy.tools import use as real; return real
def child():
    class Child(Tool): pass
    return Child
""",
    "lib/broken.py": "raise RuntimeError('broken')\n",
}
START = """
import sys
from autopar.graph.lazy_modules import _StandIn, lazily
lazily({"lib.heavy": (), "lib.heavy.tools": ("Tool", "use"), "lib.heavy.constants": None, "lib.broken": (),
        "lib.absent": ("x",)}, askers=("lib",))
import lib
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def _run(library: Path, script: str) -> list[str]:
    start = f"import sys; sys.path.insert(0, {str(library)!r})\n" + START
    done = subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_import_runs_no_code_and_a_name_runs_it_in_the_same_module(library: Path) -> None:
    assert _run(library, """
import lib.heavy
heavy = lib.heavy
assert lib.LOG == [] and sys.modules["lib.heavy"] is heavy and heavy.__name__ == "lib.heavy" and heavy.__path__
assert heavy.VALUE == 1 and lib.LOG == ["heavy", "parts"]
assert sys.modules["lib.heavy"] is heavy and type(heavy) is type(lib) and type(heavy.__loader__) is type(lib.__loader__)
assert heavy.__spec__.loader is heavy.__loader__ and not hasattr(heavy, "no_such_name")
print(*lib.LOG)
""") == ["heavy", "parts"]


def test_modules_of_the_library_get_stand_ins_until_one_is_used(library: Path) -> None:
    assert _run(library, """
from lib import user
assert lib.LOG == ["constants"] and user.C == 3
assert type(user.Tool) is type(user.use) is _StandIn
assert type(user.made()).__name__ == "Tool"
import lib.heavy.tools
assert user.Tool is lib.heavy.tools.Tool and user.use is lib.heavy.tools.use
print(*lib.LOG)
""") == ["constants", "heavy", "parts", "tools"]


@pytest.mark.parametrize("use", ["user.is_tool(1)", "user.child()", "user.Tool.__name__", "user.Tool | None",
                                 "issubclass(int, user.Tool)", "user.same()"])
def test_each_use_of_a_stand_in_is_one_of_what_it_stands_for(library: Path, use: str) -> None:
    assert _run(library, f"""
from lib import user
stand_in = user.Tool
first = {use}
from lib.heavy.tools import Tool, use as function
assert {use} == first or "child" in {use!r}
assert isinstance(Tool(), stand_in) and issubclass(user.child(), Tool) and user.same() is function
print(user.Tool is Tool, *lib.LOG)
""") == ["True", "constants", "heavy", "parts", "tools"]


@pytest.mark.parametrize("asks", ["from lib.heavy.tools import Tool", "import lib.heavy.tools as t; Tool = t.Tool",
                                  "from lib.heavy.tools import *"])
def test_any_other_code_gets_the_real_thing(library: Path, asks: str) -> None:
    assert _run(library, f"""
{asks}
assert type(Tool) is type
import pickle
made = pickle.loads(pickle.dumps(Tool()))
print(type(made) is Tool, *lib.LOG)
""") == ["True", "heavy", "parts", "tools"]


def test_a_module_that_is_not_lazy_runs_after_its_package_and_once(library: Path) -> None:
    assert _run(library, """
import lib.heavy
from lib.heavy.parts import part
import lib.heavy.parts
assert lib.heavy.parts.part is part is lib.heavy.part and lib.heavy.parts is sys.modules["lib.heavy.parts"]
assert lib.heavy.parts.__spec__.loader is lib.heavy.parts.__loader__, lib.heavy.parts.__spec__
assert type(lib.heavy.parts.__loader__) is type(lib.__loader__)
print(*lib.LOG)
""") == ["heavy", "parts"]


def test_what_cannot_be_imported_says_so_when_it_is_used_and_each_time(library: Path) -> None:
    assert _run(library, """
import lib.broken
for _ in range(2):
    try:
        lib.broken.name
    except RuntimeError as error:
        print(error)
try:
    import lib.absent
except ModuleNotFoundError as error:
    print("absent")
""") == ["broken", "broken", "absent"]


def test_what_is_imported_already_stays_as_it_is(library: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(library)!r})
import lib.heavy
from autopar.graph.lazy_modules import lazily
lazily({{"lib.heavy": ()}}, askers=())
import lib.heavy
print(*lib.LOG)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["heavy", "parts"]
