"""The checks of `autopar doctor`, asked about machines of all kinds, and the command on this one."""

import tomllib
from pathlib import Path

import pytest

from autopar import doctor
from autopar.cli import main
from autopar.doctor import Finding, Verdict

OK, SLOW, STOPS = Verdict.OK, Verdict.SLOW, Verdict.STOPS
GIB = 2**30
NO_GPU = dict(built_for=None, driver=False, nccl=False)
GPU = dict(built_for="12.8", driver=True, nccl=True)
A100 = ("NVIDIA A100",) * 2

CASES = [
    (doctor.check_python((3, 12)), OK), (doctor.check_python((3, 10)), STOPS),
    (doctor.check_packages({"rich": "14"}), OK), (doctor.check_packages({"rich": "14", "ortools": None}), STOPS),
    (doctor.check_torch("2.13.0+cpu"), OK), (doctor.check_torch("2.11.0"), OK), (doctor.check_torch("2.10.1"), SLOW),
    (doctor.check_torch("2.14.0a0"), SLOW), (doctor.check_torch(None, "libcudart.so is missing"), STOPS),
    (doctor.check_gloo(True), OK), (doctor.check_gloo(False), STOPS),
    (doctor.check_cuda((), **NO_GPU), OK), (doctor.check_cuda((), **NO_GPU | {"driver": True}), SLOW),
    (doctor.check_cuda(A100, **GPU), OK), (doctor.check_cuda(A100, **GPU | {"nccl": False}), STOPS),
    (doctor.check_cuda(A100, **GPU, problem="no preset"), SLOW),
    (doctor.check_cores(8, None, 4), OK), (doctor.check_cores(2, None, 4), SLOW), (doctor.check_cores(8, 1.5, 4), SLOW),
    (doctor.check_threads(None, 2, 4), OK), (doctor.check_threads("2", 8, 4), OK),
    (doctor.check_threads("8", 8, 4), SLOW), (doctor.check_threads("many", 8, 4), STOPS),
    (doctor.check_memory(8 * GIB, 4), OK), (doctor.check_memory(GIB, 4), SLOW),
    (doctor.check_shm(None, gpus=True), OK), (doctor.check_shm(64 * 2**20, gpus=True), SLOW),
    (doctor.check_shm(64 * 2**20, gpus=False), OK), (doctor.check_shm(8 * GIB, gpus=True), OK),
    (doctor.check_folder("this folder", Path("/x"), None, 9 * GIB), OK),
    (doctor.check_folder("this folder", Path("/x"), "Read-only file system", None), STOPS),
    (doctor.check_folder("temporary files", Path("/x"), None, 1), SLOW),
    (doctor.check_network(loopback=None, hostname=None, port_taken=False), OK),
    (doctor.check_network(loopback="no", hostname=None, port_taken=False), STOPS),
    (doctor.check_network(loopback=None, hostname="box: unknown", port_taken=False), SLOW),
    (doctor.check_network(loopback=None, hostname=None, port_taken=True), SLOW),
    (doctor.check_open_files(256), SLOW), (doctor.check_open_files(4096), OK),
    (doctor.check_page(()), OK), (doctor.check_page(("page.js",)), STOPS),
    (doctor.check_rate("memory", 9.0, 10.0, "GB/s"), OK), (doctor.check_rate("memory", 4.0, 10.0, "GB/s"), SLOW),
]


@pytest.mark.parametrize(("finding", "verdict"), CASES, ids=lambda value: getattr(value, "check", None))
def test_the_verdict_and_a_remedy_where_one_is_needed(finding: Finding, verdict: Verdict) -> None:
    assert finding.verdict is verdict, finding
    assert bool(finding.remedy) == (verdict is not OK)
    assert finding.found and "\n" not in finding.found + finding.remedy


def test_the_versions_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, pair)) for pair in (doctor.TORCH_FROM, doctor.TORCH_BELOW))
    needed = project["dependencies"]
    assert f"torch>={low},<{high}" in needed
    assert {entry.split(">")[0] for entry in needed} == {"torch", *doctor.PACKAGES}
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON_FROM))


def test_this_machine_is_examined(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    for word in ("torch", "gloo", "cores", "memory", "network", "page", "autopar works here"):
        assert word in out


def test_what_stops_autopar_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_missing_assets", lambda: ("page.js",))
    assert main(["doctor"]) == 1
    assert "autopar does not work here: page" in capfd.readouterr().out


def test_measured_rates_are_held_against_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_best_s", lambda work, **_: 1e9)  # a machine that takes ages
    assert [finding.verdict for finding in doctor._rates()] == [SLOW, SLOW]
