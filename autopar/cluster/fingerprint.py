"""The identity of a cluster, by which a plan knows the machine that it was made for."""

from __future__ import annotations

import hashlib
import json

from autopar.cluster.cluster import Cluster


def cluster_fingerprint(cluster: Cluster) -> str:
    """16 hex digits for what the cluster is made of: its nodes in order, with the names of device, link and network.

    Rates, sources, prices and the cluster's own name are left out: measuring a machine changes what is believed of it,
    not which machine it is, and must not orphan its plans. Other hardware has other names: shorthand names a network
    after its rate, and a cluster file names what it overrides after the values.
    """
    nodes = [
        [node.num_devices, node.device.name, node.device.memory_bytes, node.link.name, node.network.name]
        for node in cluster.nodes
    ]
    text = json.dumps(nodes, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
