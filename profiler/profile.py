"""The Profile: what was measured of one machine, as an immutable value, and a Cluster with the measured rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.cluster.measured import CollectiveFit, MeasuredOps, OpSample
from autopar.cost_models.measured import Key, exact_key, interpolation_errors, local_tensor
from autopar.errors import InputError

NO_OPS = MeasuredOps(samples=())


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """Rate of square products of `size` x `size` in `dtype`, of one process while the others compute too."""

    dtype: str
    size: int
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """time = latency_s + size_bytes / bytes_per_s of one operation among the processes.

    `size_bytes` is the message's for send/receive and the whole tensor's for all-reduce. The slope is fitted over
    messages of at least 256 KiB, the latency over messages of at most 4 KiB; `relative_error` is the root mean square
    of (fit - measured) / measured over all `points` (size_bytes, median seconds).
    """

    backend: str
    latency_s: float
    bytes_per_s: float
    relative_error: float
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rates of one process of `num_processes` that work on this machine at the same time.

    `date` is the caller's text. `device` is the preset's name, or the driver's where no preset fits. `launch_s` is the
    time of one tiny operation after another. Links are None for one process, and where
    the processes were on several machines: what passes between those is in `fits`.
    """

    device: str
    machine: str
    torch_version: str
    date: str
    num_processes: int
    num_threads: int
    matmul: tuple[MatmulRate, ...]
    memory_bandwidth_bytes_per_s: float
    launch_s: float
    send_recv: LinkFit | None
    all_reduce: LinkFit | None
    measuring_s: float
    notes: tuple[str, ...] = ()
    driver: str = ""  # of the device and its libraries
    ops: MeasuredOps = NO_OPS
    fits: tuple[CollectiveFit, ...] = ()

    def peak_flops(self) -> dict[str, float]:
        """The best measured rate of each dtype."""
        best: dict[str, float] = {}
        for rate in self.matmul:
            best[rate.dtype] = max(best.get(rate.dtype, 0.0), rate.flops_per_s)
        return best

    def apply(self, cluster: Cluster) -> Cluster:
        """`cluster` with the measured rates; see `apply_profile`."""
        return apply_profile(cluster, self)


def sample_key(sample: OpSample) -> Key:
    """Equal for samples of the same op at the same sizes."""
    operands, outputs = map(local_tensor, sample.operands), map(local_tensor, sample.outputs)
    return exact_key(
        sample.target, sample.settings, sample.dtype, list(operands), list(outputs), sample.is_copy
    )


def with_ops(profile: Profile, samples: tuple[OpSample, ...], fits: tuple[CollectiveFit, ...]) -> Profile:
    """The profile with these samples, their leave-one-out errors, and these fits."""
    return replace(profile, ops=MeasuredOps(samples=samples, errors=interpolation_errors(samples)), fits=fits)


def merge_profiles(first: Profile, *others: Profile) -> Profile:
    """One profile of all; where two measured the same, the later in the list holds.

    Raises InputError for profiles of other machines or software, or of other numbers of processes: their times are not
    comparable.
    """
    for other in others:
        for field, what in (("device", "device"), ("machine", "machine"), ("torch_version", "version of torch"),
                            ("num_processes", "number of processes"), ("num_threads", "number of threads")):
            mine, theirs = getattr(first, field), getattr(other, field)
            if mine != theirs and (field != "num_threads" or first.device == "CPU"):
                raise InputError(f"profiles of another {what} cannot be merged: {mine!r} and {theirs!r}")
        samples = {sample_key(sample): sample for sample in (*first.ops.samples, *other.ops.samples)}
        fits = {
            (fit.collective, fit.num_ranks, fit.num_nodes, fit.per_node, fit.groups_per_node): fit
            for fit in (*first.fits, *other.fits)
        }
        merged = replace(
            other, send_recv=other.send_recv or first.send_recv,
            all_reduce=other.all_reduce or first.all_reduce, measuring_s=first.measuring_s + other.measuring_s,
            matmul=tuple({(rate.dtype, rate.size): rate for rate in (*first.matmul, *other.matmul)}.values()),
            notes=tuple(dict.fromkeys((*first.notes, *other.notes))),
        )
        first = with_ops(merged, tuple(samples.values()), tuple(fits.values()))
    return first


def apply_profile(cluster: Cluster, profile: Profile) -> Cluster:
    """`cluster` with measured rates in the devices that were profiled and in the links inside their nodes.

    Every measured constant's source begins with "measured". Dtypes that were not measured keep their rate, and so do
    networks between nodes. Raises InputError where no device of the cluster is the profiled one, or where CPU processes
    would share a machine in other numbers than when it was profiled.
    """
    if all(node.device.name != profile.device for node in cluster.nodes):
        names = ", ".join(dict.fromkeys(node.device.name for node in cluster.nodes))
        raise InputError(f"the profile is of {profile.device}, cluster {cluster.name!r} has {names}: profile that")
    known: dict[Node, Node] = {}
    for node in cluster.nodes:
        if node not in known:
            known[node] = _measured(node, profile) if node.device.name == profile.device else node
    return Cluster(name=cluster.name, nodes=tuple(known[node] for node in cluster.nodes))


def _measured(node: Node, profile: Profile) -> Node:
    if node.device.name == "CPU" and node.num_devices != profile.num_processes:
        raise InputError(
            f"the profile is of {profile.num_processes} CPU processes at a time, the node has {node.num_devices}: "
            f"profile {node.num_devices} processes"
        )
    when = f" on {profile.date}" if profile.date else ""
    said = f"measured{when}: {profile.num_processes} processes at a time, torch {profile.torch_version}"
    inside = tuple(fit for fit in profile.fits if fit.num_nodes == 1)
    across = tuple(fit for fit in profile.fits if fit.num_nodes > 1)
    return replace(
        node, device=_device(node.device, profile, said), link=replace(_link(node.link, profile, said), fits=inside),
        network=replace(node.network, fits=across) if across else node.network,
    )


def _device(device: DeviceType, profile: Profile, said: str) -> DeviceType:
    peaks = profile.peak_flops()
    sources = dict(device.sources) | dict.fromkeys(("memory_bandwidth_bytes_per_s", "kernel_launch_s"), said)
    sources |= {f"peak_flops.{dtype}": said for dtype in peaks}
    return replace(
        device,
        peak_flops=tuple((dict(device.peak_flops) | peaks).items()),
        memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s,
        kernel_launch_s=profile.launch_s,
        sources=tuple(sources.items()),
        measured=profile.ops if profile.ops.samples else None,
    )


def _link(link: Link, profile: Profile, said: str) -> Link:
    """The link whose ring all-reduce takes the measured time: 2 (n-1)/n of the tensor passes it, in 2 log2(n) hops.

    The all-reduce is taken rather than send/receive because all processes work in it, as they do in a step.
    """
    fit, n = profile.all_reduce, profile.num_processes
    if fit is None or n == 1:
        return link
    return replace(
        link,
        latency_s=fit.latency_s / (2 * math.ceil(math.log2(n))),
        bandwidth_bytes_per_s=fit.bytes_per_s * 2 * (n - 1) / n,
        source=f"{said}, {fit.backend} all-reduce, fit error {fit.relative_error:.0%}",
    )
