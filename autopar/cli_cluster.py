"""The command `autopar cluster show`: what autopar takes a cluster to be, and where each rate comes from."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from autopar.cli_help import examples
from autopar.cli_options import Json, ProfileOption
from autopar.cli_output import answer, check_writable
from autopar.cli_requests import Simulations

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster, DeviceType, Link

GIB = 2**30

cluster_app = typer.Typer(help="Look at a cluster, as shorthand, a file or the running job describe it.",
                          rich_markup_mode=None)
Described = Annotated[str, typer.Argument(
    metavar="CLUSTER", help="Shorthand such as 4x8xH100-80GB@3200Gbps, `local`, `auto` (the running job), or a file: "
    "YAML, what (nvidia-smi -L; nvidia-smi topo -m) prints, NCCL's topology in XML, a hostfile.")]
Exact = Annotated[Path | None, typer.Option(
    "-o", "--output", metavar="FILE.json", help="Write the cluster with all its rates to this file, for --cluster.")]


@cluster_app.callback()
def group() -> None:
    """Look at a cluster, as shorthand, a file or the running job describe it."""


@cluster_app.command("show", epilog=examples("cluster show"))
def show_cluster(text: Described = "local", profile: ProfileOption = None, output: Exact = None,
                 json_: Json = False) -> None:
    """Print nodes, devices and links with their rates, and the source of each."""
    from autopar.cluster.file import save_cluster

    check_writable(output)
    with answer(as_json=json_) as reply:
        found = Simulations().cluster(text, profile)
        reply.value = cluster_value(found)
        reply.show(*cluster_tables(reply.value))
        if output is not None:
            save_cluster(found, output)
            reply.show(f"written to {output}; use it with --cluster {output}")


def cluster_value(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain values: runs of like nodes, each device and link once, with the sources of their rates."""
    devices = list({node.device.name: node.device for node in cluster.nodes}.values())
    links = list({
        (link.name, link.bandwidth_bytes_per_s, link.latency_s): link
        for node in cluster.nodes for link in (node.link, node.network)
    }.values())
    runs = [(node, len(list(run))) for node, run in groupby(cluster.nodes)]
    return {
        "name": cluster.name, "num_devices": cluster.num_devices, "num_nodes": len(cluster.nodes),
        "nodes": [
            {"count": count, "devices": node.num_devices, "device": node.device.name, "link": node.link.name,
             "network": node.network.name} for node, count in runs
        ],
        "devices": [_device(device) for device in devices],
        "links": [_link(link) for link in links],
    }


def _device(device: DeviceType) -> dict[str, Any]:
    sources = dict(device.sources)
    rates: list[tuple[str, float | None, str, str]] = [
        ("memory", device.memory_bytes / GIB, "GiB", "memory_bytes"),
        ("usable memory", device.usable_memory_bytes / GIB, "GiB", "usable_memory_fraction"),
        ("memory rate", device.memory_bandwidth_bytes_per_s / 1e9, "GB/s", "memory_bandwidth_bytes_per_s"),
        *((f"{dtype} products", rate / 1e12, "TFLOP/s", f"peak_flops.{dtype}") for dtype, rate in device.peak_flops),
        ("kernel launch", device.kernel_launch_s * 1e6, "us", "kernel_launch_s"),
        ("host link", _per(device.host_bandwidth_bytes_per_s, 1e9), "GB/s", "host_bandwidth_bytes_per_s"),
        ("host memory", _per(device.host_memory_bytes, GIB), "GiB", "host_memory_bytes"),
        ("speeds differ", device.speed_spread * 100 or None, "% (standard deviation)", "speed_spread"),
        ("price", device.price_per_hour, "an hour", "price_per_hour"),
    ]
    return {
        "name": device.name, "measured_ops": len(device.measured.samples) if device.measured is not None else 0,
        "rates": [
            {"what": what, "value": value, "unit": unit, "source": sources.get(key, "")}
            for what, value, unit, key in rates if value is not None
        ],
    }


def _per(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _link(link: Link) -> dict[str, Any]:
    return {
        "name": link.name, "gb_per_s": link.bandwidth_bytes_per_s / 1e9, "latency_us": link.latency_s * 1e6,
        "source": link.source, "measured_collectives": len(link.fits),
    }


def cluster_tables(value: dict[str, Any]) -> list[Any]:
    """The same for a terminal."""
    plural = "s" if value["num_nodes"] > 1 else ""
    nodes = _table("nodes", "devices on each", "joined by", "network of a node")
    for row in value["nodes"]:
        nodes.add_row(str(row["count"]), f"{row['devices']} x {row['device']}", row["link"], row["network"])
    parts: list[Any] = [
        Text(f"{value['name']}: {value['num_devices']} devices on {value['num_nodes']} node{plural}", style="bold"),
        nodes,
    ]
    for device in value["devices"]:
        table = _table(device["name"], "", "source", right=1)
        for rate in device["rates"]:
            table.add_row(rate["what"], f"{rate['value']:,.4g} {rate['unit']}", Text(rate["source"], style="dim"))
        if device["measured_ops"]:
            table.add_row("measured ops", str(device["measured_ops"]), Text("the profile", style="dim"))
        parts += ["", table]
    links = _table("link", "each way", "latency", "source")
    for link in value["links"]:
        measured = f"; {link['measured_collectives']} collectives measured" if link["measured_collectives"] else ""
        links.add_row(link["name"], f"{link['gb_per_s']:,.4g} GB/s", f"{link['latency_us']:.3g} us",
                      Text(link["source"] + measured, style="dim"))
    return [*parts, "", links]


def _table(*names: str, right: int | None = None) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i == right else "left")
    return table
