"""What would make an infeasible request feasible: memory of a device, a number of nodes, or asking for less."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.graph.model_graph import ModelGraph
from autopar.search.best_first import Engine, lean_first
from autopar.search.candidates import Candidate, PlanRequest, candidates, divisors

EACH_TO_TIMES = 4  # every number of nodes is tried to so many times those of the cluster,
MAX_TIMES = 1024  # then doubled ones to so many
MAX_SECONDS = 10.0  # for trying all of them


def smallest_need(engine: Engine, space: Sequence[Candidate], deadline: float | None = None) -> str:
    """One line: how much memory a device would need, a number of nodes of the last kind, or less that would do."""
    cluster, request = engine.cluster, engine.request
    times = min(engine.bounds.smallest_need(candidate) for candidate in lean_first(space))
    smallest = min((node.device for node in cluster.nodes), key=lambda device: device.usable_memory_bytes)
    latest = time.monotonic() + MAX_SECONDS
    nodes = some_nodes(engine, latest if deadline is None else min(latest, deadline))
    less = "" if engine.out_of_time(deadline) else next(
        (words for words, own in lighter(engine) if fits(engine.graph, cluster, own)), ""
    )
    kind = cluster.nodes[-1]
    more = (
        f", or {nodes * kind.num_devices} devices ({nodes}x{kind.num_devices}x{kind.device.name})" if nodes
        else f"; no other count of {kind.device.name} nodes that was tried is enough"
    )
    return (
        f"{engine.graph.name} with a global batch of {request.global_batch} does not fit on {cluster.name}: it needs "
        f"at least {gib_up(smallest.memory_bytes * times)} GiB a device (has {_gib(smallest.memory_bytes)}){more}"
        f"{less and f'; on these devices it fits {less}'}"
    )


def gib_up(size_bytes: float) -> str:
    """A size in GiB, never less than it is: one decimal from 1 GiB on, else two digits."""
    size = size_bytes / 2**30
    if size <= 0 or math.isinf(size):
        return f"{size:g}"
    decimals = 1 if size >= 1 else 1 - math.floor(math.log10(size))
    return f"{math.ceil(size * 10**decimals) / 10**decimals:.{decimals}f}"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f}" if size_bytes >= 2**30 else f"{size_bytes / 2**30:.2g}"


def some_nodes(engine: Engine, deadline: float) -> int | None:
    """The first number of nodes, all like the cluster's last, that is tried and that something fits on.

    More nodes are not always better, as the batch must divide over the replicas; so the numbers are tried one by one.
    """
    for count in counts_to_try(engine.cluster):
        if time.monotonic() > deadline:
            return None
        cluster = Cluster(name=f"{count} nodes", nodes=(engine.cluster.nodes[-1],) * count)
        if fits(engine.graph, cluster, engine.request):
            return count
    return None


def counts_to_try(cluster: Cluster) -> Iterator[int]:
    """Numbers of nodes, ascending; that of the cluster itself only if its nodes differ."""
    now = len(cluster.nodes)
    alike = all(node == cluster.nodes[-1] for node in cluster.nodes)
    yield from range(now + 1 if alike else now, EACH_TO_TIMES * now + 1)
    times = 2 * EACH_TO_TIMES
    while times <= MAX_TIMES:
        yield times * now
        times *= 2


def lighter(engine: Engine) -> Iterator[tuple[str, PlanRequest]]:
    """Requests that ask for less on the same devices, the least change first, each with what to say of it."""
    cluster, request = engine.cluster, engine.request
    if request.micro_batch is not None:
        for rows in reversed(divisors(request.micro_batch)[:-1]):
            yield f"with --micro-batch {rows}", replace(request, micro_batch=rows)
    if not request.offload and any(node.device.host_bandwidth_bytes_per_s for node in cluster.nodes):
        yield "with --offload", replace(request, offload=True)
    if request.mesh:
        yield "without --mesh", replace(request, mesh=())
    if engine.chooser.needs_whole_batch:  # else its parts come one after another, and fewer of them need no less
        batch = request.global_batch // 2
        while batch:
            yield f"with a global batch of {batch}", replace(request, global_batch=batch)
            batch //= 2


def fits(graph: ModelGraph, cluster: Cluster, request: PlanRequest) -> bool:
    """Whether the planner would find a plan."""
    wider = Engine(graph, cluster, request)
    for across in (False, True):
        try:
            space = candidates(cluster, request, wider.chooser, len(graph.blocks), tp_across_nodes=across)
        except (InfeasibleError, InputError):
            return False
        if any(wider.bounds.smallest_need(candidate) <= 1 for candidate in lean_first(space)):
            return True
    return False
