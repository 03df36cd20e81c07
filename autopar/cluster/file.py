"""Cluster files: the YAML that a user writes, and the exact JSON that saves a Cluster with its measured rates.

The YAML schema (a full example, every optional key shown):

    version: 1                      # optional, 1 so far
    name: lab                       # optional, for messages; the file's path otherwise
    nodes:                          # in rank order
      - count: 16                   # equal nodes, 1 if absent
        devices: 8                  # devices on each
        device: H100-80GB           # a preset's name, and its usual link and network follow
      - devices: 4
        device:                     # or a mapping; without `preset`, the first three keys are needed
          preset: A100-80GB         # start from a preset and override
          name: A100-80GB-PCIe      # named after the overridden values if absent
          memory_gib: 80
          memory_bandwidth_gb_per_s: 1935
          peak_tflops: {bfloat16: 312, float32: 19.5}   # dense; merged into the preset's
          kernel_launch_us: 4
          host_gb_per_s: 31.5       # copies to and from host memory, each way; without it nothing is offloaded
          host_memory_gib: 128      # each device's share of its host's memory, for what is offloaded
          usable_memory_fraction: 0.92
          speed_spread: 0.015       # how much devices of the kind differ in speed (standard deviation over the mean):
                                    # all wait for the slowest; 0 where they are alike
          price_per_hour: 1.80      # of one device
        link: PCIe4                 # a link's name, or {name, bandwidth_gb_per_s, latency_us}; bandwidth of one
                                    # device in one direction
        network: 200Gbps            # one node's rate in one direction, or {name, gbps, latency_us}

GB and Gb are powers of ten, GiB is 2**30.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.cluster.pace import at_the_slowest
from autopar.cluster.parse import check_num_devices, parse_rate_gbps
from autopar.cluster.tables import GIB, Preset, default_network, link_preset, network_link, preset
from autopar.errors import InputError
from autopar.files import write_text

FORMAT = "autopar-cluster"
VERSION = 1

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "fp8")
_MESSAGES = {
    "extra_forbidden": "unknown key", "missing": "it is missing", "string_type": "give a name",
    "model_type": "give a mapping with keys", "model_attributes_type": "give a mapping with keys",
    "list_type": "give a list, each item after a dash",
}

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=0, strict=True)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _DeviceEntry(_Entry):
    preset: str | None = None
    name: str | None = None
    memory_gib: _Positive | None = None
    memory_bandwidth_gb_per_s: _Positive | None = None
    peak_tflops: dict[str, _Positive] | None = None
    kernel_launch_us: _Positive | None = None
    host_gb_per_s: _Positive | None = None
    host_memory_gib: _Positive | None = None
    usable_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    speed_spread: Annotated[float, Field(ge=0, le=0.25)] | None = None
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class _LinkEntry(_Entry):
    name: str | None = None
    bandwidth_gb_per_s: _Positive
    latency_us: _Positive


class _NetworkEntry(_Entry):
    name: str | None = None
    gbps: _Positive
    latency_us: _Positive | None = None


class _NodeEntry(_Entry):
    count: _Count = 1
    devices: _Count
    device: str | _DeviceEntry
    link: str | _LinkEntry | None = None
    network: str | _NetworkEntry | None = None


class _ClusterEntry(_Entry):
    version: Literal[1] = 1
    name: str | None = None
    nodes: Annotated[list[_NodeEntry], Field(min_length=1)]


def load_cluster(path: Path) -> Cluster:
    """The Cluster of a .yaml or .json file; InputError that names the file, and the line where there is one."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return cluster_from_json(text, where=str(path))
    return cluster_from_yaml(text, where=str(path))


