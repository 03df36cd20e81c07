"""What the command does to its own process, which nothing else runs in."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import inspect
import io
import os
import signal
import sys
from functools import cache
from types import CodeType
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 256 << 20
_MAPPED_BYTES = 32 << 20  # the most that it takes


def replace_unprintable() -> None:
    """What a terminal's encoding does not have (the lines of a table, in ASCII) is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def collect_seldom() -> None:
    """Python seldom looks for cyclic garbage in this process from here on.

    A tenth of a plan's time went there, for a few MiB: nearly all that it looked at is libraries, which stay.
    """
    gc.set_threshold(4_000_000, 10, 10)


def import_quickly() -> None:
    """What libraries do as they are imported is done quicker from here on, with the same outcome.

    A fifth of the time before a plan's search goes into making dataclasses, whose methods Python compiles from texts,
    many of them equal: each text is compiled once. And torch asks for the file and line of each operator that it
    registers in a way that reads and searches the source as well: it gets the file and line alone.
    """
    vars(dataclasses)["exec"] = _exec  # in the place of the builtin, in that module alone
    inspect.getframeinfo = _frame_info


_frame_info_with_source = inspect.getframeinfo


@cache
def _compiled(text: str) -> CodeType:
    return compile(text, "<string>", "exec", dont_inherit=True)


def _exec(text: str | CodeType, *scopes: Any, **options: Any) -> None:
    exec(_compiled(text) if isinstance(text, str) else text, *scopes, **options)


def _frame_info(frame: Any, context: int = 1) -> Any:
    asker = sys._getframe(1).f_globals.get("__name__")
    return _frame_info_with_source(frame, 0 if asker == "torch._library.utils" else context)


class Ending:
    """Ends the process with `code`, where one is set, after all else that is to be done as it ends.

    Python itself would then take its modules down one by one, which takes a quarter of a second with torch.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._end)  # the first to be registered is the last to run

    def begins(self) -> None:
        """From here on Ctrl-C changes nothing: all has been done and said."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _end(self) -> None:
        gc.freeze()
        if self.code is None:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the reader went away: Python says so
            return
        os._exit(self.code)


def keep_memory() -> None:
    """Memory that is freed stays with the process, up to a limit, where the C library is glibc.

    A search makes and drops arrays all the time; a fortieth of its time went to pages that came and went with them.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
