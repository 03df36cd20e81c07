"""What the command does to its own process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
from autopar.cli_process import keep_memory
if len(sys.argv) > 1:
    keep_memory()
for _ in range(50):
    kept = [bytearray(100_000) for _ in range(40)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept where the C library is glibc")
def test_freed_memory_stays() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, check=True).stdout)
        for words in ((), ("keep",))
    )
    assert kept < plain / 4


INTERRUPTED_AT_ITS_END = """
import os, signal, sys
from autopar import cli
done = cli.Ending.begins
cli.Ending.begins = lambda ending: (done(ending), os.kill(os.getpid(), signal.SIGINT))
sys.argv[1:] = ["cluster", "show", "8xH100-80GB"]
sys.exit(cli.main())
"""


def test_an_interrupt_when_all_is_done_changes_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", INTERRUPTED_AT_ITS_END], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and "H100" in run.stdout


IMPORTS = """
import dataclasses, inspect
from autopar.cli_process import import_quickly
import_quickly()
"""


def test_dataclasses_are_made_as_ever_when_imports_are_quick() -> None:
    script = """
@dataclasses.dataclass(frozen=True, order=True)
class Point:
    x: int
    y: list = dataclasses.field(default_factory=list, repr=False)
twin = dataclasses.make_dataclass("Point", [("x", str), ("y", int)], frozen=True)
print(inspect.signature(Point), Point(1), Point(1) == Point(1), Point(1) < Point(2), hash(twin(1, 2)) == hash((1, 2)),
      Point.__init__.__annotations__, twin.__init__.__annotations__, Point(1) == twin(1, []))
try:
    Point(1).x = 2
except dataclasses.FrozenInstanceError as error:
    print(error, Point.__init__.__globals__ is twin.__init__.__globals__)
"""
    usual = _printed("import dataclasses, inspect\n" + script)
    assert _printed(IMPORTS + script) == usual
    assert "Point(x=1)" in usual


def test_frames_tell_their_source_to_all_but_torch(tmp_path: Path) -> None:
    path = tmp_path / "frames.py"
    path.write_text(IMPORTS + """
import sys
def here():
    return inspect.getframeinfo(sys._getframe(1))
mine = here()
here.__globals__["__name__"] = "torch._library.utils"
theirs = here()
print(mine.code_context, theirs.code_context, mine.filename == theirs.filename, theirs.lineno - mine.lineno)
""")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == r"['mine = here()\n'] None True 2"


def _printed(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
