"""The order of nodes that is searched: one of its own, so that the order in a cluster's file changes no plan."""

from __future__ import annotations

from autopar.cluster.cluster import Cluster, Node


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
