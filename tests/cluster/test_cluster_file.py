"""Cluster files: the YAML schema, its errors with file and line, and the exact JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import cluster_from_json, cluster_from_yaml, cluster_to_json, save_cluster
from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError

MIXED = """
name: lab
nodes:
  - count: 2
    devices: 8
    device: H100-80GB
  - devices: 4
    device:
      preset: A100-80GB
      memory_gib: 76
      peak_tflops: {bfloat16: 280}
      price_per_hour: 1.8
    link: PCIe4
    network: 200Gbps
  - devices: 2
    device: {name: X1, memory_gib: 10, memory_bandwidth_gb_per_s: 100, peak_tflops: {float32: 5}}
    link: {bandwidth_gb_per_s: 12, latency_us: 3}
    network: {gbps: 50, latency_us: 20}
"""


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(MIXED)
    cluster = parse_cluster(str(path))
    assert cluster.name == "lab"
    assert cluster.num_devices == 22
    assert cluster.nodes[0] == cluster.nodes[1] == parse_cluster("2x8xH100-80GB").nodes[0]
    mine = cluster.nodes[2].device
    assert mine.name.startswith("A100-80GB+")
    assert (mine.memory_bytes, mine.peak("bfloat16"), mine.peak("float32")) == (76 * 1024**3, 280e12, 19.5e12)
    assert mine.price_per_hour == 1.8
    sources = dict(mine.sources)
    assert sources["peak_flops.bfloat16"] == sources["memory_bytes"] == f"given in {path}"
    assert sources["peak_flops.float32"].startswith("vendor: NVIDIA A100")
    assert cluster.nodes[2].link.name == "PCIe4"
    assert cluster.nodes[2].network.bandwidth_bytes_per_s == 25e9
    last = cluster.nodes[3]
    assert (last.device.name, last.link.latency_s, last.network.latency_s) == ("X1", 3e-6, 20e-6)
    assert last.device.peak("bfloat16") == 5e12


@pytest.mark.parametrize(("text", "said"), [
    ("nodes: [", "c.yaml, line 1: not YAML"),
    ("nodes:\n\t- x", "c.yaml, line 2: not YAML"),
    ("- 1", "c.yaml: a cluster file is a mapping"),
    ("", "c.yaml: a cluster file is a mapping"),
    ("nodes: []", "c.yaml, line 1: nodes: "),
    ("name: a", "c.yaml, line 1: nodes: it is missing"),
    ("nodes: " + "[" * 3000, "c.yaml: nested too deep"),
    ("nodes: [{devices: 1, device: T4}]\nnodes: [{devices: 2, device: T4}]", "c.yaml, line 2: nodes: given twice"),
    ("nodes: [{devices: 1, devices: 2, device: T4}]", "c.yaml, line 1: devices: given twice"),
    ("a: &a [*a]\nnodes: *a", "c.yaml, line 1: a: unknown key"),
    ("nodes:\n  - 7", "c.yaml, line 2: nodes.0: give a mapping with keys"),
    ("nodes:\n  - devices: 2\n    device: {preset: T4, peak_tflops: {bf17: 3}}",
     "c.yaml, line 3: nodes.0.device: peak_tflops has an unknown dtype 'bf17': use float64, "),
    ("version: 2\nnodes: [{devices: 1, device: T4}]", "c.yaml, line 1: version: "),
    ("nodes:\n  - devices: 0\n    device: T4", "c.yaml, line 2: nodes.0.devices: "),
    ("nodes:\n  - devices: -1\n    device: T4", "c.yaml, line 2: nodes.0.devices: "),
    ("nodes:\n  - devices: yes\n    device: T4", "c.yaml, line 2: nodes.0.devices: "),
    ("nodes:\n  - devices: 2\n    device: T5", "c.yaml, line 3: nodes.0.device: unknown GPU 'T5': did you mean T4"),
    ("nodes:\n  - devices: 2\n    divice: T4", "c.yaml, line 3: nodes.0.divice: unknown key"),
    ("nodes:\n  - devices: 2\n    device:\n      preset: T4\n      memory_gib: -1",
     "c.yaml, line 5: nodes.0.device.memory_gib: "),
    ("nodes:\n  - devices: 2\n    device: T4\n    network: fast", "c.yaml, line 4: nodes.0.network: 'fast' is not"),
    ("nodes:\n  - devices: 2\n    device: T4\n    link: NVLink9", "c.yaml, line 4: nodes.0.link: unknown link"),
    ("nodes:\n  - devices: 2\n    device: {name: X}", "c.yaml, line 3: nodes.0.device: give a preset, or also memory"),
    ("nodes:\n  - devices: 2000000\n    device: T4", "c.yaml: 2000000 devices are more than"),
])
def test_bad_yaml_names_file_and_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        cluster_from_yaml(text, where="c.yaml")
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_short_dtypes_are_understood() -> None:
    text = "nodes: [{devices: 1, device: {preset: H100-80GB, peak_tflops: {bf16: 100}}}]"
    assert cluster_from_yaml(text).device(0).peak("bfloat16") == 100e12


@pytest.mark.parametrize("text", ["8xH100-80GB", "1x8xA100-80GB+2x4xV100-16GB@100Gbps", "local:3"])
def test_json_round_trip(text: str, tmp_path: Path) -> None:
    cluster = parse_cluster(text)
    assert cluster_from_json(cluster_to_json(cluster)) == cluster
    save_cluster(cluster, tmp_path / "c.json")
    assert parse_cluster(str(tmp_path / "c.json")) == cluster


def test_json_round_trip_of_a_yaml_cluster() -> None:
    cluster = cluster_from_yaml(MIXED)
    assert cluster_from_json(cluster_to_json(cluster)) == cluster


def test_json_stays_small_for_equal_nodes() -> None:
    assert len(cluster_to_json(parse_cluster("1024x8xH100-80GB"))) < 10_000


def bad_json(change: str) -> str:
    data = json.loads(cluster_to_json(parse_cluster("8xT4")))
    if change == "foreign":
        return json.dumps({"stages": []})
    if change == "version":
        data["version"] = 99
    elif change == "negative":
        data["nodes"][0]["node"]["device"]["memory_bytes"] = -5
    elif change == "missing":
        del data["nodes"][0]["node"]["link"]
    text = json.dumps(data)
    return text[: len(text) // 2] if change == "cut" else text


def test_json_nested_too_deep_is_one_line() -> None:
    with pytest.raises(InputError, match="nested too deep"):
        cluster_from_json("[" * 100_000, where="c.json")


@pytest.mark.parametrize(("change", "said"), [
    ("foreign", "not a cluster file of autopar"), ("version", "version 99 is not supported"),
    ("negative", "memory_bytes of T4 is -5"), ("missing", "nodes.0.node.link: "), ("cut", "line 1: not JSON"),
])
def test_bad_json_is_one_line(change: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        cluster_from_json(bad_json(change), where="c.json")
    assert str(caught.value).startswith("c.json")
    assert "\n" not in str(caught.value)


def test_name_does_not_change_what_is_saved_of_the_nodes() -> None:
    cluster = parse_cluster("8xT4")
    other = Cluster(name="other", nodes=tuple(replace(node) for node in cluster.nodes))
    assert json.loads(cluster_to_json(cluster))["nodes"] == json.loads(cluster_to_json(other))["nodes"]
