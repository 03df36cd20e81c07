"""The shipped hardware tables, read and checked: what a preset name such as "H100-80GB" or "NVLink4" stands for.

The tables are YAML files of the package (cost_models/hardware), read here as data: this room stands below the cost
models and imports nothing of theirs. Their headers say what each field means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from autopar.cluster.cluster import DeviceType, Link
from autopar.cluster.names import resolve_name

GIB = 1024**3


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constant(_Row):
    """One number of a table: its kind and the key of its source."""

    value: PositiveFloat
    kind: Literal["vendor", "measured", "assumed"]
    source: str


class _Source(_Row):
    text: str
    url: str | None = None


class _LinkRow(_Row):
    bandwidth_gb_per_s: Constant
    latency_us: Constant


class _LatencyRow(_Row):
    latency_us: Constant


class _LinkFile(_Row):
    sources: dict[str, _Source]
    links: dict[str, _LinkRow]
    network: _LatencyRow


class _NetworkRow(_Row):
    gbps: Constant | None = None
    gbps_per_device: Constant | None = None


class _DeviceRow(_Row):
    aliases: tuple[str, ...] = ()
    cuda_names: tuple[str, ...] = ()
    memory_gib: Constant
    memory_bandwidth_gb_per_s: Constant
    peak_tflops: dict[str, Constant] = Field(min_length=1)
    kernel_launch_us: Constant
    host_gb_per_s: Constant | None = None
    host_memory_gib: Constant | None = None
    speed_spread: Constant | None = None
    link: str
    devices_per_node: PositiveInt
    devices_per_tray: PositiveInt | None = None
    network: _NetworkRow


class _DeviceFile(_Row):
    sources: dict[str, _Source]
    devices: dict[str, _DeviceRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A device with the node that it usually sits in."""

    device: DeviceType
    link: Link
    devices_per_node: int
    devices_per_tray: int | None  # of one host, where the link joins several
    network_gbps: float  # of a full node, or of each device where `network_per_device`
    network_per_device: bool
    network_source: str
    cuda_names: tuple[str, ...]


def _read(name: str) -> Any:
    path = files("autopar") / "cost_models" / "hardware" / name
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast, where it was built in
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # a safe loader of our own files


def _said(constant: Constant, sources: Mapping[str, _Source]) -> str:
    source = sources[constant.source]
    return f"{constant.kind}: {source.text}" + (f", {source.url}" if source.url else "")


@cache
def _links() -> _LinkFile:
    return _LinkFile.model_validate(_read("links.yaml"))


@cache
def _devices() -> _DeviceFile:
    return _DeviceFile.model_validate(_read("devices.yaml"))


def link_names() -> tuple[str, ...]:
    """Names of the shipped links, in the table's order."""
    return tuple(_links().links)


def device_names() -> tuple[str, ...]:
    """Names of the shipped devices, in the table's order."""
    return tuple(_devices().devices)


@cache
def link_preset(name: str) -> Link:
    """The Link of a shipped name such as "NVLink4"; InputError with the nearest names where there is none."""
    table = _links()
    known = resolve_name(name, dict.fromkeys(table.links, ()), what="link")
    row = table.links[known]
    return Link(
        name=known,
        latency_s=row.latency_us.value / 1e6,
        bandwidth_bytes_per_s=row.bandwidth_gb_per_s.value * 1e9,
        source=f"bandwidth {_said(row.bandwidth_gb_per_s, table.sources)}; "
        f"latency {_said(row.latency_us, table.sources)}",
    )


def network_link(gbps: float, source: str, latency_s: float | None = None, name: str | None = None) -> Link:
    """The network of a node with `gbps` gigabits a second in each direction."""
    table = _links()
    constant = table.network.latency_us
    latency_said = f"; latency {_said(constant, table.sources)}" if latency_s is None else ""
    return Link(
        name=name or f"{gbps:g}Gbps",
        latency_s=constant.value / 1e6 if latency_s is None else latency_s,
        bandwidth_bytes_per_s=gbps * 1e9 / 8,
        source=f"bandwidth {source}{latency_said}",
    )


