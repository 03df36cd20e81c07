"""All devices of a job wait for the slowest of their kind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import cluster_from_json, cluster_to_json, save_cluster
from autopar.cluster.pace import at_the_slowest, expected_maximum
from autopar.cluster.parse import parse_cluster
from autopar.cluster.resize import with_nodes
from autopar.cost_models.compute import attention_efficiency, matmul_efficiency, memory_bandwidth
from autopar.errors import InputError


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_the_expected_maximum_is_that_of_many_draws(count: int) -> None:
    draws = random.Random(0)
    seen = fmean(max(draws.gauss(0, 1) for _ in range(count)) for _ in range(4000))
    assert expected_maximum(count) == pytest.approx(seen, abs=0.06)


def share(text: str, rank: int = 0) -> float:
    return parse_cluster(text).device(rank).slowest_share


def test_more_devices_of_a_kind_are_slower() -> None:
    assert share("1xA100-80GB") == 1.0
    assert share("8xA100-80GB") == pytest.approx(1 / (1 + 0.015 * expected_maximum(8)))
    assert share("64x8xA100-80GB") < share("8x8xA100-80GB") < share("8xA100-80GB")
    assert share("local:4") == 1.0, "nothing is known of a CPU's cores"


def test_each_kind_counts_its_own() -> None:
    mixed = parse_cluster("2x8xH100-80GB + 8xA100-80GB + 2x8xH100-80GB")
    assert mixed.device(0) == mixed.device(39)
    assert mixed.device(0).slowest_share == share("4x8xH100-80GB")
    assert mixed.device(16).slowest_share == share("8xA100-80GB")


def test_a_part_keeps_the_pace_of_the_whole_and_a_larger_cluster_has_its_own() -> None:
    assert share("4x8xH100-80GB#0-7") == share("4x8xH100-80GB")
    assert with_nodes(parse_cluster("4x8xH100-80GB"), 16).device(0).slowest_share == share("16x8xH100-80GB")


def test_once_is_as_good_as_twice_and_files_keep_it(tmp_path: Path) -> None:
    whole = parse_cluster("4x8xH100-80GB")
    assert at_the_slowest(whole) == whole
    assert cluster_from_json(cluster_to_json(whole)) == whole
    save_cluster(whole, tmp_path / "lab.json")
    assert parse_cluster(str(tmp_path / "lab.json")) == whole


def test_only_what_computes_is_slower() -> None:
    alone, many = parse_cluster("1xH100-80GB").device(0), parse_cluster("8x8xH100-80GB").device(0)
    assert matmul_efficiency(many, 4096, 4096, 4096) == pytest.approx(
        many.slowest_share * matmul_efficiency(alone, 4096, 4096, 4096))
    assert attention_efficiency(many, 128)[0] == pytest.approx(many.slowest_share * attention_efficiency(alone, 128)[0])
    assert memory_bandwidth(many) == memory_bandwidth(alone)


def test_a_cluster_file_says_how_much_its_devices_differ(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text("nodes: [{count: 4, devices: 8, device: {preset: H100-80GB, speed_spread: 0.0}}]\n")
    assert share(str(file)) == 1.0
    file.write_text("nodes: [{count: 4, devices: 8, device: {preset: H100-80GB, speed_spread: 7}}]\n")
    with pytest.raises(InputError, match="speed_spread"):
        parse_cluster(str(file))
    node = parse_cluster("8xH100-80GB").nodes[0]
    bad = Cluster(name="x", nodes=(replace(node, device=replace(node.device, speed_spread=2.0)),))
    with pytest.raises(InputError, match=r"speed_spread of H100-80GB is 2\.0"):
        cluster_from_json(cluster_to_json(bad))
