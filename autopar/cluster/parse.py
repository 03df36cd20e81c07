"""A Cluster from what a user writes: shorthand, the path of a file, or "local"."""

from __future__ import annotations

import os
import re
from pathlib import Path

from autopar.cluster.cluster import Cluster, Node
from autopar.cluster.pace import at_the_slowest
from autopar.cluster.part import part_of, split_part
from autopar.cluster.tables import Preset, default_network, network_link, preset, racks_of
from autopar.errors import InputError

MAX_DEVICES = 1_000_000

EXAMPLES = (
    "write for example 8xH100-80GB, 16x8xH100-80GB (nodes x GPUs), 16x8xA100-80GB@800Gbps, local, auto, "
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
_AUTO = re.compile(r"auto(?::(?P<device>.*))?", re.IGNORECASE)
_GBPS = {"m": 1e-3, "g": 1.0, "t": 1e3}


def parse_cluster(text_or_path: str) -> Cluster:
    """The Cluster that a text describes.

    Shorthand: groups joined by "+", each `[NODESx]DEVICESxNAME[@RATE]`, where RATE is one node's network rate in each
    direction, such as 800Gbps. A rate on the last group holds for the groups that have none. With one count only, more
    devices than a usual node holds are spread over full nodes. Trays of GB200 in a row (`16x4xGB200`) are one node, as
    far as a rack's NVLink joins them. `local` is this machine, `local:4` four processes on it.
    `auto` is the running job's machines (`auto:H100-80GB` names their devices). Anything that ends in .yaml, .yml or
    .json, or is an existing file, is read as a file, by its content: a cluster file, the matrix of `nvidia-smi topo
    -m`, NCCL's topology in XML, or a hostfile; behind a colon the device may be named (`topo.txt:A100-80GB`).
    Behind a # some of its devices may be named by their numbers (`lab.yaml#0-15`); they are a cluster of their own.
    Devices compute at the pace of the slowest of their kind (`pace.py`), those of a part as in the whole.

    Raises InputError, in one line.
    """
    text = text_or_path.strip()
    if not text:
        raise InputError(f"the cluster is empty: {EXAMPLES}")
    part = split_part(text)
    if part is not None:
        return part_of(parse_cluster(part[0]), part[1])
    return at_the_slowest(_whole(text))


def _whole(text: str) -> Cluster:
    local = _LOCAL.fullmatch(text)
    if local is not None:
        from autopar.cluster.local import local_cluster  # imports torch

        return local_cluster(_local_count(text, local["count"]))
    auto = _AUTO.fullmatch(text)
    if auto is not None:
        from autopar.cluster.job import auto_cluster

        return auto_cluster(os.environ, (auto["device"] or "").strip() or None)
    path, _, device = text.rpartition(":")
    if os.path.isfile(path) and not os.path.isfile(text):
        return _described(Path(path), device.strip() or None)
    if os.path.isfile(text) and not text.lower().endswith((".yaml", ".yml", ".json")):
        return _described(Path(text), None)
    if text.lower().endswith((".yaml", ".yml", ".json")) or "/" in text.split("@")[0] or os.path.isfile(text):
        from autopar.cluster.file import load_cluster

        return load_cluster(Path(text))
    return Cluster(name=text, nodes=_shorthand(text))


def _described(path: Path, device: str | None) -> Cluster:
    """The Cluster of a file of any kind, told by its content."""
    from autopar.cluster.file import cluster_from_json, cluster_from_yaml, read_text
    from autopar.cluster.hostfile import hosts_of, is_hostfile
    from autopar.cluster.job import Job, cluster_of
    from autopar.cluster.nccl_xml import cluster_from_nccl_xml, is_nccl_xml
    from autopar.cluster.topo_matrix import cluster_from_topo_matrix, is_topo_matrix

    text, where = read_text(path), str(path)
    if is_nccl_xml(text):
        return cluster_from_nccl_xml(text, device=device, where=where)
    if is_topo_matrix(text):
        return cluster_from_topo_matrix(text, device=device, where=where)
    if is_hostfile(text):
        counts = hosts_of(text, where=where)
        return cluster_of(Job(source=where, processes=tuple(counts.values())), device)
    if device is not None:
        raise InputError(f"{path}: a cluster file names its devices itself: leave out {device!r} behind the colon")
    if text.lstrip().startswith("{"):
        return cluster_from_json(text, where=where)
    return cluster_from_yaml(text, where=where)


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
    nodes: list[Node] = []
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
        racks = racks_of(kind, num_nodes, num_devices)
        kinds = {}
        for joined in dict.fromkeys(racks):
            if rate is None:
                network = default_network(kind, joined * num_devices)
            else:
                try:
                    network = network_link(joined * parse_rate_gbps(rate), "given in the shorthand")
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
            number = joined * num_devices
            kinds[joined] = Node(device=kind.device, num_devices=number, link=kind.link, network=network)
        nodes += [kinds[joined] for joined in racks]
    return tuple(nodes)


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
