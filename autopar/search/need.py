"""What would make an infeasible request feasible: the memory of a device, or the number of nodes, computed."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.plan.plan import Recompute
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, candidates

MAX_TIMES = 1024  # how many times more nodes are tried


def smallest_need(engine: Engine, space: Sequence[Candidate]) -> str:
    """One line: how much memory a device would need, and how many nodes of the last kind would do."""
    cluster, request = engine.cluster, engine.request
    times = min(engine.bounds.smallest_need(candidate) for candidate in leanest(space))
    smallest = min((node.device for node in cluster.nodes), key=lambda device: device.usable_memory_bytes)
    nodes = fewest_nodes(engine)
    kind = cluster.nodes[-1]
    more = (
        f", or {nodes * kind.num_devices} devices ({nodes}x{kind.num_devices}x{kind.device.name})" if nodes
        else f"; up to {MAX_TIMES} times as many {kind.device.name} nodes do not help"
    )
    return (
        f"{engine.graph.name} with a global batch of {request.global_batch} does not fit on {cluster.name}: it needs "
        f"at least {_gib(smallest.memory_bytes * times)} GiB a device (has {_gib(smallest.memory_bytes)}){more}"
    )


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f}" if size_bytes >= 2**30 else f"{size_bytes / 2**30:.2g}"


def leanest(space: Sequence[Candidate]) -> list[Candidate]:
    """For each mesh the candidates that can need least memory: fewest rows, recomputation, most sharding."""
    found: dict[tuple[object, ...], Candidate] = {}
    for c in space:
        if c.recompute is not Recompute.FULL:
            continue
        key = (c.pp, c.tp, c.sequence_parallel, c.split_weights)
        rank = (c.micro_batch, -c.zero, -c.dp_shard)
        best = found.get(key)
        if best is None or rank < (best.micro_batch, -best.zero, -best.dp_shard):
            found[key] = c
    return list(found.values())


def fewest_nodes(engine: Engine) -> int | None:
    """The smallest number of nodes, all like the cluster's last, that something fits on; doubled, then bisected."""
    node, now = engine.cluster.nodes[-1], len(engine.cluster.nodes)

    def fits(count: int) -> bool:
        cluster = Cluster(name=f"{count} nodes", nodes=(node,) * count)
        wider = Engine(engine.graph, cluster, engine.request)
        try:
            space = candidates(cluster, engine.request, wider.chooser, len(engine.graph.blocks))
        except InfeasibleError:
            return False
        return any(wider.bounds.smallest_need(candidate) <= 1 for candidate in leanest(space))

    low, high = now, now
    while not fits(high := 2 * high):
        low = high
        if high >= MAX_TIMES * now:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
