"""What would make an infeasible request feasible: the memory of a device, or the number of nodes, computed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.search.best_first import Engine, lean_first
from autopar.search.candidates import Candidate, candidates

EACH_TO_TIMES = 4  # every number of nodes is tried to so many times those of the cluster,
MAX_TIMES = 1024  # then doubled ones to so many
MAX_SECONDS = 10.0  # for trying all of them


def smallest_need(engine: Engine, space: Sequence[Candidate], deadline: float | None = None) -> str:
    """One line: how much memory a device would need, and a number of nodes of the last kind that would do."""
    cluster, request = engine.cluster, engine.request
    times = min(engine.bounds.smallest_need(candidate) for candidate in lean_first(space))
    smallest = min((node.device for node in cluster.nodes), key=lambda device: device.usable_memory_bytes)
    latest = time.monotonic() + MAX_SECONDS
    nodes = some_nodes(engine, latest if deadline is None else min(latest, deadline))
    kind = cluster.nodes[-1]
    more = (
        f", or {nodes * kind.num_devices} devices ({nodes}x{kind.num_devices}x{kind.device.name})" if nodes
        else f"; no other count of {kind.device.name} nodes that was tried is enough"
    )
    return (
        f"{engine.graph.name} with a global batch of {request.global_batch} does not fit on {cluster.name}: it needs "
        f"at least {gib_up(smallest.memory_bytes * times)} GiB a device (has {_gib(smallest.memory_bytes)}){more}"
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
        if fits(engine, count):
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


def fits(engine: Engine, count: int) -> bool:
    """Whether the planner would find a plan on so many nodes like the cluster's last."""
    cluster = Cluster(name=f"{count} nodes", nodes=(engine.cluster.nodes[-1],) * count)
    wider = Engine(engine.graph, cluster, engine.request)
    for across in (False, True):
        try:
            space = candidates(
                cluster, engine.request, wider.chooser, len(engine.graph.blocks), tp_across_nodes=across)
        except InfeasibleError:
            return False
        if any(wider.bounds.smallest_need(candidate) <= 1 for candidate in lean_first(space)):
            return True
    return False
