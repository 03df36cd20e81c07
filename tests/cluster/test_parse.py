"""Shorthand: what each form means, and one clear line for what is none."""

from pathlib import Path

import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.parse import parse_cluster, parse_rate_gbps
from autopar.errors import InputError


def shape(cluster: Cluster) -> list[tuple[str, int, str]]:
    return [(node.device.name, node.num_devices, node.network.name) for node in cluster.nodes]


@pytest.mark.parametrize(("text", "nodes"), [
    ("8xH100-80GB", [("H100-80GB", 8, "3200Gbps")]),
    ("16x8xH100-80GB", [("H100-80GB", 8, "3200Gbps")] * 16),
    ("2x8xH100", [("H100-80GB", 8, "3200Gbps")] * 2),
    ("16x8xA100-80GB@800Gbps", [("A100-80GB", 8, "800Gbps")] * 16),
    ("1x8xA100-80GB+2x4xV100-16GB@100Gbps", [("A100-80GB", 8, "100Gbps")] + [("V100-16GB", 4, "100Gbps")] * 2),
    ("8xT4@25Gbps + 1x8xL4@50Gbps", [("T4", 8, "25Gbps"), ("L4", 8, "50Gbps")]),
    ("4xCPU", [("CPU", 4, "10Gbps")]),
    ("32xH100-80GB", [("H100-80GB", 8, "3200Gbps")] * 4),
    ("2x2xRTX-4090@1.6Tbps", [("RTX-4090", 2, "1600Gbps")] * 2),
    ("72xGB200", [("GB200", 72, "28800Gbps")]),
    ("1x4xGB200", [("GB200", 4, "1600Gbps")]),
    ("18x4xGB200", [("GB200", 72, "28800Gbps")]),  # trays of one rack
    ("32x4xGB200@800Gbps", [("GB200", 64, "12800Gbps")] * 2),
    ("19x4xGB200", [("GB200", 72, "28800Gbps"), ("GB200", 4, "1600Gbps")]),
    ("2x8xGB200", [("GB200", 8, "3200Gbps")] * 2),  # hosts of eight are no trays
])
def test_shorthand(text: str, nodes: list[tuple[str, int, str]]) -> None:
    cluster = parse_cluster(text)
    assert cluster.name == text
    assert shape(cluster) == nodes


def test_network_rate_is_of_a_node_in_bytes() -> None:
    network = parse_cluster("16x8xA100-80GB@800Gbps").nodes[0].network
    assert network.bandwidth_bytes_per_s == 100e9
    assert network.latency_s > 0
    assert "given in the shorthand" in network.source


@pytest.mark.parametrize(("text", "gbps"), [("800Gbps", 800), ("1.6Tbps", 1600), ("200 Mb/s", 0.2), ("100gbit/s", 100)])
def test_rates(text: str, gbps: float) -> None:
    assert parse_rate_gbps(text) == pytest.approx(gbps)


@pytest.mark.parametrize(("text", "said"), [
    ("", "the cluster is empty: write for example"),
    ("foo", "cannot read 'foo': write for example 8xH100-80GB"),
    ("H100-80GB", "cannot read 'H100-80GB'"),
    ("8x", "cannot read '8x'"),
    ("8xH100-80GB+", "cannot read ''"),
    ("2x2x2xH100-80GB", "cannot read"),
    ("0x8xH100-80GB", "must be at least 1"),
    ("8x0xH100-80GB", "must be at least 1"),
    ("-8xH100-80GB", "must be at least 1"),
    ("8xH100-80GB@", "'' is not a network rate"),
    ("8xH100-80GB@fast", "'fast' is not a network rate: write for example 800Gbps"),
    ("8xH100-80GB@0Gbps", "must be positive"),
    ("8xH100-80GB@-3Gbps", "must be positive"),
    ("8xH100-80GB@1e999Gbps", "must be positive and finite"),
    ("8xH100-90GB", "unknown GPU 'H100-90GB': did you mean H100-80GB"),
    ("12xH100-80GB", "do not fill nodes of 8: write nodes x devices"),
    ("999999999x8xH100-80GB", "devices are more than"),
    ("9" * 5000 + "xH100-80GB", "cannot read"),
    ("local:0", "write local, or local:4"),
    ("local:many", "write local, or local:4"),
    ("local:" + "9" * 5000, "write local, or local:4"),
    ("no/such/file.yaml", "cannot read the cluster file no/such/file.yaml: No such file"),
])
def test_bad_shorthand_is_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("'", ".")) as caught:
        parse_cluster(text)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_cluster_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the cluster file"):
        parse_cluster(str(tmp_path))
