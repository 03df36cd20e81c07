"""Seconds that a collective takes, from the shape of its group: alpha-beta, hierarchical over nodes.

time = launch + hops * latency + t + fill * t / (t + settle), with t = bytes / rate.

*Bytes* are those of the bandwidth-optimal algorithms (rings and pairwise exchange; Thakur et al. 2005), counted for the
busiest device inside a node and for the busiest node on the network; the two levels work at the same time, so that the
slower of the two counts. *Hops* are a ring's, or twice a tree's depth for an all-reduce where that is less, as NCCL
chooses. *Fill*: a long message passes in chunks, and the first of them goes through all hops alone; chunks grow with
the message, so that all of the fill counts from a few times `settle` on. Constants below were calibrated on published
collective curves alone (`tests/benchmarks/bench_collectives.py` compares), never on training steps.
"""

from __future__ import annotations

import math

from autopar.cluster.cluster import GroupShape, Link
from autopar.cost_models.measured_links import fit_of
from autopar.sharding.reshard import Collective

# Share of a link's peak that a large collective reaches. NVLink: ring all-gather 361 of 450 GB/s on H200, all-reduce
# 235 of 300 on A100, 682 of 900 on B200 (stas00/ml-engineering, network/README.md), 133-140 of 150 on V100 (vTrain).
# Network: 0.84-0.86 of the node's rate on 8 H100 nodes of InfiniBand and 2 nodes of EFA. Infinity Fabric: 312 of 448
# GB/s on MI300X; PCIe assumed the same (range 0.4-0.8).
LINK_EFFICIENCY = {"NVLink2": 0.95, "NVLink3": 0.76, "NVLink5": 0.76, "NVLink": 0.80, "xGMI": 0.70, "PCIe": 0.70}
NETWORK_EFFICIENCY = 0.85
# Rings of few A100 reach less: 197 GB/s on 2, 212 on 3, 222 to 229 on more (vTrain's curves).
SMALL_RING_SHARE = {2: 0.87, 3: 0.93}
# NVLink switches that add (NVLS: 4 with more than 4 devices, 5 likewise): 473-480 on H200 where a ring reaches 366,
# 838 on B200 for 682.
NVLS_SPEEDUP = {"NVLink4": 1.30, "NVLink5": 1.23}
# An all-to-all against a ring at the same rate: 153 of 300 GB/s on 2 devices, 199 on 4, 195 on 8 (Galvatron's profile
# of A100-class devices), where rings reach 240.
ALL_TO_ALL_SHARE = 0.8
# Launch of a collective's kernel and its synchronization, beside its hops: 13 us for 8 bytes among 8 H100, of which
# 6 tree hops of 1.9 us; assumed for other devices (range 2-10 us).
LAUNCH_S = 4e-6
# Between nodes a proxy thread on the CPU drives the NIC: 70 us for 8 bytes on 2 nodes of H100 over EFA, 161 us on EFA's
# first version, of which hops explain 19 us; InfiniBand is faster (assumed 15 us, range 5-100 us).
NETWORK_LAUNCH_S = 15e-6
# Filling the pipeline, inside a node: 25 us and 5 us a step of the ring (2 (n - 1) for an all-reduce, half of them for
# half of it), from 5 us of transfer on; in the switch 75 us from 25 us on. A100: 48, 68 and 110 us more than bytes over
# rate for 16 MiB on 2, 4 and 8 devices (vTrain's curves), H100 with NVLS 23, 52 and 75 us for 1, 8 and 64 MiB
# (dgxc-benchmarking).
RING_FILL_S, RING_STEP_S, RING_SETTLE_S = 25e-6, 5e-6, 5e-6
SWITCH_FILL_S, SWITCH_SETTLE_S = 75e-6, 25e-6
# Between nodes: 270 us from 70 us on over EFA (2 nodes of H100), less over InfiniBand: 200 for both (range 80-300).
NETWORK_FILL_S, NETWORK_SETTLE_S = 200e-6, 70e-6
# Links without a switch. Infinity Fabric: a device has one of its 7 links to each other device. NVLink2: the hybrid
# cube mesh of a DGX-1V, by devices in the group (vTrain's all-reduce curves: 22 GB/s on 2, 85 on 4, 133 on 8).
CUBE_MESH_SHARE = {2: 0.16, 3: 0.32, 4: 0.60, 5: 0.26, 6: 0.32, 7: 0.60}
# One NIC is at most 400 Gb/s, and one device's share of a collective passes through one NIC.
NIC_BYTES_PER_S = 50e9


def is_measured(link: Link) -> bool:
    """Whether the link's rate is what messages were seen to reach, not a vendor's peak."""
    return link.source.removeprefix("bandwidth ").startswith("measured")


def link_efficiency(link: Link) -> float:
    """The share of the link's stated rate that large messages reach; 1 where the rate was measured."""
    if is_measured(link):
        return 1.0
    for prefix, value in LINK_EFFICIENCY.items():
        if link.name.startswith(prefix):
            return value
    return 1.0


def link_rate(group: GroupShape) -> float:
    """Bytes a second that one device of the group moves to and from the others on its node."""
    link, members = group.link, group.per_node
    rate = link.bandwidth_bytes_per_s * link_efficiency(link)
    if link.name.startswith("xGMI"):
        rate *= min(1.0, max(1, members - 1) / 7)
    elif link.name.startswith("NVLink2"):
        rate *= CUBE_MESH_SHARE.get(members, 1.0)
    elif link.name.startswith("NVLink3"):
        rate *= SMALL_RING_SHARE.get(members, 1.0)
    return rate