def read_text(path: Path) -> str:
    """The text of a file that describes a cluster; InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the cluster file {path}: {reason}") from None


def save_cluster(cluster: Cluster, path: Path) -> None:
    """Writes the JSON form of `cluster`."""
    write_text(path, cluster_to_json(cluster))


def cluster_to_json(cluster: Cluster) -> str:
    """The Cluster as versioned JSON that `cluster_from_json` reads back to an equal value. Equal nodes are counted."""
    runs: list[dict[str, Any]] = []
    for i, node in enumerate(cluster.nodes):
        if i and node == cluster.nodes[i - 1]:
            runs[-1]["count"] += 1
        else:
            runs.append({"count": 1, "node": asdict(node)})
    document = {"format": FORMAT, "version": VERSION, "name": cluster.name, "nodes": runs}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


class _Run(_Entry):
    count: _Count
    node: Node


class _Document(_Entry):
    format: Literal["autopar-cluster"]
    version: Literal[1]
    name: str
    nodes: Annotated[list[_Run], Field(min_length=1)]


def cluster_from_json(text: str, *, where: str = "cluster JSON") -> Cluster:
    """The Cluster of `cluster_to_json`'s text; InputError where it is cut off, foreign or of another version."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deep to be a cluster") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{where}: not a cluster file of autopar: it lacks \"format\": \"{FORMAT}\"")
    if data.get("version") != VERSION:
        raise InputError(f"{where}: version {data.get('version')!r} is not supported, this autopar reads {VERSION}")
    try:
        document = TypeAdapter(_Document).validate_python(data)
    except ValidationError as error:
        path, message = _first_error(error)
        raise InputError(f"{where}: {_dotted(path)}: {message}") from None
    check_num_devices(sum(run.count * run.node.num_devices for run in document.nodes), where)
    for run in document.nodes:
        _check_node(run.node, where)
    return Cluster(name=document.name, nodes=tuple(run.node for run in document.nodes for _ in range(run.count)))


def cluster_from_yaml(text: str, *, where: str = "cluster YAML") -> Cluster:
    """The Cluster of a YAML text in the schema above, at its slowest's pace; InputError with `where` and the line."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(tree, where)
        data = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deep to be a cluster") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{where}, line {line}: not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: a cluster file is a mapping with the key `nodes`, a list of nodes")
    try:
        entry = _ClusterEntry.model_validate(data)
    except ValidationError as error:
        path, message = _first_error(error)
        raise InputError(f"{where}, line {_line(tree, path)}: {_dotted(path)}: {message}") from None
    check_num_devices(sum(node.count * node.devices for node in entry.nodes), where)
    nodes: list[Node] = []
    for i, row in enumerate(entry.nodes):
        key = "device"
        try:
            device, kind = _device(row.device, where)
            key = "link"
            link = _link(row, kind, where)
            key = "network"
            node = Node(device=device, num_devices=row.devices, link=link, network=_network(row, kind, where))
        except InputError as error:
            raise InputError(f"{where}, line {_line(tree, ('nodes', i, key))}: nodes.{i}.{key}: {error}") from None
        nodes += [node] * row.count
    return at_the_slowest(Cluster(name=entry.name or where, nodes=tuple(nodes)))


def _check_keys(tree: yaml.Node | None, where: str) -> None:
    """InputError where a mapping has a key twice, of which YAML would silently keep the last."""
    todo, met = [tree], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in met:  # an alias
            continue
        met.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [value for _, value in node.value]
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in keys:
                        raise InputError(f"{where}, line {key.start_mark.line + 1}: {key.value}: given twice")
                    keys.add(key.value)


def _link(row: _NodeEntry, kind: Preset | None, where: str) -> Link:
    if isinstance(row.link, str):
        return link_preset(row.link)
    if row.link is not None:
        return Link(
            name=row.link.name or f"{row.link.bandwidth_gb_per_s:g}GB/s",
            latency_s=row.link.latency_us / 1e6,
            bandwidth_bytes_per_s=row.link.bandwidth_gb_per_s * 1e9,
            source=f"given in {where}",
        )
    if kind is None:
        raise InputError("needed where the device has no preset, for example NVLink4")
    return kind.link


def _network(row: _NodeEntry, kind: Preset | None, where: str) -> Link:
    if isinstance(row.network, str):
        return network_link(parse_rate_gbps(row.network), f"given in {where}")
    if row.network is not None:
        latency_s = None if row.network.latency_us is None else row.network.latency_us / 1e6
        return network_link(row.network.gbps, f"given in {where}", latency_s, row.network.name)
    if kind is None:
        raise InputError("needed where the device has no preset, for example 400Gbps")
    return default_network(kind, row.devices)


def _device(entry: str | _DeviceEntry, where: str) -> tuple[DeviceType, Preset | None]:
    if isinstance(entry, str):
        kind = preset(entry)
        return kind.device, kind
    base = preset(entry.preset) if entry.preset is not None else None
    rates_tflops = _by_dtype(entry.peak_tflops)
    given = entry.model_dump(exclude_none=True, exclude={"preset", "name"})
    if base is None:
        missing = [key for key in ("name", "memory_gib", "memory_bandwidth_gb_per_s", "peak_tflops") if
                   getattr(entry, key) is None]
        if missing:
            raise InputError(f"give a preset, or also {', '.join(missing)}")
        if "float32" not in rates_tflops:
            raise InputError("peak_tflops needs float32, the rate of every dtype that is not listed")
    start = base.device if base is not None else DeviceType(
        name=entry.name or "", memory_bytes=0, memory_bandwidth_bytes_per_s=0.0, peak_flops=(),
        kernel_launch_s=preset("CPU").device.kernel_launch_s,
        sources=(("kernel_launch_s", "assumed: 5 us, not given"),),
    )
    said: dict[str, str] = {}
    values: dict[str, Any] = {}
    if entry.memory_gib is not None:
        values["memory_bytes"] = round(entry.memory_gib * GIB)
    if entry.memory_bandwidth_gb_per_s is not None:
        values["memory_bandwidth_bytes_per_s"] = entry.memory_bandwidth_gb_per_s * 1e9
    if entry.kernel_launch_us is not None:
        values["kernel_launch_s"] = entry.kernel_launch_us / 1e6
    if entry.host_gb_per_s is not None:
        values["host_bandwidth_bytes_per_s"] = entry.host_gb_per_s * 1e9
    if entry.host_memory_gib is not None:
        values["host_memory_bytes"] = entry.host_memory_gib * GIB
    if entry.usable_memory_fraction is not None:
        values["usable_memory_fraction"] = entry.usable_memory_fraction
    if entry.speed_spread is not None:
        values["speed_spread"] = entry.speed_spread
    if entry.price_per_hour is not None:
        values["price_per_hour"] = entry.price_per_hour
    said.update(dict.fromkeys(values, f"given in {where}"))
    if rates_tflops:
        peaks = dict(start.peak_flops) | {dtype: rate * 1e12 for dtype, rate in rates_tflops.items()}
        values["peak_flops"] = tuple(peaks.items())
        said.update({f"peak_flops.{dtype}": f"given in {where}" for dtype in rates_tflops})
    name = entry.name or start.name
    rates = {key: value for key, value in given.items() if key != "price_per_hour"}
    if entry.name is None and rates:
        name += "+" + hashlib.sha256(json.dumps(rates, sort_keys=True).encode()).hexdigest()[:6]
    sources = tuple((dict(start.sources) | said).items())
    return replace(start, name=name, sources=sources, **values), base


def _by_dtype(rates: dict[str, float] | None) -> dict[str, float]:
    """The rates by torch's names of their dtypes, which may be given short; InputError for an unknown one."""
    named: dict[str, float] = {}
    for word, rate in (rates or {}).items():
        name = _SHORT_DTYPES.get(word, word)
        if name not in _DTYPES:
            raise InputError(f"peak_tflops has an unknown dtype {word!r}: use {', '.join(_DTYPES)}")
        named[name] = rate
    return named


