"""What one process measures, one record after another; all processes of a job do the same at the same time.

A shared machine has slow seconds, in which everything takes up to half as long again. So everything of a device is
measured in several sweeps, and neighbours, which are ops of one model, far from each other in each: then slow seconds
meet a few ops of every plan and not most ops of one.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from autopar.profiler.clock import clock_of
from autopar.profiler.links import all_reduce_times_s, link_work, measure_links, send_recv_times_s
from autopar.profiler.op_cases import OpCase
from autopar.profiler.op_timing import ELEMENTS, time_case, time_runtime
from autopar.profiler.ops import launch_s, matmul_flops_per_s, memory_bytes_per_s
from autopar.profiler.profile import MatmulRate
from autopar.profiler.unit_timing import UNIT_ELEMENTS, time_unit

SIZES = {"cpu": (256, 768), "cuda": (2048, 8192)}
OPS_SHARE = 0.6  # of the budget for rates; the rest is the links'
UNIT = "unit"  # a layer of data parallelism
SWEEPS = 2  # over all that is measured of a device
CASE_BUDGET_S = 0.06  # of the passes of one op in all sweeps, forward and backward each


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCase:
    """A piece of the runtime's own work to measure, as `op_timing.time_runtime` names it."""

    name: str
    dtype: str
    numel: int
    sharded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the processes measure. `budget_s` is that of the rates, `link_budget_s` each collective's."""

    num_processes: int
    per_node: int
    num_threads: int
    dtypes: tuple[str, ...]
    device_type: str
    budget_s: float
    folder: str = ""
    cases: tuple[OpCase, ...] = ()
    runtime: tuple[RuntimeCase, ...] = ()
    link_budget_s: float = 0.0
    largest_message_bytes: int = 2**30


def runtime_cases(dtype: str, *, grouped: bool) -> tuple[RuntimeCase, ...]:
    """Optimizer steps, of plain and of sharded parameters, and passes over memory, by size."""
    found = [
        RuntimeCase(name=name, dtype="float32", numel=numel, sharded=sharded)
        for name in ("adamw", "adam", "sgd") for sharded in ((False, True) if grouped else (False,))
        for numel in ELEMENTS
    ]
    dtypes = dict.fromkeys((dtype, "float32"))
    found += [
        RuntimeCase(name=name, dtype=own, numel=numel)
        for name in ("accumulate", "copy") for own in dtypes for numel in ELEMENTS
    ]
    if grouped:
        found += [
            RuntimeCase(name=UNIT, dtype="float32", numel=numel, sharded=sharded)
            for sharded in (True, False) for numel in UNIT_ELEMENTS
        ]
    return tuple(found)


def ignore_interrupts() -> None:
    """A terminal interrupts all processes at once; the one that started them decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def num_steps(job: Job) -> int:
    """How many records there will be."""
    return num_device_steps(job) + len(_links(job))


def num_device_steps(job: Job) -> int:
    """How many of the records are of devices; they come before those of links."""
    return 1 + SWEEPS * (len(job.cases) + len(job.runtime))


def records(job: Job, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rates, then each op in every sweep, then each collective; every record has a "label"."""
    grouped = job.num_processes > 1

    def together() -> None:
        if grouped:
            dist.barrier()

    yield {"label": "rates", "rates": _rates(job, device, grouped)}
    clock = clock_of(device)

    def go_on(spent_s: float) -> bool:
        return spent_s < CASE_BUDGET_S / SWEEPS

    mesh = None
    if any(case.sharded for case in job.runtime):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (job.num_processes,))
    for _ in range(SWEEPS):
        for index in apart(len(job.runtime)):
            case = job.runtime[index]
            together()
            if case.name == UNIT:
                one = time_unit(case.numel, job.num_processes, sharded=case.sharded, device=device, clock=clock)
            else:
                one = time_runtime(
                    case.name, case.dtype, case.numel, device, clock, go_on, mesh if case.sharded else None
                )
            yield {"label": one.target, "runtime": index, "sample": asdict(one)}
        for index in apart(len(job.cases)):
            item = job.cases[index]
            together()
            try:
                sample = time_case(item, device, clock, go_on)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                yield {"label": item.target, "op": index, "failed": str(error).splitlines()[0]}
            else:
                yield {"label": item.target, "op": index, "sample": asdict(sample)}
    work = _links(job)
    for own, fit in zip(
        work, measure_links(work, device, budget_s=job.link_budget_s, largest_bytes=job.largest_message_bytes),
        strict=True,
    ):
        yield {"label": f"{own.collective}, {own.kind.name}", "fit": asdict(fit)}


def apart(count: int) -> tuple[int, ...]:
    """0 to count - 1 in an order in which neighbours are about the square root of `count` from each other."""
    step = max(1, math.isqrt(count))
    return tuple(place for first in range(step) for place in range(first, count, step))


def _links(job: Job) -> tuple[Any, ...]:
    return link_work(job.num_processes, job.per_node) if job.link_budget_s > 0 and job.num_processes > 1 else ()


def _rates(job: Job, device: torch.device, grouped: bool) -> dict[str, Any]:
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
