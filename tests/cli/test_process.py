"""What the command does to its own process."""

from __future__ import annotations

import platform
import subprocess
import sys

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
