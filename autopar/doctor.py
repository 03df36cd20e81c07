"""What on this machine is missing or slow for autopar, one finding a check, each with its remedy.

Every check is a function of plain facts, so that it can be asked about machines other than this one; `examine` gathers
the facts here. torch is imported by `examine` alone: without it the command still answers.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError

GIB = 2**30
TORCH_FROM, TORCH_BELOW = (2, 11), (2, 14)  # as pyproject.toml asks
PYTHON_FROM = (3, 11)
PACKAGES = ("transformers", "ortools", "numpy", "pydantic", "pyyaml", "rich", "safetensors", "typer")
NEEDED_BYTES_A_PROCESS = 0.7 * GIB  # what a local process holds after importing torch and transformers, with some room
LEAST_SHM_BYTES = 512 * 2**20  # a container's own 64 MiB is too little for NCCL among 8 devices
LEAST_DISK_BYTES = GIB
LEAST_OPEN_FILES = 1024
TORCHRUN_PORT = 29500
FAR_BELOW = 0.5  # of the table's rate: from here on a measured one is told


class Verdict(StrEnum):
    OK = "ok"
    SLOW = "slow"  # it works, but less well than it could, or than is predicted
    STOPS = "stops"  # autopar does not work


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found. `remedy` says what to do where it is not ok."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def check_python(version: tuple[int, int]) -> Finding:
    """Python is new enough."""
    words = ".".join(map(str, version))
    if version < PYTHON_FROM:
        return Finding(check="python", verdict=Verdict.STOPS, found=words, remedy="install Python 3.11 or 3.12")
    return Finding(check="python", verdict=Verdict.OK, found=words)


def check_packages(versions: dict[str, str | None]) -> Finding:
    """Every library that autopar needs is installed; `versions` has None for one that is not."""
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Finding(check="libraries", verdict=Verdict.STOPS, found=f"missing: {', '.join(missing)}",
                       remedy=f"pip install {' '.join(missing)}")
    return Finding(check="libraries", verdict=Verdict.OK,
                   found=", ".join(f"{name} {version}" for name, version in versions.items()))


def check_torch(version: str | None, why: str = "") -> Finding:
    """torch can be imported, in a version that is tested."""
    wanted = f"torch>={'.'.join(map(str, TORCH_FROM))},<{'.'.join(map(str, TORCH_BELOW))}"
    if version is None:
        return Finding(check="torch", verdict=Verdict.STOPS, found=f"cannot be imported ({why})",
                       remedy=f"pip install '{wanted}'")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())
    if not TORCH_FROM <= numbers < TORCH_BELOW:
        return Finding(check="torch", verdict=Verdict.SLOW, found=f"{version}, which is not tested",
                       remedy=f"pip install '{wanted}'")
    return Finding(check="torch", verdict=Verdict.OK, found=version)


def check_gloo(available: bool) -> Finding:
    """CPU processes can talk to each other."""
    if not available:
        return Finding(check="gloo", verdict=Verdict.STOPS, found="this torch has no distributed package with gloo",
                       remedy="install torch from PyPI or pytorch.org, whose builds have it")
    return Finding(check="gloo", verdict=Verdict.OK, found="available")


def check_cuda(
    devices: tuple[str, ...], *, built_for: str | None, driver: bool, nccl: bool, problem: str | None = None
) -> Finding:
    """The GPUs are seen, have NCCL, and are in the tables. `problem`: why they make no cluster."""
    if not devices:
        if driver:
            remedy = ("install a CUDA build of torch (pytorch.org)" if built_for is None
                      else "look at nvidia-smi: the driver may be older than this torch needs")
            return Finding(check="GPUs", verdict=Verdict.SLOW, found="an NVIDIA driver, but torch sees no GPU",
                           remedy=remedy)
        return Finding(check="GPUs", verdict=Verdict.OK,
                       found="none: plans can be made for any cluster, and run here on CPU processes")
    named = f"{len(devices)} x {devices[0]}" if len(set(devices)) == 1 else ", ".join(devices)
    if not nccl:
        return Finding(check="GPUs", verdict=Verdict.STOPS, found=f"{named}, but torch has no NCCL",
                       remedy="install a CUDA build of torch for Linux (pytorch.org)")
    if problem is not None:
        return Finding(check="GPUs", verdict=Verdict.SLOW, found=f"{named}; {problem}",
                       remedy="describe them in a cluster file: autopar cluster show --help")
    return Finding(check="GPUs", verdict=Verdict.OK, found=f"{named}, CUDA {built_for}, NCCL")


def check_cores(cores: int, quota: float | None, processes: int) -> Finding:
    """There is a core for each local process. `quota`: cores' worth of time that the control group grants."""
    usable = min(cores, quota) if quota is not None else cores
    said = f"{cores} cores" + (f", but time for {quota:g} of them" if quota is not None and quota < cores else "")
    if usable < processes:
        return Finding(
            check="cores", verdict=Verdict.SLOW, found=f"{said}, for {processes} local processes",
            remedy="steps of local runs take longer than predicted; use fewer processes (--cluster local:"
                   f"{max(1, int(usable))}) or a machine with more cores",
        )
    return Finding(check="cores", verdict=Verdict.OK, found=f"{said}, for {processes} local processes")


