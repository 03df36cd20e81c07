"""The slowest of many devices: all of a job wait for it in every step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import NormalDist

from autopar.cluster.cluster import Cluster, DeviceType


def expected_maximum(count: int) -> float:
    """How far the largest of `count` independent normal values is above their mean, expected, in standard deviations.

    Blom's approximation of normal order statistics (1958), within 2% of a standard deviation; 0 for one value.
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def at_the_slowest(cluster: Cluster) -> Cluster:
    """The cluster with each device's `slowest_share` set by how many of its kind there are; the same if set already.

    Chips of one kind reach different clocks within the same power, so that long products take longer on some of them,
    while what memory binds does not. Times are taken to be normal, `speed_spread` of the mean their deviation.
    """
    distinct = {id(node): node for node in cluster.nodes}
    counts: Counter[DeviceType] = Counter()
    for key, number in Counter(map(id, cluster.nodes)).items():
        counts[distinct[key].device] += number * distinct[key].num_devices
    paced = {
        device: replace(device, slowest_share=1 / (1 + device.speed_spread * expected_maximum(count)))
        for device, count in counts.items()
    }
    nodes = {key: replace(node, device=paced[node.device]) for key, node in distinct.items()}
    return replace(cluster, nodes=tuple(nodes[id(node)] for node in cluster.nodes))
