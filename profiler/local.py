"""Profiles this machine with as many processes at a time as will train on it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from autopar.cluster.local import num_cores
from autopar.errors import AutoparError, InputError
from autopar.gloo import one_worker_thread
from autopar.profiler.collect import collect
from autopar.profiler.op_cases import OpCase
from autopar.profiler.profile import Profile
from autopar.profiler.worker import Job, RuntimeCase, ignore_interrupts, num_steps, records

DEFAULT_DTYPES = ("float32", "float64", "bfloat16")
STARTING_S = 60.0  # processes that import torch on a busy machine
GROUP_TIMEOUT_S = 60.0
POLL_S = 0.2
CASE_TIMEOUT_S = 5.0  # of one op, on average

Progress = Callable[[int, int, str], None]  # measurements done, how many there are, the latest


class ProfileInterrupted(KeyboardInterrupt):
    """The user stopped the measurements; `profile` has what was measured until then."""

    def __init__(self, profile: Profile) -> None:
        super().__init__("interrupted")
        self.profile = profile


def profile_local(
    num_processes: int, *, budget_s: float = 5.0, dtypes: Sequence[str] = DEFAULT_DTYPES, device: str | None = None,
    num_threads: int | None = None, date: str = "", cases: Sequence[OpCase] = (),
    runtime: Sequence[RuntimeCase] = (), link_budget_s: float = 0.0, largest_message_bytes: int = 2**28,
    progress: Progress | None = None,
) -> Profile:
    """The Profile of this machine with `num_processes` processes that all work at the same time.

    `budget_s` is about the time spent measuring rates; starting the processes comes on top (3 to 6 s for 4 processes on
    2 cores), `cases` and `runtime` work about 0.2 s each, and each collective over each kind of group `link_budget_s`
    (none are measured if it is 0). `device` is "cpu", "cuda" (a process a CUDA device, NCCL), or None for CUDA where
    there are enough devices. `num_threads` of each process: the cores over the processes, at least 1, if not given.
    Processes are spawned, so a script that calls this needs `if __name__ == "__main__":`. All of them are gone when
    this returns or raises.

    Raises InputError for bad arguments, AutoparError where a process dies or the time is up, and ProfileInterrupted,
    with what was measured, at Ctrl-C once the rates are known.
    """
    job_device = _check(num_processes, budget_s, dtypes, device, num_threads)
    threads = num_threads or max(1, num_cores() // num_processes)
    with tempfile.TemporaryDirectory(prefix="autopar-profile-") as folder:
        job = Job(
            num_processes=num_processes, per_node=num_processes, num_threads=threads, dtypes=tuple(dtypes),
            device_type=job_device, budget_s=budget_s, folder=folder, cases=tuple(cases), runtime=tuple(runtime),
            link_budget_s=link_budget_s, largest_message_bytes=largest_message_bytes,
        )
        start = time.perf_counter()
        try:
            _run(job, progress)
        except KeyboardInterrupt:
            found = collect(job, _texts(job), date, time.perf_counter() - start)
            if found is None:
                raise
            raise ProfileInterrupted(found) from None
        whole = collect(job, _texts(job), date, time.perf_counter() - start)
        assert whole is not None, "all processes ended well"
        return whole


def _texts(job: Job) -> list[str]:
    """What each process wrote."""
    paths = [Path(job.folder) / f"{rank}.jsonl" for rank in range(job.num_processes)]
    return [path.read_text() if path.exists() else "" for path in paths]


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


def _run(job: Job, progress: Progress | None) -> None:
    """Runs the processes to their end; none is left, whatever happens."""
    total = num_steps(job)
    deadline = time.monotonic() + STARTING_S + GROUP_TIMEOUT_S + 3 * job.budget_s + CASE_TIMEOUT_S * total
    deadline += 3 * job.link_budget_s * total
    context = spawn(_process, args=(job,), nprocs=job.num_processes, join=False)  # type: ignore[no-untyped-call]
    seen = Path(job.folder) / "0.jsonl"
    try:
        while not context.join(timeout=POLL_S):
            if time.monotonic() > deadline:
                raise AutoparError("profiling did not end in time: the machine is too busy, or a process hangs")
            if progress is not None and seen.exists():
                lines = seen.read_text().splitlines()
                progress(len(lines), total, _label(lines))
    except ProcessException as error:
        raise AutoparError(f"profiling failed: {_reason(error)}") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
        for process in context.processes:
            process.join()


def _label(lines: Sequence[str]) -> str:
    """What the latest whole record is of."""
    for line in reversed(lines):
        try:
            return str(json.loads(line)["label"])
        except (json.JSONDecodeError, KeyError):
            continue  # a line that is being written
    return ""


def _reason(error: ProcessException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"process {error.error_index}: {lines[-1].strip() if lines else 'it ended'}"


def _process(rank: int, job: Job) -> None:
    """One process: measures in step with the others and leaves a line a measurement in its file."""
    ignore_interrupts()
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
        with one_worker_thread():
            dist.init_process_group(
                backend, init_method=f"file://{job.folder}/rendezvous", rank=rank, world_size=job.num_processes,
                timeout=timedelta(seconds=GROUP_TIMEOUT_S),
            )
    try:
        with (Path(job.folder) / f"{rank}.jsonl").open("w") as file:
            for record in records(job, device):
                file.write(json.dumps(record) + "\n")
                file.flush()
        if grouped:
            dist.barrier()
    finally:
        if grouped:
            dist.destroy_process_group()
