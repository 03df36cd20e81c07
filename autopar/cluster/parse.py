"""A Cluster from what a user writes: shorthand, the path of a file, or "local"."""

from __future__ import annotations

import os
import re
from pathlib import Path

from autopar.cluster.cluster import Cluster, Node
from autopar.cluster.tables import Preset, default_network, network_link, preset
from autopar.errors import InputError

MAX_DEVICES = 1_000_000

EXAMPLES = (
    "write for example 8xH100-80GB, 16x8xH100-80GB (nodes x GPUs), 16x8xA100-80GB@800Gbps, local, "
    "or the path of a YAML file"
)

_GROUP = re.compile(
    r"""(?:(?P<nodes>[-+]?\d{1,12})\s*[x×*]\s*)?
        (?P<devices>[-+]?\d{1,12})\s*[x×*]\s*
        (?P<device>[A-Za-z][\w.\- ]*?)
        (?:\s*@\s*(?P<rate>[^@]*))?""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
_RATE = re.compile(r"(?P<number>[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*(?P<unit>[MGT])b(?:ps|it/s|/s)", re.IGNORECASE)
_LOCAL = re.compile(r"local(?::(?P<count>.*))?", re.IGNORECASE)
_GBPS = {"m": 1e-3, "g": 1.0, "t": 1e3}


def parse_cluster(text_or_path: str) -> Cluster:
    """The Cluster that a text describes.

    Shorthand: groups joined by "+", each `[NODESx]DEVICESxNAME[@RATE]`, where RATE is one node's network rate in each
    direction, such as 800Gbps. A rate on the last group holds for the groups that have none. With one count only, more
    devices than a usual node holds are spread over full nodes. `local` is this machine, `local:4` four processes on it.
    Anything that ends in .yaml, .yml or .json, or is an existing file, is read as a cluster file.

    Raises InputError, in one line.
    """
    text = text_or_path.strip()
    if not text:
        raise InputError(f"the cluster is empty: {EXAMPLES}")
    local = _LOCAL.fullmatch(text)
    if local is not None:
        from autopar.cluster.local import local_cluster  # imports torch

        return local_cluster(_local_count(text, local["count"]))
    if text.lower().endswith((".yaml", ".yml", ".json")) or "/" in text.split("@")[0] or os.path.isfile(text):
        from autopar.cluster.file import load_cluster

        return load_cluster(Path(text))
    return Cluster(name=text, nodes=_shorthand(text))


def parse_rate_gbps(text: str) -> float:
    """Gigabits a second of "800Gbps", "1.6Tbps" or "200 Mb/s"; InputError otherwise."""
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text.strip()!r} is not a network rate: write for example 800Gbps")
    gbps = float(match["number"]) * _GBPS[match["unit"].lower()]
    if not gbps > 0 or gbps == float("inf"):
        raise InputError(f"the network rate {text.strip()!r} must be positive and finite")
    return gbps


def check_num_devices(total: int, where: str) -> None:
    """Raises InputError where a cluster has more devices than any plan could be searched for."""
    if total > MAX_DEVICES:
        raise InputError(f"{where}: {total} devices are more than {MAX_DEVICES}")


def shorthand_group(text: str) -> tuple[str, str | None] | None:
    """(device, rate) of shorthand that is one group, such as "16x8xA100-80GB@800Gbps"; None for any other text."""
    match = _GROUP.fullmatch(text.strip())
    return None if match is None else (match["device"].strip(), match["rate"])


def _local_count(text: str, count: str | None) -> int | None:
    if count is None:
        return None
    if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", count, re.ASCII):
        raise InputError(f"cluster {text!r}: write local, or local:4 for four processes")
    check_num_devices(int(count), f"cluster {text!r}")
    return int(count)


def _shorthand(text: str) -> tuple[Node, ...]:
    where = f"cluster {text!r}"
    matches = []
    for group in text.split("+"):
        match = _GROUP.fullmatch(group.strip())
        if match is None:
            raise InputError(f"{where}: cannot read {group.strip()!r}: {EXAMPLES}")
        matches.append(match)
    last_rate = matches[-1]["rate"]
    groups: list[tuple[int, Node]] = []
    total = 0
    for match in matches:
        num_nodes, num_devices = int(match["nodes"] or 1), int(match["devices"])
        if num_nodes < 1 or num_devices < 1:
            raise InputError(f"{where}: the counts of {match.group().strip()!r} must be at least 1")
        kind = preset(match["device"])
        if match["nodes"] is None:
            num_nodes, num_devices = _spread(num_devices, kind, where)
        total += num_nodes * num_devices
        check_num_devices(total, where)
        rate = match["rate"] if match["rate"] is not None else last_rate
        if rate is None:
            network = default_network(kind, num_devices)
        else:
            try:
                network = network_link(parse_rate_gbps(rate), "given in the shorthand")
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        node = Node(device=kind.device, num_devices=num_devices, link=kind.link, network=network)
        groups.append((num_nodes, node))
    return tuple(node for count, node in groups for _ in range(count))


def _spread(num_devices: int, kind: Preset, where: str) -> tuple[int, int]:
    full = kind.devices_per_node
    if num_devices <= full:
        return 1, num_devices
    if num_devices % full:
        raise InputError(
            f"{where}: {num_devices} {kind.device.name} do not fill nodes of {full}: "
            f"write nodes x devices, for example 2x{full}x{kind.device.name}"
        )
    return num_devices // full, full
