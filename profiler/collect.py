"""The processes' records as one Profile, what was cut short left out.

An op takes what the slowest process took, on average over the sweeps: all were timed at once, and in a step they wait
for one another. Processes that share a machine are seldom equally fast at one time, though they are in the long run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from pydantic import TypeAdapter

from autopar.cluster.local import match_cuda_device, num_cores
from autopar.cluster.measured import CollectiveFit, OpSample
from autopar.profiler.fit import fit_link
from autopar.profiler.profile import MatmulRate, Profile, with_ops
from autopar.profiler.worker import Job

DEVICE_TIMES = ("forward_s", "backward_s")
SPREADS = ("forward_spread", "backward_spread")
HOST_TIMES = ("host_forward_s", "host_backward_s")


def collect(job: Job, texts: Sequence[str], date: str, measuring_s: float) -> Profile | None:
    """The Profile of what all processes have written so far; None before they know their rates.

    `texts` has the lines of each process. The last line may be cut off.
    """
    return collect_records(job, [_whole(text) for text in texts], date, measuring_s)


def collect_records(
    job: Job, each: Sequence[Sequence[dict[str, Any]]], date: str, measuring_s: float
) -> Profile | None:
    """`collect`, of records that are not yet text."""
    rates = [next((record["rates"] for record in own if "rates" in record), None) for own in each]
    if not each or any(found is None for found in rates):
        return None
    known = [found for found in rates if found is not None]
    samples = _samples(each, "runtime") + _samples(each, "op")
    failed = {record["label"]: record["failed"] for own in each for record in own if "failed" in record}
    profile = _profile(job, known, date, measuring_s, tuple(
        f"{target} could not be measured: {reason}" for target, reason in sorted(failed.items())
    ))
    fits = [record["fit"] for record in each[0] if "fit" in record]
    return with_ops(
        profile, tuple(TypeAdapter(list[OpSample]).validate_python(samples)),
        TypeAdapter(tuple[CollectiveFit, ...]).validate_python(fits),
    )


def _whole(text: str) -> list[dict[str, Any]]:
    """The records of whole lines."""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _samples(each: Sequence[Sequence[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    """The samples that every process has, of as many sweeps as all of them have, in the order of the cases."""
    found: list[dict[int, list[dict[str, Any]]]] = []
    for own in each:
        sweeps: dict[int, list[dict[str, Any]]] = {}
        for record in own:
            if kind in record and "sample" in record:
                sweeps.setdefault(record[kind], []).append(record["sample"])
        found.append(sweeps)
    whole = sorted(index for index in found[0] if all(index in sweeps for sweeps in found))
    return [_together(list(zip(*(sweeps[index] for sweeps in found), strict=False))) for index in whole]


def _together(sweeps: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """One sample of what all processes saw in each sweep. What disturbs the host only adds: of its times the least."""
    return {
        **sweeps[0][0],
        **{name: fmean(max(seen[name] for seen in sweep) for sweep in sweeps) for name in DEVICE_TIMES},
        **{name: fmean(median(seen[name] for seen in sweep) for sweep in sweeps) for name in SPREADS},
        **{name: min(median(seen[name] for seen in sweep) for sweep in sweeps) for name in HOST_TIMES},
    }


def _profile(
    job: Job, results: Sequence[dict[str, Any]], date: str, measuring_s: float, notes: tuple[str, ...]
) -> Profile:
    backend = "nccl" if job.device_type == "cuda" else "gloo"
    matmul = tuple(
        MatmulRate(dtype=row["dtype"], size=row["size"],
                   flops_per_s=median(result["matmul"][i]["flops_per_s"] for result in results))
        for i, row in enumerate(results[0]["matmul"])
    )
    said: list[str] = []
    name, machine, driver = "CPU", cpu_model(), f"{torch.backends.cpu.get_cpu_capability()}, oneDNN, gloo"
    if job.device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine = str(properties.name)
        found = match_cuda_device(machine, int(properties.total_memory))
        name = found.name if found is not None else machine
        driver = f"CUDA {torch.version.cuda}, {_nvidia_driver()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"  # type: ignore[no-untyped-call]
    elif job.num_processes * job.num_threads > num_cores():
        said.append(f"{job.num_processes} processes share {num_cores()} cores: rates are a process's share")
    # Messages among all processes tell of the links inside a machine only where all are on one.
    first = results[0] if job.num_processes == job.per_node else {}
    return Profile(
        device=name, machine=machine, torch_version=torch.__version__, date=date, driver=driver,
        num_processes=job.per_node, num_threads=job.num_threads, matmul=matmul,
        memory_bandwidth_bytes_per_s=median(result["memory"] for result in results),
        launch_s=median(result["launch"] for result in results),
        send_recv=fit_link(dict(first["send_recv"]), backend=backend) if "send_recv" in first else None,
        all_reduce=fit_link(dict(first["all_reduce"]), backend=backend) if "all_reduce" in first else None,
        measuring_s=measuring_s, notes=(*said, *notes),
    )


def cpu_model() -> str:
    """The processor's name and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {num_cores()} cores"


def _nvidia_driver() -> str:
    """The kernel module's version, as the driver states it; it has no call in torch."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "driver not known"
    return "driver " + next((word for word in line.split() if word[0].isdigit()), "not known")
