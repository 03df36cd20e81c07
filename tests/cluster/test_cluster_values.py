"""GroupShape, the fingerprint, and this machine as a cluster."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import cluster_from_yaml
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.cluster.local import local_cluster, match_cuda_device, num_cores, total_memory_bytes
from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError


@pytest.mark.parametrize(("ranks", "size", "num_nodes", "per_node"), [
    ((0,), 1, 1, 1),
    (tuple(range(8)), 8, 1, 8),
    (tuple(range(32)), 32, 4, 8),
    ((0, 8, 16, 24), 4, 4, 1),
    ((6, 7, 8), 3, 2, 2),
    ((31, 0), 2, 2, 1),
])
def test_group_shape(ranks: tuple[int, ...], size: int, num_nodes: int, per_node: int) -> None:
    group = parse_cluster("4x8xH100-80GB").group(ranks)
    assert (group.size, group.num_nodes, group.per_node) == (size, num_nodes, per_node)
    assert group.link.name == "NVLink4"


def test_group_over_mixed_nodes_has_the_slowest_links() -> None:
    cluster = parse_cluster("1x8xA100-80GB@400Gbps+2x4xV100-16GB@100Gbps")
    assert cluster.node_of == (0,) * 8 + (1,) * 4 + (2,) * 4
    assert [cluster.device(rank).name for rank in (0, 7, 8, 15)] == ["A100-80GB"] * 2 + ["V100-16GB"] * 2
    fast, mixed = cluster.group((0, 1)), cluster.group((7, 8))
    assert (fast.link.name, fast.network.name) == ("NVLink3", "400Gbps")
    assert (mixed.link.name, mixed.network.name) == ("NVLink2", "100Gbps")
    assert not cluster.is_uniform
    assert parse_cluster("2x8xT4").is_uniform


def test_fingerprint_is_of_the_hardware_and_not_of_its_name_or_rates() -> None:
    cluster = parse_cluster("2x8xH100-80GB")
    print_ = cluster_fingerprint(cluster)
    assert cluster_fingerprint(Cluster(name="other", nodes=cluster.nodes)) == print_
    node = cluster.nodes[0]
    measured = replace(node, device=replace(node.device, memory_bandwidth_bytes_per_s=3e12, sources=()))
    assert cluster_fingerprint(Cluster(name="", nodes=(measured, measured))) == print_
    for text in ("8xH100-80GB", "3x8xH100-80GB", "2x4xH100-80GB", "2x8xH200", "2x8xH100-80GB@800Gbps", "16xH100-80GB"):
        same = text == "16xH100-80GB"  # spread over two full nodes
        assert (cluster_fingerprint(parse_cluster(text)) == print_) is same


def test_fingerprint_sees_overrides_and_ignores_the_order_of_keys() -> None:
    def of(device: str) -> str:
        return cluster_fingerprint(cluster_from_yaml(f"nodes: [{{devices: 2, device: {device}}}]"))

    one = of("{preset: T4, memory_bandwidth_gb_per_s: 300, kernel_launch_us: 6}")
    assert one == of("{kernel_launch_us: 6, preset: T4, memory_bandwidth_gb_per_s: 300}")
    assert one != of("{preset: T4, memory_bandwidth_gb_per_s: 301, kernel_launch_us: 6}")
    assert one != of("T4")


def test_fingerprint_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from autopar.cluster.parse import parse_cluster;from autopar.cluster.fingerprint import cluster_fingerprint;"
        "print(cluster_fingerprint(parse_cluster('2x8xH100-80GB')))"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {cluster_fingerprint(parse_cluster("2x8xH100-80GB"))}


def test_cpu_processes_share_the_machine() -> None:
    one, four = local_cluster(1, device="cpu"), local_cluster(4, device="cpu")
    assert (one.num_devices, four.num_devices) == (1, 4)
    assert four.nodes[0].device.memory_bytes == total_memory_bytes() // 4
    assert four.nodes[0].device.peak("float32") == pytest.approx(one.nodes[0].device.peak("float32") / 4)
    assert local_cluster(device="cpu").num_devices == num_cores()
    assert all(text.startswith(("assumed", "measured")) for _, text in four.nodes[0].device.sources)


@pytest.mark.parametrize(("name", "gib", "preset"), [
    ("NVIDIA H100 80GB HBM3", 79.2, "H100-80GB"), ("NVIDIA H100", 95.0, "H100-96GB-500W"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"), ("Tesla T4", 14.6, "T4"), ("NVIDIA L4", 22.0, "L4"),
    ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"), ("NVIDIA H200", 139.8, "H200"),
    ("NVIDIA GeForce RTX 4090", 23.5, "RTX-4090"), ("NVIDIA H100", 79.2, None), ("Some Card", 8, None),
])
def test_cuda_devices_by_name(name: str, gib: float, preset: str | None) -> None:
    found = match_cuda_device(name, int(gib * 1024**3))
    assert (found.name if found else None) == preset
    if found:
        assert found.memory_bytes == int(gib * 1024**3)


def test_bad_local_requests() -> None:
    with pytest.raises(InputError, match="at least 1"):
        local_cluster(0)
    with pytest.raises(InputError, match="neither"):
        local_cluster(1, device="tpu")
