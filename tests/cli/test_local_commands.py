"""verify, profile and demo: what they say of local processes, and their exit codes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar import demo, local_check
from autopar.cluster.local import local_cluster
from autopar.demo import demo_processes, predicted_from_ops
from autopar.graph.source import capture_source, load_source
from autopar.plan.file import load_plan, save_plan
from autopar.plan.plan import Plan, Recompute, Variant
from autopar.profiler import LinkFit, MatmulRate, Profile
from autopar.runtime.parity import ParityReport
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.simulator import simulate

LINK = LinkFit(backend="gloo", latency_s=1e-4, bytes_per_s=1e9, relative_error=0.1, points=((4096, 1e-4),))
PROFILE = Profile(
    device="CPU", machine="a small machine", torch_version="2.13.0", date="2026-01-31", num_processes=2, num_threads=1,
    matmul=(MatmulRate(dtype="float32", size=256, flops_per_s=5e10),), memory_bandwidth_bytes_per_s=8e9, launch_s=5e-6,
    send_recv=LINK, all_reduce=LINK, measuring_s=1.5, notes=("2 processes share 1 core",),
)


@pytest.mark.processes
def test_verify_runs_the_plan_and_finds_one_process_s_numbers(autopar, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ("--cluster", "2xH100-80GB", "--global-batch", 4, "--seq-len", 16, "-o", plan)
    assert autopar("plan", llama, *words).code == 0
    run = autopar("verify", plan, "--model", llama, "--dtype", "fp64", "--json")
    assert run.code == 0, run.err
    assert run.value["passed"] is True
    assert run.value["loss_error"] <= 1e-9
    assert run.value["worst_gradient_error"] <= 1e-9
    assert run.value["num_gradients"] == 39


@pytest.mark.processes
def test_verify_takes_layers_that_recompute_and_offload(autopar, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ("--cluster", "1xH100-80GB", "--global-batch", 2, "--seq-len", 16, "-o", path)
    assert autopar("plan", llama, *words).code == 0
    plan = load_plan(path)
    (stage,) = plan.stages
    variants = [Variant(recompute=Recompute.FULL, offload=True), Variant(recompute=Recompute.SELECTIVE)]
    rest = [Variant()] * (plan.num_layers(stage) - 2)
    stage = replace(stage.with_variants(variants + rest), offload_optimizer=True)
    save_plan(replace(plan, stages=(stage,)), path)
    run = autopar("verify", path, "--model", llama, "--dtype", "fp64", "--json")
    assert run.code == 0, run.err
    assert run.value["worst_gradient_error"] <= 1e-9
    shown = autopar("show", path)
    assert "1 full, offloaded" in " ".join(shown.out.split())


def test_verify_fails_with_exit_code_1(autopar, llama: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> ParityReport:
        return ParityReport(plan_summary="tp 2", dtype="float32", losses=(1.0,), expected_losses=(1.0,), loss_error=0.0,
                            gradient_errors=(("good", 0.0), ("bad", 0.5)), tolerance=1e-4)

    monkeypatch.setattr(local_check, "check_locally", wrong)
    run = autopar("verify", plan_file, "--model", llama)
    assert run.code == 1
    assert run.err == (
        "autopar: the plan's numbers differ from one process's by 5.0e-01 in the gradient of bad, 1e-04 is allowed\n")


def large(plan: Plan) -> Plan:
    mesh = replace(plan.stages[0].mesh, dp_replicate=64)
    return replace(plan, num_devices=64, stages=(replace(plan.stages[0], mesh=mesh),))


def test_verify_of_more_devices_than_processes(autopar, llama: Path, plan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    save_plan(large(load_plan(plan_file)), path)
    run = autopar("verify", path, "--model", llama)
    assert run.code == 2
    assert "64 devices" in run.err


def test_verify_of_a_model_too_large_for_this_machine(autopar, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ("--cluster", "2x8xH200", "--global-batch", 16, "--seq-len", 2048, "-o", plan)
    assert autopar("plan", "llama-3.1-70b", *words).code == 0
    run = autopar("verify", plan, "--model", "llama-3.1-70b")
    assert run.code == 2
    assert "GiB of memory" in run.err


def test_verify_with_another_model(autopar, plan_file: Path) -> None:
    run = autopar("verify", plan_file, "--model", "gpt2")
    assert run.code == 2
    assert len(run.err.splitlines()) == 1


def test_profile_is_printed_written_and_used(
    autopar, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopar.profiler.profile_local", lambda *_, **__: PROFILE)
    path = tmp_path / "profile.json"
    run = autopar("profile", "all", "--num-processes", 2, "-o", path)
    assert run.code == 0
    for word in ("a small machine", "50.0 GFLOP/s", "8.0 GB/s", "note: 2 processes share 1 core", str(path)):
        assert word in run.out
    assert autopar("profile", "all", "--json").value == json.loads(path.read_text())
    words = ("simulate", llama, "--cluster", "local:2", "--global-batch", 4, "--dtype", "fp32", "--json")
    slower = tmp_path / "slower.json"
    matmul = [dict(rate, flops_per_s=rate["flops_per_s"] / 100) for rate in json.loads(path.read_text())["matmul"]]
    slower.write_text(json.dumps(json.loads(path.read_text()) | {"matmul": matmul}))
    times_s = [autopar(*words, "--profile", profile).value["step_time_s"] for profile in (path, slower)]
    assert times_s[1] > 10 * times_s[0]


def test_a_profile_of_another_machine_is_refused(autopar, llama: Path, tmp_path: Path) -> None:
    from autopar.profiler import save_profile

    path = tmp_path / "profile.json"
    save_profile(PROFILE, path)
    words = ("simulate", llama, "--cluster", "8xH100-80GB", "--global-batch", 8)
    run = autopar(*words, "--profile", path)
    assert run.code == 2
    assert "CPU" in run.err


def test_the_demo_s_processes_have_a_core_each() -> None:
    assert [demo_processes(cores) for cores in (1, 2, 3, 4, 64)] == [2, 2, 2, 4, 4]


@pytest.mark.parametrize(("degrees", "kinds", "exchanges"), [
    ({"dp_shard": 2, "zero": 2}, {("accumulate", False), ("adamw", True), ("unit", True)}, False),
    ({"dp_replicate": 2}, {("accumulate", False), ("adamw", False), ("unit", False)}, False),
    ({"tp": 2}, {("accumulate", False), ("adamw", False)}, True),
])
def test_the_demo_measures_what_its_plan_runs(
    degrees: dict[str, int], kinds: set[tuple[str, bool]], exchanges: bool, llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def measured(num_processes: int, **options: Any) -> Profile:
        asked.update(options)
        return PROFILE

    monkeypatch.setattr(demo, "profile_local", measured)
    graph = capture_source(load_source(str(llama), seq_len=16, dtype="float32"))
    cluster = local_cluster(2, device="cpu")
    plan = plan_from_degrees(graph, cluster, Degrees(
        global_batch=4, micro_batch=2, seq_len=16, dtype="float32", **degrees
    ))
    step_s, num_ops = predicted_from_ops(graph, cluster, plan)
    assert {(case.name, case.sharded) for case in asked["runtime"]} == kinds
    assert num_ops == len(asked["cases"]) > 10
    assert (asked["link_budget_s"] > 0) == exchanges
    assert step_s == simulate(graph, PROFILE.apply(cluster), plan).step_time_s


def test_demo_in_a_folder_that_cannot_be(autopar, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    run = autopar("demo", "-o", file / "below")
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