def network_rate(group: GroupShape, groups_per_node: int = 1) -> float:
    """Bytes a second that one group moves out of a node which `groups_per_node` such groups share."""
    efficiency = 1.0 if is_measured(group.network) else NETWORK_EFFICIENCY
    share = group.network.bandwidth_bytes_per_s / max(1, groups_per_node)
    return efficiency * min(share, max(1, group.per_node) * NIC_BYTES_PER_S)


def collective_time_s(
    kind: Collective, size_bytes: float, group: GroupShape | None, *, groups_per_node: int = 1
) -> float:
    """Seconds of one collective on a tensor of `size_bytes` as a whole (before scattering, after gathering).

    For a neighbour or mirrored exchange or a ring's shift, `size_bytes` is what one rank sends; it takes as long as its
    slowest pair, which lies on two nodes if the group does. All devices of a node that mirror others send over its
    network at once.

    `groups_per_node`: how many such groups use a node's network at the same time (8 for the data groups of a tp-8
    node). No group, or a group of one, takes no time.
    """
    if group is None or group.size <= 1 or size_bytes <= 0:
        return 0.0
    kind = Collective(kind)
    fit = fit_of(kind, group, groups_per_node=groups_per_node)
    if fit is not None:
        return fit.time_s(size_bytes)
    if kind is Collective.SEND_RECV:
        return send_recv_time_s(size_bytes, group, flows_per_node=groups_per_node)
    if kind in (Collective.NEIGHBOUR_EXCHANGE, Collective.MIRRORED_EXCHANGE, Collective.RING_SHIFT):
        groups_per_node *= group.per_node if kind is Collective.MIRRORED_EXCHANGE else 1
        launch = LAUNCH_S + (NETWORK_LAUNCH_S if group.num_nodes > 1 and not is_measured(group.network) else 0.0)
        return launch + send_recv_time_s(size_bytes, group, flows_per_node=groups_per_node)
    n, nodes, inner = group.size, group.num_nodes, group.per_node
    rounds = 2 if kind is Collective.ALL_REDUCE else 1
    if kind is Collective.ALL_TO_ALL:
        device_bytes = size_bytes / n * (inner - 1) / n  # to the other devices of the node
        node_bytes = inner * size_bytes / n * (n - inner) / n
    else:
        device_bytes = rounds * size_bytes * ((n - 1) / n if inner > 1 else 0.0)
        node_bytes = rounds * size_bytes * (nodes - 1) / nodes
    rate = link_rate(group)
    speedup = nvls_speedup(kind, group)
    if kind is Collective.ALL_TO_ALL and not is_measured(group.link):
        rate *= ALL_TO_ALL_SHARE
    inner_s = device_bytes / (rate * speedup)
    network_s = node_bytes / network_rate(group, groups_per_node) if nodes > 1 else 0.0
    full_s = max(inner_s, network_s)
    return latency_s(kind, group) + full_s + _fill_s(kind, group, full_s)


def nvls_speedup(kind: Collective, group: GroupShape) -> float:
    """How much faster than a ring's the switches reduce; 1 where they don't, or where NCCL takes the ring."""
    if kind is not Collective.ALL_REDUCE or group.per_node <= 4:
        return 1.0
    return next((value for prefix, value in NVLS_SPEEDUP.items() if group.link.name.startswith(prefix)), 1.0)


def _fill_s(kind: Collective, group: GroupShape, full_s: float) -> float:
    """What filling the pipeline takes; links whose rate was measured have it in their latency."""
    if full_s <= 0 or is_measured(group.link if group.num_nodes == 1 else group.network):
        return 0.0
    if group.num_nodes > 1:
        return NETWORK_FILL_S * full_s / (full_s + NETWORK_SETTLE_S)
    if nvls_speedup(kind, group) > 1.0:
        return SWITCH_FILL_S * full_s / (full_s + SWITCH_SETTLE_S)
    steps = (2 if kind is Collective.ALL_REDUCE else 1) * (group.size - 1)
    return (RING_FILL_S + RING_STEP_S * steps) * full_s / (full_s + RING_SETTLE_S)


def latency_s(kind: Collective, group: GroupShape) -> float:
    """Seconds that an empty collective takes: hops inside and between nodes."""
    n, nodes = group.size, group.num_nodes
    launch = LAUNCH_S + (NETWORK_LAUNCH_S if nodes > 1 and not is_measured(group.network) else 0.0)
    ring = (n - nodes) * group.link.latency_s + (nodes - 1) * group.network.latency_s
    if nodes > 1:
        ring += group.network.latency_s  # the ring's way back to the first node
    if kind is Collective.ALL_REDUCE:
        depth = math.ceil(math.log2(group.per_node)) if group.per_node > 1 else 0
        tree = depth * group.link.latency_s + math.ceil(math.log2(nodes)) * group.network.latency_s
        return launch + 2 * min(ring, tree)
    return launch + ring


def send_recv_time_s(size_bytes: float, group: GroupShape, *, flows_per_node: int = 1) -> float:
    """Seconds that one message between two devices takes; `flows_per_node` such messages share a node's network."""
    if size_bytes <= 0:
        return 0.0
    fit = fit_of(Collective.SEND_RECV, group, groups_per_node=flows_per_node)
    if fit is not None:
        return fit.time_s(size_bytes)
    if group.num_nodes == 1:
        return group.link.latency_s + size_bytes / link_rate(group)
    share = group.network.bandwidth_bytes_per_s / max(1, flows_per_node)
    rate = min(share, NIC_BYTES_PER_S) * (1.0 if is_measured(group.network) else NETWORK_EFFICIENCY)
    return group.network.latency_s + size_bytes / rate
