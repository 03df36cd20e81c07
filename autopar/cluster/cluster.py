"""The Cluster: devices, nodes and links as an immutable value.

Devices are numbered 0..n-1 in node order; a rank of the job is the index of its device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.cluster.measured import CollectiveFit, MeasuredOps

USABLE_MEMORY_FRACTION = 0.92  # assumed
MANY_GROUPS = 4096  # shapes of groups of ranks, kept at once


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceType:
    """What one device is. Rates are peaks, dense; `sources` says for each field where its value comes from."""

    name: str  # "H100-80GB"
    memory_bytes: int  # what the vendor states, in bytes
    memory_bandwidth_bytes_per_s: float
    peak_flops: tuple[tuple[str, float], ...]  # ("bfloat16", 989.4e12), ("float32", ...), ("tf32", ...), ...
    kernel_launch_s: float  # shortest time between two dependent kernels
    usable_memory_fraction: float = USABLE_MEMORY_FRACTION  # what the allocator can get, after context and reserve
    price_per_hour: float | None = None
    host_bandwidth_bytes_per_s: float | None = None  # to and from host memory, each way; None: unknown, or one memory
    host_memory_bytes: float | None = None  # this device's share of it; None: unknown
    speed_spread: float = 0.0  # standard deviation of the speed of products among devices of the kind, over its mean
    slowest_share: float = 1.0  # of the rate of products, what the slowest device of the job reaches: pace.py
    sources: tuple[tuple[str, str], ...] = ()
    measured: MeasuredOps | None = None  # times of single ops, from a profile

    @property
    def usable_memory_bytes(self) -> float:
        return self.memory_bytes * self.usable_memory_fraction

    def peak(self, dtype: str) -> float:
        """Peak dense FLOP/s of matrix products in `dtype` (falls back from unknown dtypes to float32)."""
        table = dict(self.peak_flops)
        return table.get(dtype, table["float32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Alpha-beta description of a link: one direction, of one device (inside a node) or of one node (network)."""

    name: str  # "NVLink4", "800Gbps", "PCIe4"
    latency_s: float
    bandwidth_bytes_per_s: float  # per direction, usable peak
    source: str = ""
    fits: tuple[CollectiveFit, ...] = ()  # measured collectives, by the shape of their group


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`num_devices` equal devices, joined by `link` (rate of one device), behind a `network` (rate of the node)."""

    device: DeviceType
    num_devices: int
    link: Link
    network: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """What a collective sees of a set of ranks: how they spread over nodes, and the slowest links between them.

    `network.bandwidth` is a whole node's; `per_node` members of the group on a node share it.
    """

    size: int
    num_nodes: int
    per_node: int  # most members on one node
    link: Link
    network: Link


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes in order. `name` is the text or file that it came from, for messages only."""

    name: str
    nodes: tuple[Node, ...]

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """Index of the node of each rank."""
        return tuple(i for i, node in enumerate(self.nodes) for _ in range(node.num_devices))

    @property
    def num_devices(self) -> int:
        return len(self.node_of)

    def device(self, rank: int) -> DeviceType:
        return self.nodes[self.node_of[rank]].device

    @cached_property
    def is_uniform(self) -> bool:
        return all(node == self.nodes[0] for node in self.nodes)

    @cached_property
    def _groups(self) -> dict[tuple[int, ...], GroupShape]:
        return {}

    def group(self, ranks: tuple[int, ...]) -> GroupShape:
        """The shape of the group of these ranks."""
        if (found := self._groups.get(ranks)) is None:
            if len(self._groups) >= MANY_GROUPS:
                self._groups.clear()
            found = self._groups[ranks] = self._group(ranks)
        return found

    def _group(self, ranks: tuple[int, ...]) -> GroupShape:
        counts: dict[int, int] = {}
        for rank in ranks:
            counts[self.node_of[rank]] = counts.get(self.node_of[rank], 0) + 1
        nodes = [self.nodes[i] for i in counts]
        return GroupShape(
            size=len(ranks), num_nodes=len(counts), per_node=max(counts.values()),
            link=min((n.link for n in nodes), key=lambda link: link.bandwidth_bytes_per_s),
            network=min((n.network for n in nodes), key=lambda link: link.bandwidth_bytes_per_s),
        )
