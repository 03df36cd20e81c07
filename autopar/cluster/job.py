"""The machines of the running job: what torchrun, Open MPI, Slurm and PBS say of it in the environment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autopar.cluster.cluster import Cluster, Node
from autopar.cluster.hostfile import hosts_of
from autopar.cluster.pace import at_the_slowest
from autopar.cluster.tables import Preset, default_network, preset, racks_of
from autopar.errors import InputError

MAX_HOSTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Processes on each node of a job; None where it is not said. `device`: what the scheduler calls a GPU there."""

    source: str
    processes: tuple[int | None, ...]
    device: str | None = None


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job that this process belongs to; None where the environment tells of none. InputError for what is garbled.

    torchrun first, which runs inside the others' jobs and knows best.
    """
    if "WORLD_SIZE" in environment and "LOCAL_WORLD_SIZE" in environment:
        return _even("torchrun", environment, "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_SIZE" in environment and "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return _even("Open MPI", environment, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if "SLURM_JOB_ID" in environment or "SLURM_JOB_NODELIST" in environment:
        return _slurm(environment)
    if "PBS_NODEFILE" in environment:
        path = environment["PBS_NODEFILE"]
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"PBS_NODEFILE={path}: the file cannot be read") from None
        return Job(source="PBS", processes=tuple(hosts_of(text, where=path).values()))
    return None


def auto_cluster(
    environment: Mapping[str, str], device: str | None = None, *, num_processes: int | None = None,
    device_type: str | None = None,
) -> Cluster:
    """The job's machines; this machine where there is no job. `device` names the preset of their devices.

    Without it the job's own word for them, or this machine's devices. Nodes get the usual links and network.
    `num_processes`: what is known of a job that runs; one process alone is on this machine, whatever allocation it
    was started in. `device_type`: "cpu" or "cuda" where it is known on which of them it computes.
    """
    job = job_of(environment) if num_processes != 1 else None
    if job is None:
        job = Job(source="this machine", processes=(num_processes,))
    return cluster_of(job, device, device_type=device_type)


def cluster_of(job: Job, device: str | None = None, *, device_type: str | None = None) -> Cluster:
    """A node for each of the job's, with a device for each of its processes; each at the pace of the slowest."""
    return at_the_slowest(_cluster_of(job, device, device_type))


def _cluster_of(job: Job, device: str | None, device_type: str | None) -> Cluster:
    from autopar.cluster.parse import check_num_devices

    name = device if device is not None or device_type == "cpu" else _preset_name(job.device)
    check_num_devices(sum(count or 1 for count in job.processes), f"the job ({job.source})")
    kinds = {count: _node(count, name, device_type) for count in dict.fromkeys(job.processes)}
    nodes = tuple(kinds[count] for count in job.processes)
    if name is not None and len(set(nodes)) == 1:
        text = f"{len(nodes)}x{nodes[0].num_devices}x{nodes[0].device.name}"
        return Cluster(name=text, nodes=_racks(nodes, preset(name)))
    if len(nodes) == 1:
        return Cluster(name=f"local:{nodes[0].num_devices}", nodes=nodes)
    return Cluster(name=f"auto, {len(nodes)} nodes of {job.source}", nodes=nodes)


def _node(count: int | None, device: str | None, device_type: str | None) -> Node:
    from autopar.cluster.local import local_cluster  # imports torch

    if device is None:
        return local_cluster(count, device=device_type).nodes[0]
    kind = preset(device)
    number = count or kind.devices_per_node
    return Node(device=kind.device, num_devices=number, link=kind.link, network=default_network(kind, number))


def _racks(hosts: tuple[Node, ...], kind: Preset) -> tuple[Node, ...]:
    """Hosts that are alike, as the nodes that their link makes of them."""
    each = hosts[0].num_devices
    return tuple(
        hosts[0] if joined == 1 else
        replace(hosts[0], num_devices=joined * each, network=default_network(kind, joined * each))
        for joined in racks_of(kind, len(hosts), each)
    )


