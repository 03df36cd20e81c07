"""A cluster of the same nodes, but of another number of them."""

from __future__ import annotations

from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.cluster.pace import at_the_slowest
from autopar.cluster.parse import check_num_devices, shorthand_group
from autopar.errors import InputError


def with_nodes(cluster: Cluster, num_nodes: int) -> Cluster:
    """`num_nodes` nodes like those of `cluster`, which must be alike; InputError where they are not.

    The name of a cluster in shorthand becomes the shorthand of the new one; else it says what was repeated.
    """
    if num_nodes < 1:
        raise InputError(f"{num_nodes} nodes: a cluster has at least 1")
    if not cluster.is_uniform:
        raise InputError(f"cluster {cluster.name} has unlike nodes: which of them to repeat is not known; give each "
                         "size as a --cluster of its own")
    if num_nodes == len(cluster.nodes):
        return cluster
    node = cluster.nodes[0]
    if node.network.name.startswith("PCIe"):
        raise InputError(f"cluster {cluster.name} is one machine whose NVLinks join parts of it: how others would be "
                         "joined to it is not known; describe them in a cluster file")
    check_num_devices(num_nodes * node.num_devices, f"{num_nodes} nodes of cluster {cluster.name}")
    group = shorthand_group(cluster.name)
    name = f"{num_nodes} nodes of {cluster.name}"
    if group is not None:
        device, rate = group
        name = f"{num_nodes}x{node.num_devices}x{device}" + (f"@{rate}" if rate else "")
    return at_the_slowest(replace(cluster, name=name, nodes=(node,) * num_nodes))
