"""The matrix that `nvidia-smi topo -m` prints, as a Cluster of one machine."""

from __future__ import annotations

import re

from autopar.cluster.cluster import Cluster
from autopar.cluster.joined import Pair, joined_nodes, kind_named
from autopar.cluster.tables import preset
from autopar.errors import InputError

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"GPU(\d+)")
_HEADER = re.compile(r"^\s+GPU0(\s|$)", re.MULTILINE)
_LISTED = re.compile(r"^GPU \d+: (?P<name>.+?) \(UUID: ", re.MULTILINE)
_QUERIED = re.compile(r"^(?P<name>(?:NVIDIA|Tesla|Quadro)[^,\n]*),\s*(?P<mib>\d+) MiB\s*$", re.MULTILINE)
_JOINS = re.compile(r"X|SYS|SOC|NODE|PHB|PXB|PIX|NV\d+|DIS")
_WITH_NAMES = "write it with (nvidia-smi -L; nvidia-smi topo -m) > FILE, or name the device behind a colon"


def is_topo_matrix(text: str) -> bool:
    """Whether the text has the heading of such a matrix."""
    return _HEADER.search(_ESCAPES.sub("", text)) is not None


def cluster_from_topo_matrix(text: str, *, device: str | None = None, where: str) -> Cluster:
    """One machine with the GPUs of the matrix, joined as it says.

    The matrix does not name the GPUs: the text also has the lines of `nvidia-smi -L`, or of
    `nvidia-smi --query-gpu=name,memory.total --format=csv`, or `device` names a preset. InputError otherwise.
    """
    text = _ESCAPES.sub("", text)
    rows = _rows(text, where)
    count = len(rows)
    nvlinks: dict[Pair, int] = {}
    for one, joins in enumerate(rows):
        for other, join in enumerate(joins):
            if not _JOINS.fullmatch(join) or (join == "X") != (one == other):
                raise InputError(f"{where}: GPU{one} and GPU{other} are joined by {join!r}, which is no word of "
                                 "nvidia-smi topo -m: is the matrix whole?")
            if join.startswith("NV"):
                nvlinks[min(one, other), max(one, other)] = int(join.removeprefix("NV"))
    if device is not None:
        kind = preset(device)
    else:
        names: list[tuple[str, int | None]] = [
            (m["name"], int(m["mib"]) * 2**20) for m in _QUERIED.finditer(text)
        ] or [(m["name"], None) for m in _LISTED.finditer(text)]
        if not names:
            raise InputError(f"{where}: it says how GPUs are joined, but not which they are: {_WITH_NAMES}, such as "
                             f"{where}:A100-80GB")
        kind = kind_named(names, where)
    return Cluster(name=where, nodes=joined_nodes(kind, count, nvlinks, where=where))


def _rows(text: str, where: str) -> list[list[str]]:
    """What joins each GPU with each, in their order; InputError where a row or column is missing."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if _HEADER.match(line))
    columns = [word for word in lines[at].split() if _GPU.fullmatch(word)]
    if columns != [f"GPU{i}" for i in range(len(columns))]:
        raise InputError(f"{where}: the heading of the matrix lists {', '.join(columns)}: GPU0, GPU1, ... are expected")
    found: dict[int, list[str]] = {}
    for line in lines[at + 1 :]:
        words = line.split()
        match = _GPU.fullmatch(words[0]) if words else None
        if match is not None:
            found[int(match[1])] = words[1 : 1 + len(columns)]
    missing = [i for i in range(len(columns)) if len(found.get(i, ())) < len(columns)]
    if missing or len(found) > len(columns):
        named = ", ".join(f"GPU{i}" for i in missing) or f"more than {len(columns)} GPUs"
        raise InputError(f"{where}: the matrix is cut off or garbled: look at the row of {named}")
    return [found[i] for i in range(len(columns))]
