"""This machine as a Cluster: its CUDA devices, or processes that share its CPU cores and memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from autopar.cluster.cluster import Cluster, DeviceType, Node
from autopar.cluster.tables import default_network, device_names, preset
from autopar.errors import InputError


def local_cluster(num_processes: int | None = None, *, device: str | None = None) -> Cluster:
    """One node with a device for each of `num_processes` processes on this machine.

    `device` is "cuda", "cpu", or None for CUDA where a CUDA device is visible. Without `num_processes`: every CUDA
    device, or a process for each core. CPU processes share cores and memory evenly; their rates are assumed, not
    measured (see `autopar.profiler`). Raises InputError where the CUDA devices are too few, differ, or are unknown.
    """
    if num_processes is not None and num_processes < 1:
        raise InputError(f"local cluster: {num_processes} processes asked, at least 1 is needed")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"local cluster: device {device!r} is neither 'cpu' nor 'cuda'")
    found = () if device == "cpu" else _cuda_devices()
    if device == "cuda" and not found:
        raise InputError("local cluster: no CUDA device is visible on this machine")
    if found:
        return _cuda_cluster(found, num_processes)
    return _cpu_cluster(num_processes or num_cores())


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Memory of this machine, or of its control group where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def match_cuda_device(name: str, memory_bytes: int) -> DeviceType | None:
    """The preset of the device that the driver calls `name`, with the memory that it reports; None where none fits.

    Cards sold under one name are told apart by memory, which must lie within 15% of the preset's.
    """
    candidates = [
        kind.device for kind in map(preset, device_names()) if any(part in name for part in kind.cuda_names)
    ]
    if not candidates:
        return None
    best = min(candidates, key=lambda kind: abs(kind.memory_bytes - memory_bytes))
    if abs(best.memory_bytes / memory_bytes - 1) > 0.15:
        return None
    sources = tuple(pair for pair in best.sources if pair[0] != "memory_bytes")
    return replace(best, memory_bytes=memory_bytes, sources=(("memory_bytes", "measured: the driver"), *sources))


def _cuda_devices() -> tuple[tuple[str, int], ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple((str(p.name), int(p.total_memory)) for p in properties)


def _cuda_cluster(found: tuple[tuple[str, int], ...], num_processes: int | None) -> Cluster:
    count = num_processes or len(found)
    if count > len(found):
        raise InputError(f"local cluster: {count} processes asked, {len(found)} CUDA devices are visible")
    names = {name for name, _ in found[:count]}
    if len(names) > 1:
        raise InputError(f"local cluster: the CUDA devices differ ({', '.join(sorted(names))}): write a cluster file")
    name, memory_bytes = found[0]
    matched = match_cuda_device(name, min(memory for _, memory in found[:count]))
    if matched is None:
        gib = memory_bytes / 1024**3
        raise InputError(f"local cluster: no preset for {name} with {gib:.1f} GiB: give its rates in a cluster file")
    kind = preset(matched.name)
    node = Node(device=matched, num_devices=count, link=kind.link, network=default_network(kind, count))
    return Cluster(name=f"local:{count}", nodes=(node,))


def _cpu_cluster(num_processes: int) -> Cluster:
    kind = preset("CPU")
    share = num_cores() / num_processes
    core = kind.device
    said = f"assumed: {share:g} cores a process, each as the CPU preset"
    device = replace(
        core,
        memory_bytes=total_memory_bytes() // num_processes,
        memory_bandwidth_bytes_per_s=core.memory_bandwidth_bytes_per_s * share,
        peak_flops=tuple((dtype, rate * share) for dtype, rate in core.peak_flops),
        sources=(
            ("memory_bytes", f"measured: memory of this machine over {num_processes} processes"),
            ("memory_bandwidth_bytes_per_s", said),
            *((f"peak_flops.{dtype}", said) for dtype, _ in core.peak_flops),
            *(pair for pair in core.sources if pair[0] in ("kernel_launch_s", "usable_memory_fraction")),
        ),
    )
    node = Node(
        device=device, num_devices=num_processes, link=kind.link, network=default_network(kind, num_processes)
    )
    return Cluster(name=f"local:{num_processes}", nodes=(node,))