def _check_node(node: Node, where: str) -> None:
    device = node.device
    positive = {
        "num_devices": node.num_devices, "memory_bytes": device.memory_bytes,
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
        "kernel_launch_s": device.kernel_launch_s, "usable_memory_fraction": device.usable_memory_fraction,
        "link.bandwidth_bytes_per_s": node.link.bandwidth_bytes_per_s,
        "network.bandwidth_bytes_per_s": node.network.bandwidth_bytes_per_s, "slowest_share": device.slowest_share,
        **{f"peak_flops.{dtype}": rate for dtype, rate in device.peak_flops},
        **{
            field: value for field in ("host_bandwidth_bytes_per_s", "host_memory_bytes")
            if (value := getattr(device, field)) is not None
        },
    }
    for field, value in positive.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{where}: {field} of {device.name} is {value}: it must be positive and finite")
    if not 0 <= device.speed_spread < 1:
        raise InputError(f"{where}: speed_spread of {device.name} is {device.speed_spread}: it must be from 0 to 1")
    for link in (node.link, node.network):
        if not 0 <= link.latency_s < float("inf"):
            raise InputError(f"{where}: latency_s of {link.name} is {link.latency_s}: it must be finite, at least 0")
    if "float32" not in dict(device.peak_flops):
        raise InputError(f"{where}: {device.name} has no float32 peak, the rate of every dtype that is not listed")


def _first_error(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    # A union reports each of its branches: the deepest error is of the branch that the user meant. A misspelt key also
    # shows as a missing one, and says more.
    errors = error.errors(include_url=False)
    worst = max(errors, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path = tuple(part for part in worst["loc"] if not (isinstance(part, str) and (part[:1] == "_" or part == "str")))
    return path, _MESSAGES.get(worst["type"], worst["msg"])


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def _line(tree: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    """Line of the deepest part of `path` that the file has."""
    node = tree
    line = tree.start_mark.line if tree is not None else 0
    for part in path:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    found, line = value, key.start_mark.line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = node.value[part].start_mark.line
        if found is None:
            break
        node = found
    return line + 1
