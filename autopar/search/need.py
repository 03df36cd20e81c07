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
MAX_TIMES = 1024  # then doubled ones to so many, and those between the last that is too few and the first that is not
MAX_SECONDS = 20.0  # for trying all of them


def smallest_need(engine: Engine, space: Sequence[Candidate], deadline: float | None = None) -> str:
    """One line: how much memory a device would need, a number of nodes of the last kind, or less that would do."""
    cluster, request = engine.cluster, engine.request
    times = min(engine.bounds.smallest_need(candidate) for candidate in lean_first(space))
    smallest = min((node.device for node in cluster.nodes), key=lambda device: device.usable_memory_bytes)
    latest = time.monotonic() + MAX_SECONDS
    nodes = some_nodes(engine, times, latest if deadline is None else min(latest, deadline))
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


def some_nodes(engine: Engine, times: float, deadline: float) -> int | None:
    """A number of nodes, all like the cluster's last, that something fits on: the fewest of those that are tried.

    `times`: how much more memory the cluster's own devices would need. More nodes are not always better, as the batch
    must divide over the replicas.
    """
    def fit(count: int) -> bool:
        cluster = Cluster(name=f"{count} nodes", nodes=(engine.cluster.nodes[-1],) * count)
        return fits(engine.graph, cluster, engine.request)

    few = fewest(engine.cluster, times) - 1
    for count in counts_to_try(engine.cluster, times):
        if time.monotonic() > deadline:
            return None
        if fit(count):
            break
        few = count
    else:
        return None
    while count - few > 1 and time.monotonic() <= deadline:
        between = (few + count) // 2
        if fit(between):
            count = between
        else:
            few = between
    return count


def fewest(cluster: Cluster, times: float) -> int:
    """The fewest nodes that may be enough: the cluster's own number only if its nodes differ.

    Where each device needs `times` its memory, so many times the nodes share out all of it, at best.
    """
    now = len(cluster.nodes)
    if any(node != cluster.nodes[-1] for node in cluster.nodes):
        return now
    return max(now + 1, math.ceil(now * times * (1 - 1e-9)) if math.isfinite(times) else 0)


def counts_to_try(cluster: Cluster, times: float = 1.0) -> Iterator[int]:
    """Numbers of nodes, ascending, from the fewest on."""
    now, first = len(cluster.nodes), fewest(cluster, times)
    yield from range(first, EACH_TO_TIMES * now + 1)
    count = max(first, 2 * EACH_TO_TIMES * now)
    while count <= MAX_TIMES * now:
        yield count
        count *= 2


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
