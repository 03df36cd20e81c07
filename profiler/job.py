"""Profiles the machines of a job that torchrun started: every rank calls, the first gets the Profile."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from autopar.cluster.local import num_cores
from autopar.errors import InputError
from autopar.gloo import one_worker_thread
from autopar.profiler.collect import collect_records
from autopar.profiler.local import ProfileInterrupted, Progress
from autopar.profiler.profile import Profile
from autopar.profiler.worker import Job, num_steps, records

TIMEOUT_S = 300.0  # of one collective, among machines of which some may still be starting


def is_job() -> bool:
    """Whether torchrun, or another launcher with its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def profile_job(
    *, budget_s: float, dtypes: tuple[str, ...], date: str, cases: tuple[Any, ...] = (), runtime: tuple[Any, ...] = (),
    link_budget_s: float, largest_message_bytes: int, progress: Progress | None = None,
) -> Profile | None:
    """The Profile on rank 0, None on every other rank. Raises ProfileInterrupted on rank 0 where the job is stopped.

    What is measured of devices is rank 0's, while all ranks do the same; collectives take what the slowest rank takes.
    """
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    if world % per_node:
        raise InputError(f"{world} processes on machines of {per_node}: links are measured between equal machines")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    threads = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        threads = max(1, num_cores() // per_node)
        torch.set_num_threads(threads)
    job = Job(
        num_processes=world, per_node=per_node, num_threads=threads, dtypes=dtypes, device_type=device.type,
        budget_s=budget_s, cases=cases, runtime=runtime, link_budget_s=link_budget_s,
        largest_message_bytes=largest_message_bytes,
    )
    start = time.perf_counter()
    found: list[dict[str, Any]] = []
    before = signal.signal(signal.SIGTERM, _interrupted)  # how torchrun passes an interrupt on
    try:
        with one_worker_thread():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
        for record in records(job, device):
            found.append(record)
            if progress is not None and rank == 0:
                progress(len(found), num_steps(job), str(record["label"]))
        dist.barrier()
    except KeyboardInterrupt:
        kept = collect_records(job, [found], date, time.perf_counter() - start) if rank == 0 else None
        if kept is None:
            raise
        raise ProfileInterrupted(kept) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    return collect_records(job, [found], date, time.perf_counter() - start) if rank == 0 else None


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
