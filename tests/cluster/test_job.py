"""The job's machines out of the environment of torchrun, Open MPI, Slurm and PBS, and out of hostfiles."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.hostfile import hosts_of
from autopar.cluster.job import Job, auto_cluster, cluster_of, expand_hosts, job_of
from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[01-03,07],big1", "SLURM_JOB_NUM_NODES": "5"}


@pytest.mark.parametrize(("environment", "source", "processes"), [
    ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "torchrun", (8, 8)),
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", **SLURM}, "torchrun", (4,)),
    ({"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "Open MPI", (2, 2, 2)),
    ({**SLURM, "SLURM_GPUS_PER_NODE": "gpu:h100-80gb:8"}, "Slurm", (8,) * 5),
    ({**SLURM, "SLURM_GPUS_ON_NODE": "4"}, "Slurm", (4,) * 5),
    ({**SLURM, "SLURM_TASKS_PER_NODE": "8(x4),2"}, "Slurm", (8, 8, 8, 8, 2)),
    (SLURM, "Slurm", (None,) * 5),
])
def test_the_environment_says_the_nodes(
    environment: dict[str, str], source: str, processes: tuple[int | None, ...]
) -> None:
    job = job_of(environment)
    assert job is not None
    assert (job.source, job.processes) == (source, processes)


def test_slurm_s_word_for_the_gpu_is_the_device() -> None:
    cluster = auto_cluster({**SLURM, "SLURM_GPUS_PER_NODE": "h100-80gb:8"})
    assert (cluster.name, cluster.num_devices) == ("5x8xH100-80GB", 40)
    assert parse_cluster(cluster.name).nodes == cluster.nodes


def test_auto_takes_the_device_from_its_text_and_else_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parse_cluster("auto").name == parse_cluster("local").name
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parse_cluster("auto:A100-80GB").nodes == parse_cluster("4x4xA100-80GB").nodes
    assert parse_cluster("auto").num_devices == 16


def test_what_is_known_of_a_running_job_comes_first() -> None:
    alone = auto_cluster({**SLURM, "SLURM_GPUS_PER_NODE": "h100-80gb:8"}, num_processes=1, device_type="cpu")
    assert (alone.name, alone.device(0).name) == ("local:1", "CPU")
    spawned = auto_cluster({}, num_processes=3, device_type="cpu")
    assert spawned.name == "local:3"
    cpus = auto_cluster({**SLURM, "SLURM_GPUS_PER_NODE": "h100-80gb:8"}, num_processes=40, device_type="cpu")
    assert (cpus.num_devices, {node.device.name for node in cpus.nodes}) == (40, {"CPU"})


def test_pbs_lists_a_host_for_each_process(tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("n1\nn1\nn2\nn2\n")
    job = job_of({"PBS_NODEFILE": str(path)})
    assert job is not None
    assert job.processes == (2, 2)


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "4"}, {"WORLD_SIZE": "no", "LOCAL_WORLD_SIZE": "4"},
    {"WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "4"}, {"SLURM_JOB_ID": "1"}, {**SLURM, "SLURM_JOB_NUM_NODES": "4"},
    {**SLURM, "SLURM_GPUS_PER_NODE": "h100:many"}, {**SLURM, "SLURM_TASKS_PER_NODE": "8(x9)"},
    {**SLURM, "SLURM_TASKS_PER_NODE": "8(x2)"}, {**SLURM, "SLURM_TASKS_PER_NODE": "8*2"},
    {"PBS_NODEFILE": "/no/such/file"},
])
def test_garbled_jobs_are_named(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"WORLD_SIZE|SLURM_|PBS_NODEFILE"):
        job_of(environment)


@pytest.mark.parametrize(("text", "hosts"), [
    ("n1", ("n1",)), ("n[1-3]", ("n1", "n2", "n3")), ("a[08-11]", ("a08", "a09", "a10", "a11")),
    ("r[1-2]n[3,5]", ("r1n3", "r1n5", "r2n3", "r2n5")), ("n1,m[2,4],k", ("n1", "m2", "m4", "k")),
])
def test_slurm_s_lists_of_hosts(text: str, hosts: tuple[str, ...]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[", "n[3-1]", "n[a-b]", "n[1-9999999]", "n]1", "n1,n1", "n[1,,2]"])
def test_lists_of_hosts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"SLURM_JOB_NODELIST={text}")):
        expand_hosts(text)


@given(st.text(alphabet="n1[]-,0 ", max_size=12))
def test_no_list_of_hosts_is_a_traceback(text: str) -> None:
    try:
        found = expand_hosts(text)
    except InputError:
        return
    assert all(found) and len(set(found)) == len(found)


@pytest.mark.parametrize(("text", "hosts"), [
    ("worker-1 slots=8\nworker-2 slots=4  # a comment\n\n", {"worker-1": 8, "worker-2": 4}),
    ("n1:8\nn2:8\n", {"n1": 8, "n2": 8}), ("10.0.0.1\n10.0.0.2\n", {"10.0.0.1": None, "10.0.0.2": None}),
    ("n1 slots=2 max-slots=4\n", {"n1": 2}), ("n1\nn1\n", {"n1": 2}),
])
def test_hostfiles(text: str, hosts: dict[str, int | None]) -> None:
    assert hosts_of(text, where="hosts") == hosts


@pytest.mark.parametrize("text", ["", "# nothing", "n1 slots=0", "n1 slots=x", "a b c", "n1 slots=2\nn1 slots=2", "-x"])
def test_what_is_no_hostfile(text: str) -> None:
    with pytest.raises(InputError, match="hosts"):
        hosts_of(text, where="hosts")


def test_a_hostfile_is_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("n1 slots=8\nn2 slots=8\n")
    assert parse_cluster(f"{path}:H100-80GB").nodes == parse_cluster("2x8xH100-80GB").nodes
    path.write_text("n1\nn2\n")
    assert parse_cluster(f"{path}:A100-80GB").num_devices == 16
    path.write_text("nodes: [{devices: 2, device: T4}]\n")  # by its content a cluster file
    assert parse_cluster(str(path)).num_devices == 2
    with pytest.raises(InputError, match="behind the colon"):
        parse_cluster(f"{path}:T4")


def test_trays_of_a_rack_are_one_node() -> None:
    """As the shorthand has them, so that a plan for `32x4xGB200` fits a job on those hosts."""
    found = cluster_of(Job(source="test", processes=(4,) * 32), "GB200")
    assert found.nodes == parse_cluster("32x4xGB200").nodes
    assert found.name == "32x4xGB200"