def check_threads(setting: str | None, cores: int, processes: int) -> Finding:
    """OMP_NUM_THREADS leaves a core to each thread of each local process."""
    if setting is None:
        return Finding(check="threads", verdict=Verdict.OK, found="OMP_NUM_THREADS is not set: one a local process")
    fair = max(1, cores // processes)
    if not setting.isdecimal() or int(setting) < 1:
        return Finding(check="threads", verdict=Verdict.STOPS, found=f"OMP_NUM_THREADS={setting} is no number",
                       remedy=f"export OMP_NUM_THREADS={fair}")
    if int(setting) > fair:
        return Finding(check="threads", verdict=Verdict.SLOW,
                       found=f"OMP_NUM_THREADS={setting}: {processes} processes of {setting} threads on {cores} cores",
                       remedy=f"export OMP_NUM_THREADS={fair}")
    return Finding(check="threads", verdict=Verdict.OK, found=f"OMP_NUM_THREADS={setting}")


def check_memory(total_bytes: float, processes: int) -> Finding:
    """Local processes fit in the memory of the machine, or of its control group where that is less."""
    needed = processes * NEEDED_BYTES_A_PROCESS
    said = f"{total_bytes / GIB:.1f} GiB"
    if total_bytes < needed:
        return Finding(check="memory", verdict=Verdict.SLOW,
                       found=f"{said}; {processes} local processes need about {needed / GIB:.1f} before any model",
                       remedy="raise the container's memory limit, or use fewer processes")
    return Finding(check="memory", verdict=Verdict.OK, found=said)


def check_shm(size_bytes: float | None, *, gpus: bool) -> Finding:
    """/dev/shm has room for what processes hand each other."""
    if size_bytes is None:
        return Finding(check="shared memory", verdict=Verdict.OK, found="no /dev/shm here; gloo does without")
    said = f"/dev/shm of {size_bytes / GIB:.2f} GiB"
    if size_bytes < LEAST_SHM_BYTES and gpus:
        return Finding(check="shared memory", verdict=Verdict.SLOW, found=f"{said}, where NCCL keeps its buffers",
                       remedy="start the container with --shm-size=8g (or --ipc=host)")
    return Finding(check="shared memory", verdict=Verdict.OK, found=said)


def check_folder(what: str, path: Path, problem: str | None, free_bytes: float | None) -> Finding:
    """Files can be written to a folder. `problem`: why they cannot; `free_bytes`: room on its disk."""
    if problem is not None:
        return Finding(check=what, verdict=Verdict.STOPS, found=f"{path}: {problem}",
                       remedy="work in a folder of your own, or set TMPDIR to one for temporary files")
    if free_bytes is not None and free_bytes < LEAST_DISK_BYTES:
        return Finding(check=what, verdict=Verdict.SLOW, found=f"{path}: {free_bytes / GIB:.2f} GiB are left",
                       remedy="make room: checkpoints and traces do not fit")
    return Finding(check=what, verdict=Verdict.OK, found=f"{path} can be written")


def check_network(*, loopback: str | None, hostname: str | None, port_taken: bool) -> Finding:
    """Processes find each other. `loopback` and `hostname`: why a port cannot be opened, a name not be found."""
    if loopback is not None:
        return Finding(check="network", verdict=Verdict.STOPS, found=f"no port can be opened on 127.0.0.1 ({loopback})",
                       remedy="allow local TCP connections in the sandbox or firewall")
    if hostname is not None:
        return Finding(check="network", verdict=Verdict.SLOW,
                       found=f"this machine's own name is not found ({hostname}), by which gloo looks for its address",
                       remedy="add the name to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo for runs on one machine")
    if port_taken:
        return Finding(check="network", verdict=Verdict.SLOW,
                       found=f"port {TORCHRUN_PORT}, torchrun's own, is taken by another process",
                       remedy="torchrun --standalone ..., or --master-port with a free one")
    return Finding(check="network", verdict=Verdict.OK, found="local ports are free, the machine's name is found")


def check_open_files(limit: int) -> Finding:
    """A process may open as many files as its connections need."""
    if limit < LEAST_OPEN_FILES:
        return Finding(check="open files", verdict=Verdict.SLOW, found=f"at most {limit} a process",
                       remedy=f"ulimit -n {4 * LEAST_OPEN_FILES}")
    return Finding(check="open files", verdict=Verdict.OK, found=f"at most {limit} a process")


def check_page(missing: tuple[str, ...]) -> Finding:
    """The page of `autopar viz` is installed, built: neither npm nor a network is needed."""
    if missing:
        return Finding(check="page", verdict=Verdict.STOPS, found=f"{', '.join(missing)} of autopar viz are not there",
                       remedy="install autopar again: pip install --force-reinstall --no-deps autopar")
    return Finding(check="page", verdict=Verdict.OK, found="built and installed; npm is not needed")


def check_rate(what: str, measured: float, table: float, unit: str) -> Finding:
    """A measured rate is not far below what plans are made with."""
    said = f"{measured:,.1f} {unit}, the table says {table:,.1f} ({measured / table:.0%})"
    if measured < FAR_BELOW * table:
        return Finding(check=what, verdict=Verdict.SLOW, found=said,
                       remedy="plan with what is measured here: autopar profile all -o profile.json, then --profile")
    return Finding(check=what, verdict=Verdict.OK, found=said)


# -- this machine


def examine(*, processes: int, measure: bool = False) -> Iterator[Finding]:
    """The findings about this machine, for as many local processes; `measure` also times it for some seconds."""
    yield check_python((sys.version_info.major, sys.version_info.minor))
    yield check_packages({name: _version(name) for name in PACKAGES})
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        yield check_torch(None, str(error).splitlines()[0])
        return
    yield check_torch(str(torch.__version__))
    yield check_gloo(dist.is_available() and dist.is_gloo_available())
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if (
        torch.cuda.is_available()) else ()
    nccl = dist.is_available() and dist.is_nccl_available()
    yield check_cuda(gpus, built_for=torch.version.cuda, driver=_driver(), nccl=nccl,
                     problem=_cluster_problem() if gpus else None)
    yield from _resources(processes, gpus=bool(gpus))
    yield check_page(_missing_assets())
    if measure:
        yield from _rates()


def _resources(processes: int, *, gpus: bool) -> Iterator[Finding]:
    from autopar.cluster.local import num_cores, total_memory_bytes

    cores = num_cores()
    yield check_cores(cores, _cpu_quota(), processes)
    yield check_threads(os.environ.get("OMP_NUM_THREADS"), cores, processes)
    yield check_memory(total_memory_bytes(), processes)
    shm = Path("/dev/shm")
    yield check_shm(shutil.disk_usage(shm).total if shm.is_dir() else None, gpus=gpus)
    for what, path in (("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        problem = _write_problem(path)
        yield check_folder(what, path, problem, shutil.disk_usage(path).free if problem is None else None)
    yield check_network(loopback=_loopback_problem(), hostname=_hostname_problem(), port_taken=_port_taken())
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _cluster_problem() -> str | None:
    from autopar.cluster.local import local_cluster

    try:
        local_cluster(device="cuda")
    except AutoparError as error:
        return str(error)
    return None


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control group grants, None where it grants all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _write_problem(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"autopar")
    except OSError as error:
        return error.strerror or "cannot be written"
    return None


def _loopback_problem() -> str | None:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _hostname_problem() -> str | None:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        return f"{socket.gethostname()}: {error.strerror or error}"
    return None


def _port_taken() -> bool:
    try:
        with socket.create_server(("127.0.0.1", TORCHRUN_PORT)):
            return False
    except OSError:
        return True


def _missing_assets() -> tuple[str, ...]:
    folder = files("autopar.viz") / "assets"
    return tuple(name for name in ("page.html", "page.js", "page.css") if not (folder / name).is_file())


def _rates() -> Iterator[Finding]:
    """Matrix products and copies on one device (a GPU, or one core) in its usual dtype, against the tables."""
    import torch

    from autopar.cluster.local import local_cluster, num_cores

    cuda = torch.cuda.is_available()
    try:
        device = local_cluster(None if cuda else num_cores()).device(0)
    except AutoparError as error:
        yield Finding(check="rates", verdict=Verdict.SLOW, found=f"nothing to compare with: {error}",
                      remedy="give the device's rates in a cluster file")
        return
    place, dtype, size, copied = (
        ("cuda", torch.bfloat16, 8192, 2**30) if cuda else ("cpu", torch.float32, 1024, 2**27)
    )
    name = str(dtype).removeprefix("torch.")
    torch.set_num_threads(1)
    one = torch.randn(size, size, device=place, dtype=dtype)
    flops = 2.0 * size**3 / _best_s(lambda: one @ one, cuda=cuda)
    yield check_rate(f"{name} products", flops / 1e9, device.peak(name) / 1e9, "GFLOP/s")
    source = torch.empty(copied // 4, device=place)
    target = torch.empty_like(source)
    moved = 2.0 * copied / _best_s(lambda: target.copy_(source), cuda=cuda)
    yield check_rate("memory rate", moved / 1e9, device.memory_bandwidth_bytes_per_s / 1e9, "GB/s")


def _best_s(work: Any, *, cuda: bool, budget_s: float = 1.0) -> float:
    """The shortest time of `work`, over at least three runs and about `budget_s` seconds."""
    import torch

    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begin < budget_s:
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