@cache
def preset(name: str) -> Preset:
    """The Preset of a device name or alias; InputError with the nearest names where there is none."""
    table = _devices()
    known = resolve_name(name, {device: row.aliases for device, row in table.devices.items()}, what="GPU")
    row = table.devices[known]
    sources = [
        ("memory_bytes", row.memory_gib),
        ("memory_bandwidth_bytes_per_s", row.memory_bandwidth_gb_per_s),
        ("kernel_launch_s", row.kernel_launch_us),
        *([("host_bandwidth_bytes_per_s", row.host_gb_per_s)] if row.host_gb_per_s else []),
        *([("host_memory_bytes", row.host_memory_gib)] if row.host_memory_gib else []),
        *([("speed_spread", row.speed_spread)] if row.speed_spread else []),
        *((f"peak_flops.{dtype}", constant) for dtype, constant in row.peak_tflops.items()),
    ]
    rate = row.network.gbps_per_device or row.network.gbps
    assert rate is not None, f"{known} has no network rate"
    return Preset(
        device=DeviceType(
            name=known,
            memory_bytes=round(row.memory_gib.value * GIB),
            memory_bandwidth_bytes_per_s=row.memory_bandwidth_gb_per_s.value * 1e9,
            peak_flops=tuple((dtype, constant.value * 1e12) for dtype, constant in row.peak_tflops.items()),
            kernel_launch_s=row.kernel_launch_us.value / 1e6,
            host_bandwidth_bytes_per_s=row.host_gb_per_s.value * 1e9 if row.host_gb_per_s else None,
            host_memory_bytes=row.host_memory_gib.value * GIB if row.host_memory_gib else None,
            speed_spread=row.speed_spread.value if row.speed_spread else 0.0,
            sources=tuple((field, _said(constant, table.sources)) for field, constant in sources)
            + (("usable_memory_fraction", "assumed: the driver's context, communication buffers and fragmentation"),),
        ),
        link=link_preset(row.link),
        devices_per_node=row.devices_per_node, devices_per_tray=row.devices_per_tray,
        network_gbps=rate.value,
        network_per_device=row.network.gbps_per_device is not None,
        network_source=_said(rate, table.sources),
        cuda_names=row.cuda_names,
    )


def device_type(name: str) -> DeviceType:
    """The DeviceType of a preset name or alias such as "H100-80GB"; InputError with the nearest names otherwise."""
    return preset(name).device


def racks_of(kind: Preset, num_hosts: int, num_devices: int) -> tuple[int, ...]:
    """How many of `num_hosts` hosts in a row, with `num_devices` each, the preset's link joins into each node.

    One each for hosts that are no trays. Trays fill racks that are alike where their number allows it (64 devices of
    GB200 for 128), and else whole racks and one with the rest.
    """
    if num_devices != kind.devices_per_tray:
        return (1,) * num_hosts
    most = kind.devices_per_node // num_devices
    alike = max(joined for joined in range(1, most + 1) if num_hosts % joined == 0)
    if alike > 1 or num_hosts == 1:
        return (alike,) * (num_hosts // alike)
    return (most,) * (num_hosts // most) + ((num_hosts % most,) if num_hosts % most else ())


def default_network(kind: Preset, num_devices: int) -> Link:
    """The network that a node of `num_devices` of this preset usually has."""
    gbps = kind.network_gbps * (num_devices if kind.network_per_device else 1)
    return network_link(gbps, kind.network_source)


def dtype_note(device: DeviceType, dtype: str) -> str | None:
    """What to report where `device` has no rate for `dtype` and float32's is used; None where it has one."""
    if dtype in dict(device.peak_flops):
        return None
    return f"{device.name} has no {dtype} rate: its matrix products are counted at the float32 rate"
