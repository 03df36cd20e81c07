"""The Profile: fit, file, the cluster that takes it, and one short measurement with real processes."""

import json
import os
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import cluster_from_json, cluster_to_json
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.cluster.local import local_cluster
from autopar.cluster.measured import CollectiveFit, OpSample, OpTensor, Piece
from autopar.cluster.parse import parse_cluster
from autopar.errors import AutoparError, InputError
from autopar.profiler import (
    LinkFit,
    MatmulRate,
    Profile,
    apply_profile,
    load_profile,
    local,
    merge_profiles,
    ops,
    profile_from_json,
    profile_local,
    profile_to_json,
    save_profile,
)
from autopar.profiler.collect import collect
from autopar.profiler.fit import fit_link
from autopar.profiler.local import ProfileInterrupted
from autopar.profiler.profile import with_ops
from autopar.profiler.worker import UNIT, Job, RuntimeCase, apart

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


def sample(numel: int, forward_s: float) -> OpSample:
    return OpSample(
        target="aten.silu.default", settings="*", dtype="float32", forward_s=forward_s, backward_s=2 * forward_s,
        operands=(OpTensor(shape=(numel,), dtype="float32", requires_grad=True),),
        outputs=(OpTensor(shape=(numel,), dtype="float32", requires_grad=True),),
    )


