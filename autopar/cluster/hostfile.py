"""Hostfiles of MPI and DeepSpeed ("worker-1 slots=8", "worker-1:8", or a name for each process), as host counts."""

from __future__ import annotations

import re

from autopar.errors import InputError

_LINE = re.compile(
    r"""(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)
        (?: :(?P<colon>\d{1,7}) | (?P<options>(?:\s+[\w-]+=\S+)*) )""",
    re.VERBOSE,
)


def hosts_of(text: str, *, where: str) -> dict[str, int | None]:
    """Processes of each host in order; None where the file gives no number and names it once.

    InputError that names the line where the text is no hostfile.
    """
    found: dict[str, int | None] = {}
    times: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        match = _LINE.fullmatch(words)
        options = dict(word.split("=", 1) for word in (match["options"] or "").split()) if match else {}
        slots = (match["colon"] if match else None) or options.get("slots")
        if match is None or (slots is not None and not re.fullmatch(r"[1-9]\d{0,6}", slots)):
            raise InputError(f"{where}, line {number}: {words!r} names no host; write a host and its processes, "
                             "such as worker-1 slots=8")
        host = match["host"]
        times[host] = times.get(host, 0) + 1
        if slots is not None and times[host] > 1:
            raise InputError(f"{where}, line {number}: the host {host} is given twice")
        found[host] = int(slots) if slots is not None else times[host] if times[host] > 1 else None
    if not found:
        raise InputError(f"{where}: it names no host; write lines such as worker-1 slots=8")
    return found


def is_hostfile(text: str) -> bool:
    """Whether each line of the text could be a hostfile's, and there are some."""
    try:
        hosts_of(text, where="")
    except InputError:
        return False
    return True