def _preset_name(word: str | None) -> str | None:
    """The preset that a scheduler's word for a GPU stands for, None where it stands for none or several."""
    if word is None:
        return None
    try:
        return preset(word).device.name
    except InputError:
        return None


def _even(source: str, environment: Mapping[str, str], all_: str, local: str) -> Job:
    total, each = (_positive(name, environment[name]) for name in (all_, local))
    if total % each:
        raise InputError(f"{all_}={total} processes on nodes of {local}={each}: the nodes are not alike; describe them "
                         "in a cluster file")
    return Job(source=source, processes=(each,) * (total // each))


def _slurm(environment: Mapping[str, str]) -> Job:
    listed = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    told = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
    if listed is None and told is None:
        raise InputError("SLURM_JOB_NODELIST is not set in this Slurm job: name the cluster, such as 4x8xH100-80GB")
    count = len(expand_hosts(listed)) if listed is not None else _positive("SLURM_NNODES", told or "")
    if listed is not None and told is not None and _positive("SLURM_JOB_NUM_NODES", told) != count:
        raise InputError(f"SLURM_JOB_NODELIST={listed} has {count} nodes, SLURM_JOB_NUM_NODES says {told}")
    gpus = environment.get("SLURM_GPUS_PER_NODE")
    kind: str | None = None
    if gpus is not None:
        *words, number = gpus.split(":")
        kind = words[-1] if words and words[-1] != "gpu" else None
        return Job(source="Slurm", processes=(_positive("SLURM_GPUS_PER_NODE", number),) * count, device=kind)
    if (here := environment.get("SLURM_GPUS_ON_NODE")) is not None:
        return Job(source="Slurm", processes=(_positive("SLURM_GPUS_ON_NODE", here),) * count)
    for name in ("SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE"):
        if name in environment:
            return Job(source="Slurm", processes=_repeated(name, environment[name], count))
    return Job(source="Slurm", processes=(None,) * count)


def expand_hosts(text: str) -> tuple[str, ...]:
    """The hosts of Slurm's "node[01-03,07],login5"; InputError where it cannot be read."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, inside in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            choices = [plain] if plain else _numbered(inside, text)
            if len(names) * len(choices) > MAX_HOSTS:
                raise InputError(f"SLURM_JOB_NODELIST={text}: more than {MAX_HOSTS} hosts")
            names = [name + choice for name in names for choice in choices]
        found += [name.strip() for name in names]
    if not found or "".join(text.split()).count("[") != text.count("]") or not all(found):
        raise InputError(f"SLURM_JOB_NODELIST={text}: not a list of hosts such as node[01-04]")
    repeated = [host for host, times in Counter(found).items() if times > 1]
    if repeated:
        raise InputError(f"SLURM_JOB_NODELIST={text}: {repeated[0]} is listed twice")
    return tuple(found)


def _numbered(inside: str, text: str) -> list[str]:
    found: list[str] = []
    for item in inside.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]) or (
            int(match[2] or match[1]) - int(match[1]) >= MAX_HOSTS
        ):
            raise InputError(f"SLURM_JOB_NODELIST={text}: {item!r} is no number or range such as 01-04")
        width = len(match[1])
        found += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def _repeated(name: str, text: str, count: int) -> tuple[int, ...]:
    """Slurm's "8(x2),4" as (8, 8, 4); it must have `count` numbers."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:\(x(\d{1,7})\))?", item)
        if match is None:
            raise InputError(f"{name}={text}: not written as Slurm does, such as 8(x2),4")
        if len(found) + int(match[2] or 1) > count:
            raise InputError(f"{name}={text} is of more than the job's {count} nodes")
        found += [_positive(name, match[1])] * int(match[2] or 1)
    if len(found) != count:
        raise InputError(f"{name}={text} is of {len(found)} nodes, the job has {count}")
    return tuple(found)


def _positive(name: str, text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise InputError(f"{name}={text}: a whole number from 1 on is expected")
    return int(text)