def collective(num_ranks: int, rate: float) -> CollectiveFit:
    return CollectiveFit(
        collective="all_reduce", backend="gloo", num_ranks=num_ranks, num_nodes=1, per_node=num_ranks,
        groups_per_node=1, pieces=(Piece(from_bytes=0.0, latency_s=1e-4, bytes_per_s=rate),), relative_error=0.01,
        points=((1024, 1e-4),),
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
    full = with_ops(profile(), tuple(sample(2**n, 1e-9 * 2**n) for n in range(6)), (collective(2, 1e9),))
    assert full.ops.errors
    assert profile_from_json(profile_to_json(full)) == full
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


def test_merged_profiles_keep_all_and_the_later_wins() -> None:
    first = with_ops(profile(), (sample(64, 1.0), sample(128, 2.0)), (collective(2, 1e9),))
    second = with_ops(replace(profile(), date="later"), (sample(128, 3.0),), (collective(2, 2e9), collective(4, 1e9)))
    merged = merge_profiles(first, second)
    assert [(item.operands[0].shape, item.forward_s) for item in merged.ops.samples] == [((64,), 1.0), ((128,), 3.0)]
    assert [(fit.num_ranks, fit.pieces[0].bytes_per_s) for fit in merged.fits] == [(2, 2e9), (4, 1e9)]
    assert merged.date == "later"
    assert merge_profiles(first) == first


@pytest.mark.parametrize("change", [
    {"device": "T4"}, {"machine": "another"}, {"torch_version": "1.0"}, {"num_processes": 2}, {"num_threads": 7},
])
def test_profiles_of_unlike_machines_are_not_merged(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="cannot be merged"):
        merge_profiles(profile(), replace(profile(), **change))  # type: ignore[arg-type]


def test_what_a_profile_measured_goes_to_devices_and_links() -> None:
    full = with_ops(profile(), (sample(64, 1.0),), (collective(2, 1e9), replace(collective(8, 1e9), num_nodes=2)))
    node = full.apply(local_cluster(4, device="cpu")).nodes[0]
    assert node.device.measured == full.ops
    assert [fit.num_ranks for fit in node.link.fits] == [2]
    assert [fit.num_ranks for fit in node.network.fits] == [8]
    cluster = full.apply(local_cluster(4, device="cpu"))
    assert cluster_from_json(cluster_to_json(cluster)) == cluster


@pytest.mark.parametrize("change", [{"forward_s": -1.0}, {"forward_s": float("inf")}])
def test_bad_samples_are_told(change: dict[str, float]) -> None:
    text = profile_to_json(with_ops(profile(), (sample(64, 1.0),), ()))
    data = json.loads(text)
    data["ops"]["samples"][0] |= change
    with pytest.raises(InputError, match="a measured time is negative or missing"):
        profile_from_json(json.dumps(data))


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
    runtime = [RuntimeCase(name=UNIT, dtype="float32", numel=4096, sharded=sharded) for sharded in (True, False)]
    runtime.append(RuntimeCase(name="adamw", dtype="float32", numel=4096, sharded=True))
    found = profile_local(
        2, budget_s=0.5, dtypes=("float32",), device="cpu", num_threads=1, date="today", runtime=runtime,
        link_budget_s=0.1, largest_message_bytes=4096,
    )
    assert [item.target for item in found.ops.samples] == [
        "autopar.unit_sharded", "autopar.unit_replicated", "autopar.adamw_sharded"
    ]
    assert [item.forward_s > 0 for item in found.ops.samples] == [True, False, True], "whole copies gather nothing"
    assert [item.backward_s > 0 for item in found.ops.samples] == [True, True, False]
    assert [fit.collective for fit in found.fits] == [
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"
    ]
    assert all(fit.num_ranks == 2 and fit.points and fit.time_s(1e6) > 0 for fit in found.fits)
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


RATES = {"matmul": [{"dtype": "float32", "size": 256, "flops_per_s": 1e9}], "memory": 1e9, "launch": 1e-6}


def job(num_processes: int = 2) -> Job:
    return Job(num_processes=num_processes, per_node=num_processes, num_threads=1, dtypes=("float32",),
               device_type="cpu", budget_s=1.0)


def record(index: int, forward_s: float) -> str:
    return json.dumps({"label": "x", "op": index, "sample": asdict(sample(2**index, forward_s))}) + "\n"


def test_records_that_are_cut_short_make_a_whole_profile() -> None:
    rates = json.dumps({"label": "rates", "rates": RATES}) + "\n"
    failed = json.dumps({"label": "aten.bad.default", "op": 7, "failed": "no such kernel"}) + "\n"
    texts = [rates + record(0, 1.0) + record(1, 1.0) + failed + record(2, 1.0)[:30], rates + record(0, 3.0)]
    found = collect(job(), texts, "today", 1.0)
    assert found is not None
    assert [(item.operands[0].shape, item.forward_s) for item in found.ops.samples] == [((1,), 3.0)]
    assert found.notes[-1:] == ("aten.bad.default could not be measured: no such kernel",)
    assert profile_from_json(profile_to_json(found)) == found
    assert collect(job(), [rates[:10], ""], "today", 1.0) is None, "no rates yet"


def test_an_op_takes_the_slowest_process_of_each_sweep_on_average() -> None:
    rates = json.dumps({"label": "rates", "rates": RATES}) + "\n"
    # The first process is the slower one in the first sweep, the second in the second; a third sweep is cut short.
    texts = [rates + record(0, 4.0) + record(0, 1.0) + record(0, 9.0), rates + record(0, 2.0) + record(0, 3.0)]
    found = collect(job(), texts, "today", 1.0)
    assert found is not None
    assert [(item.forward_s, item.backward_s) for item in found.ops.samples] == [(3.5, 7.0)]


@given(count=st.integers(min_value=0, max_value=500))
def test_neighbours_are_measured_apart(count: int) -> None:
    order = apart(count)
    assert sorted(order) == list(range(count))
    assert all(abs(a - b) ** 2 * 4 >= count for a, b in pairwise(order)), "at least half the square root"


def test_samples_that_are_far_apart_tell_nothing_of_one_another_and_can_be_written() -> None:
    found = collect(job(), [json.dumps({"label": "rates", "rates": RATES}) + "\n"] * 2, "today", 1.0)
    assert found is not None
    for step, errors in ((1, 1), (8, 0)):  # octaves
        samples = tuple(sample(2 ** (step * i), 1e-3 * 2 ** (step * i)) for i in range(4))
        profile = with_ops(found, samples, ())
        assert len(profile.ops.errors) == errors
        assert profile_from_json(profile_to_json(profile)) == profile


def test_messages_between_machines_say_nothing_of_links_inside_one() -> None:
    seen = [(size, 1e-4 + size / 1e8) for size in (1024, 4096, 2**18, 2**20, 2**22)]
    rates = json.dumps({"label": "rates", "rates": RATES | {"all_reduce": seen, "send_recv": seen}}) + "\n"
    for per_node, is_inside in ((2, True), (1, False)):
        found = collect(replace(job(), per_node=per_node), [rates, rates], "today", 1.0)
        assert found is not None
        assert (found.all_reduce is not None, found.send_recv is not None) == (is_inside, is_inside)
        plain = local_cluster(per_node, device="cpu")
        assert (found.apply(plain).nodes[0].link != plain.nodes[0].link) == is_inside


def test_an_interrupt_keeps_what_was_measured() -> None:
    def stop(done: int, total: int, label: str) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    cases = [RuntimeCase(name="copy", dtype="float32", numel=2**18) for _ in range(300)]
    with pytest.raises(ProfileInterrupted) as caught:
        profile_local(1, budget_s=0.3, dtypes=("float32",), device="cpu", num_threads=1, runtime=cases, progress=stop)
    found = caught.value.profile
    assert 1 <= len(found.ops.samples) < 300
    assert profile_from_json(profile_to_json(found)) == found


def dies(rank: int, job: Job) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(600)


def test_a_process_that_dies_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_process", dies)
    start = time.perf_counter()
    with pytest.raises(AutoparError, match="profiling failed: process 1") as caught:
        profile_local(2, budget_s=0.5, device="cpu")
    assert time.perf_counter() - start < 300
    assert "\n" not in str(caught.value)
