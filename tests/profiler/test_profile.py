"""The Profile: fit, file, the cluster that takes it, and one short measurement with real processes."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import cluster_from_json, cluster_to_json
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.cluster.local import local_cluster
from autopar.cluster.parse import parse_cluster
from autopar.errors import AutoparError, InputError
from autopar.profiler import (
    LinkFit,
    MatmulRate,
    Profile,
    apply_profile,
    load_profile,
    local,
    ops,
    profile_from_json,
    profile_local,
    profile_to_json,
    save_profile,
)
from autopar.profiler.fit import fit_link

SIZES = (1024, 4096, 2**18, 2**20, 2**22, 2**24)


def profile(num_processes: int = 4, device: str = "CPU") -> Profile:
    fit = fit_link({size: 1e-4 + size / 1e9 for size in SIZES}, backend="gloo")
    return Profile(
        device=device, machine="a machine, 2 cores", torch_version="2.13.0", date="2026-01-02",
        num_processes=num_processes, num_threads=1,
        matmul=(MatmulRate(dtype="float32", size=256, flops_per_s=3e10),
                MatmulRate(dtype="float32", size=768, flops_per_s=5e10),
                MatmulRate(dtype="bfloat16", size=768, flops_per_s=9e10)),
        memory_bandwidth_bytes_per_s=8e9, launch_s=3e-6, send_recv=fit, all_reduce=fit, measuring_s=9.0,
    )


def test_fit_finds_latency_and_rate() -> None:
    fit = fit_link({size: 2e-4 + size / 2e9 for size in SIZES}, backend="gloo")
    assert fit.latency_s == pytest.approx(2e-4, rel=1e-6)
    assert fit.bytes_per_s == pytest.approx(2e9, rel=1e-6)
    assert fit.relative_error < 1e-6


def test_fit_reports_its_error_and_survives_noise() -> None:
    times = {size: (2e-4 + size / 2e9) * (1.2 if i % 2 else 0.8) for i, size in enumerate(SIZES)}
    fit = fit_link(times, backend="gloo")
    assert 0.05 < fit.relative_error < 0.5
    assert fit.bytes_per_s == pytest.approx(2e9, rel=0.5)
    flat = fit_link(dict.fromkeys(SIZES, 0.001), backend="gloo")
    assert flat.bytes_per_s > 0
    assert flat.latency_s >= 0


def test_file_round_trip(tmp_path: Path) -> None:
    save_profile(profile(), tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile()
    single = replace(profile(1), send_recv=None, all_reduce=None)
    assert profile_from_json(profile_to_json(single)) == single


@pytest.mark.parametrize(("change", "said"), [
    ({"format": "other"}, "not a profile of autopar"), ({"version": 7}, "version 7 is not supported"),
    ({"launch_s": -1.0}, "not positive"), ({"matmul": "x"}, "matmul: "), ({"num_processes": 0}, "not positive"),
])
def test_bad_profiles_are_one_line(change: dict[str, object], said: str) -> None:
    text = json.dumps(json.loads(profile_to_json(profile())) | change)
    with pytest.raises(InputError, match=said) as caught:
        profile_from_json(text, where="p.json")
    assert str(caught.value).startswith("p.json")
    assert "\n" not in str(caught.value)


def test_cut_and_missing_profiles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not JSON"):
        profile_from_json(profile_to_json(profile())[:100])
    with pytest.raises(InputError, match="cannot read the profile"):
        load_profile(tmp_path / "none.json")


def test_applied_rates_are_measured_ones_and_say_so() -> None:
    cluster = local_cluster(4, device="cpu")
    measured = profile().apply(cluster)
    node = measured.nodes[0]
    assert dict(node.device.peak_flops)["float32"] == 5e10  # the best size
    assert node.device.peak("bfloat16") == 9e10
    assert node.device.peak("float64") == cluster.nodes[0].device.peak("float64")
    assert (node.device.memory_bandwidth_bytes_per_s, node.device.kernel_launch_s) == (8e9, 3e-6)
    assert node.device.memory_bytes == cluster.nodes[0].device.memory_bytes
    sources = dict(node.device.sources)
    for field in ("peak_flops.float32", "peak_flops.bfloat16", "memory_bandwidth_bytes_per_s", "kernel_launch_s"):
        assert sources[field].startswith("measured on 2026-01-02")
    assert sources["peak_flops.float64"].startswith("assumed")
    assert node.link.source.startswith("measured")
    assert node.link.bandwidth_bytes_per_s == pytest.approx(1e9 * 2 * 3 / 4)
    assert node.link.latency_s == pytest.approx(1e-4 / 4)
    assert node.network == cluster.nodes[0].network
    assert cluster_fingerprint(measured) == cluster_fingerprint(cluster)
    assert cluster_from_json(cluster_to_json(measured)) == measured


def test_profiles_of_other_machines_are_refused() -> None:
    with pytest.raises(InputError, match="the profile is of CPU, cluster '8xT4' has T4"):
        apply_profile(parse_cluster("8xT4"), profile())
    with pytest.raises(InputError, match="4 CPU processes at a time, the node has 2"):
        apply_profile(local_cluster(2, device="cpu"), profile())


def test_only_the_profiled_devices_of_a_mixed_cluster_change() -> None:
    cluster = parse_cluster("1x8xT4+1x4xL4@100Gbps")
    measured = apply_profile(cluster, profile(device="T4"))
    assert measured.nodes[0] != cluster.nodes[0]
    assert measured.nodes[1] == cluster.nodes[1]
    assert isinstance(measured, Cluster)


@pytest.mark.parametrize("arguments", [
    {"num_processes": 0}, {"num_processes": 1, "budget_s": 0.0}, {"num_processes": 1, "dtypes": ("int8", "float32")},
    {"num_processes": 1, "dtypes": ("float64",)}, {"num_processes": 1, "device": "tpu"},
    {"num_processes": 1, "num_threads": 0},
])
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match="profile: "):
        profile_local(**arguments)  # type: ignore[arg-type]


def test_op_rates_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e7 < ops.matmul_flops_per_s(64, torch.float32, cpu, 0.01) < 1e14
    assert 1e8 < ops.memory_bytes_per_s(cpu, 0.01) < 1e13
    assert 1e-8 < ops.launch_s(cpu, 0.01) < 1e-2


def test_two_processes_are_measured_together() -> None:
    start = time.perf_counter()
    found = profile_local(2, budget_s=0.5, dtypes=("float32",), device="cpu", num_threads=1, date="today")
    assert time.perf_counter() - start < 60
    assert (found.device, found.num_processes, found.num_threads, found.date) == ("CPU", 2, 1, "today")
    assert found.peak_flops()["float32"] > 1e8
    for fit in (found.send_recv, found.all_reduce):
        assert isinstance(fit, LinkFit)
        assert fit.backend == "gloo"
        assert fit.bytes_per_s > 1e6
        assert len(fit.points) == len(SIZES)
    assert profile_from_json(profile_to_json(found)) == found
    assert found.apply(local_cluster(2, device="cpu")).nodes[0].link.source.startswith("measured on today")


def dies(rank: int, job: local._Job) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def test_a_process_that_dies_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_process", dies)
    start = time.perf_counter()
    with pytest.raises(AutoparError, match="profiling failed: process 1") as caught:
        profile_local(2, budget_s=0.5, device="cpu")
    assert time.perf_counter() - start < 30
    assert "\n" not in str(caught.value)
