"""Profiles this machine with as many processes at a time as will train on it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from autopar.cluster.local import match_cuda_device, num_cores
from autopar.errors import AutoparError, InputError
from autopar.profiler.fit import fit_link
from autopar.profiler.links import all_reduce_times_s, send_recv_times_s
from autopar.profiler.ops import launch_s, matmul_flops_per_s, memory_bytes_per_s
from autopar.profiler.profile import MatmulRate, Profile

DEFAULT_DTYPES = ("float32", "float64", "bfloat16")
SIZES = {"cpu": (256, 768), "cuda": (2048, 8192)}
STARTING_S = 60.0  # processes that import torch on a busy machine
GROUP_TIMEOUT_S = 60.0
OPS_SHARE = 0.6  # of the budget; the rest is the links'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    num_processes: int
    num_threads: int
    dtypes: tuple[str, ...]
    device_type: str
    budget_s: float
    folder: str


def profile_local(
    num_processes: int, *, budget_s: float = 5.0, dtypes: Sequence[str] = DEFAULT_DTYPES, device: str | None = None,
    num_threads: int | None = None, date: str = "",
) -> Profile:
    """The Profile of this machine with `num_processes` processes that all work at the same time.

    `budget_s` is about the time spent measuring; starting the processes comes on top (3 to 6 s for 4 processes on 2
    cores). `device` is "cpu", "cuda" (a process a CUDA device, NCCL), or None for CUDA where there are enough devices.
    `num_threads` of each process: the cores over the processes, at least 1, if not given. Processes are spawned, so a
    script that calls this needs `if __name__ == "__main__":`. All of them are gone when this returns or raises.

    Raises InputError for bad arguments, AutoparError where a process dies or the time is up.
    """
    job_device = _check(num_processes, budget_s, dtypes, device, num_threads)
    threads = num_threads or max(1, num_cores() // num_processes)
    with tempfile.TemporaryDirectory(prefix="autopar-profile-") as folder:
        job = _Job(
            num_processes=num_processes, num_threads=threads, dtypes=tuple(dtypes), device_type=job_device,
            budget_s=budget_s, folder=folder,
        )
        start = time.perf_counter()
        _run(job)
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_processes)]
        return _collect(job, results, date, time.perf_counter() - start)


def _check(
    num_processes: int, budget_s: float, dtypes: Sequence[str], device: str | None, num_threads: int | None
) -> str:
    if num_processes < 1:
        raise InputError(f"profile: {num_processes} processes asked, at least 1 is needed")
    if not 0 < budget_s < 3600:
        raise InputError(f"profile: the budget of {budget_s} s is not between 0 and 3600")
    if num_threads is not None and num_threads < 1:
        raise InputError(f"profile: {num_threads} threads asked, at least 1 is needed")
    for dtype in dtypes:
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
            raise InputError(f"profile: dtype {dtype!r} is not one of float64, float32, bfloat16, float16")
    if "float32" not in dtypes:
        raise InputError("profile: dtypes must contain float32, the rate of every dtype that is not measured")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"profile: device {device!r} is neither 'cpu' nor 'cuda'")
    num_cuda = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and num_cuda < num_processes:
        raise InputError(f"profile: {num_processes} processes asked, {num_cuda} CUDA devices are visible")
    return "cuda" if num_cuda >= num_processes else "cpu"


def _run(job: _Job) -> None:
    """Runs the processes to their end; none is left, whatever happens."""
    deadline = time.monotonic() + STARTING_S + GROUP_TIMEOUT_S + 3 * job.budget_s
    context = spawn(_process, args=(job,), nprocs=job.num_processes, join=False)  # type: ignore[no-untyped-call]
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise AutoparError("profiling did not end in time: the machine is too busy, or a process hangs")
    except ProcessException as error:
        raise AutoparError(f"profiling failed: {_reason(error)}") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
        for process in context.processes:
            process.join()


def _reason(error: ProcessException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"process {error.error_index}: {lines[-1].strip() if lines else 'it ended'}"


def _process(rank: int, job: _Job) -> None:
    """One process: measures in step with the others and leaves its figures in a file."""
    torch.set_num_threads(job.num_threads)
    torch.manual_seed(rank)
    device = torch.device(job.device_type, rank) if job.device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    grouped = job.num_processes > 1
    if grouped:
        if platform.system() == "Linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            backend, init_method=f"file://{job.folder}/rendezvous", rank=rank, world_size=job.num_processes,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
    try:
        result = _measure(job, device, grouped)
        if grouped:
            dist.barrier()
    finally:
        if grouped:
            dist.destroy_process_group()
    (Path(job.folder) / f"{rank}.json").write_text(json.dumps(result))


def _measure(job: _Job, device: torch.device, grouped: bool) -> dict[str, Any]:
    sizes = SIZES[device.type]
    num_measurements = len(job.dtypes) * len(sizes) + 2
    window_s = job.budget_s * (OPS_SHARE if grouped else 1.0) / num_measurements / 4  # three windows and a warm-up

    def together() -> None:
        if grouped:
            dist.barrier()

    matmul: list[dict[str, Any]] = []
    for dtype in job.dtypes:
        for size in sizes:
            together()
            rate = matmul_flops_per_s(size, getattr(torch, dtype), device, window_s)
            matmul.append(asdict(MatmulRate(dtype=dtype, size=size, flops_per_s=rate)))
    together()
    memory = memory_bytes_per_s(device, window_s)
    together()
    launch = launch_s(device, window_s)
    result: dict[str, Any] = {"matmul": matmul, "memory": memory, "launch": launch}
    if grouped:
        share_s = job.budget_s * (1 - OPS_SHARE) / 2
        result["send_recv"] = list(send_recv_times_s(device, share_s).items())
        result["all_reduce"] = list(all_reduce_times_s(device, share_s).items())
    return result


def _collect(job: _Job, results: list[dict[str, Any]], date: str, measuring_s: float) -> Profile:
    backend = "nccl" if job.device_type == "cuda" else "gloo"
    matmul = tuple(
        MatmulRate(dtype=row["dtype"], size=row["size"],
                   flops_per_s=median(result["matmul"][i]["flops_per_s"] for result in results))
        for i, row in enumerate(results[0]["matmul"])
    )
    notes: list[str] = []
    name, machine = "CPU", _cpu_model()
    if job.device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine = str(properties.name)
        found = match_cuda_device(machine, int(properties.total_memory))
        name = found.name if found is not None else machine
    elif job.num_processes * job.num_threads > num_cores():
        notes.append(f"{job.num_processes} processes share {num_cores()} cores: rates are a process's share")
    first = results[0]
    return Profile(
        device=name, machine=machine, torch_version=torch.__version__, date=date,
        num_processes=job.num_processes, num_threads=job.num_threads, matmul=matmul,
        memory_bandwidth_bytes_per_s=median(result["memory"] for result in results),
        launch_s=median(result["launch"] for result in results),
        send_recv=fit_link(dict(first["send_recv"]), backend=backend) if "send_recv" in first else None,
        all_reduce=fit_link(dict(first["all_reduce"]), backend=backend) if "all_reduce" in first else None,
        measuring_s=measuring_s, notes=tuple(notes),
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {num_cores()} cores"
