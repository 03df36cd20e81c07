"""The order of nodes that is searched: one of its own, so that the order in a cluster's file changes no plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster, Node
from autopar.plan.plan import Stage


def in_order(cluster: Cluster, dtype: str) -> tuple[Cluster, tuple[int, ...]]:
    """The cluster with its unlike nodes in order, and for each of its ranks the rank in the cluster as it is given.

    Nodes of the largest memory come first, where pipelines hold the most micro-batches; of these the fastest ones.
    """
    if cluster.is_uniform:
        return cluster, tuple(range(cluster.num_devices))
    indices = sorted(range(len(cluster.nodes)), key=lambda index: _key(cluster.nodes[index], dtype))
    firsts, first = [], 0
    for node in cluster.nodes:
        firsts.append(first)
        first += node.num_devices
    ranks = tuple(firsts[i] + own for i in indices for own in range(cluster.nodes[i].num_devices))
    return Cluster(name=cluster.name, nodes=tuple(cluster.nodes[i] for i in indices)), ranks


def _key(node: Node, dtype: str) -> tuple[float | str, ...]:
    device = node.device
    return (
        -device.usable_memory_bytes, -device.peak(dtype), -device.memory_bandwidth_bytes_per_s, -node.num_devices,
        device.name, -node.link.bandwidth_bytes_per_s, node.link.name, -node.network.bandwidth_bytes_per_s,
        node.network.name,
    )


def as_given(stage: Stage, ranks: Sequence[int]) -> Stage:
    """The stage on the ranks of the cluster as it is given, ascending on each axis, as process groups number them.

    Tensor groups, context groups and data ranks change places, with their rows. Groups keep their members, but where
    nodes of unlike sizes part them so that no order of them ascends.
    """
    mesh, inner = stage.mesh, stage.mesh.tp * stage.mesh.cp
    devices = tuple(ranks[device] for device in stage.devices)
    lanes = _sorted_lanes(devices, (mesh.tp, mesh.cp, mesh.dp_shard, mesh.dp_replicate))
    if not _ascend(devices, lanes, (mesh.tp, mesh.cp, mesh.dp_shard, mesh.dp_replicate)):
        lanes = _sorted_lanes(devices, (mesh.tp, mesh.cp, mesh.dp))
    if not _ascend(devices, lanes, (mesh.tp, mesh.cp, mesh.dp_shard, mesh.dp_replicate)):
        lanes = sorted(lanes, key=lambda lane: devices[lane])
    rows = tuple(stage.rows[lane // inner] for lane in lanes[::inner]) if stage.rows else ()
    return replace(stage, devices=tuple(devices[lane] for lane in lanes), rows=rows)


def _sorted_lanes(devices: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The lanes with the parts of each axis, the innermost first, in the order of their first devices."""
    lanes, size = list(range(len(devices))), 1
    for axis in sizes:
        for first in range(0, len(lanes), size * axis):
            parts = [lanes[at : at + size] for at in range(first, first + size * axis, size)]
            parts.sort(key=lambda part: devices[part[0]])
            lanes[first : first + size * axis] = [lane for part in parts for lane in part]
        size *= axis
    return lanes


def _ascend(devices: Sequence[int], lanes: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether devices ascend along each axis."""
    step = 1
    for size in sizes:
        for at, lane in enumerate(lanes):
            if at // step % size and devices[lanes[at - step]] > devices[lane]:
                return False
        step *= size
    return True
