"""What would make an infeasible request feasible: memory of a device, a number of nodes, or asking for less."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.graph.model_graph import ModelGraph
from autopar.search.best_first import Engine, lean_first, new_chooser
from autopar.search.candidates import Candidate, PlanRequest, candidates, divisors
from autopar.search.shardings import ShardingChooser

EACH_TO_TIMES = 4  # every number of nodes is tried to so many times those of the cluster,
MAX_TIMES = 1024  # then doubled ones to so many, and those between the last that is too few and the first that is not
# A limit in work, not in time, so that the same input gets the same answer on every machine. The units are, for each
# stage of a candidate, STAGE_WORK and one for each block; for each choice of shardings CHOICE_WORK for each op; one for
# each node. They took 1 to 2 us each where that was measured (Llama of 8, 70 and 405 billion parameters): 20 s in all.
MAX_WORK = 12_000_000
STAGE_WORK = 100
CHOICE_WORK = 800


@dataclass(slots=True, kw_only=True)
class Work:
    """What was done of `most` units; `deadline` is of time.monotonic()."""

    most: float = math.inf
    deadline: float | None = None
    done: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.done >= self.most or (self.deadline is not None and time.monotonic() > self.deadline)


def smallest_need(engine: Engine, space: Sequence[Candidate], deadline: float | None = None) -> str:
    """One line: how much memory a device would need, a number of nodes of the last kind, or less that would do."""
    cluster, request = engine.cluster, engine.request
    times = min(engine.bounds.smallest_need(candidate) for candidate in lean_first(space))
    smallest = min((node.device for node in cluster.nodes), key=lambda device: device.usable_memory_bytes)
    nodes = some_nodes(engine, times, Work(most=MAX_WORK, deadline=deadline))
    unlimited = Work(deadline=deadline)
    less = "" if engine.out_of_time(deadline) else next(
        (words for words, own in lighter(engine) if fits(engine.graph, cluster, own, unlimited)), ""
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


def some_nodes(engine: Engine, times: float, work: Work) -> int | None:
    """A number of nodes, all like the cluster's last, that something fits on: the fewest of those that are tried.

    `times`: how much more memory the cluster's own devices would need. More nodes are not always better, as the batch
    must divide over the replicas. Trying ends when the `work` is over.
    """
    node, most = engine.cluster.nodes[-1], EACH_TO_TIMES * len(engine.cluster.nodes)
    chooser: ShardingChooser | None = None

    def fit(count: int) -> bool:
        nonlocal chooser, most
        if chooser is None or count > most:  # a group of the first ranks is the same on any number of these nodes
            most = max(count, most)
            chooser = new_chooser(engine.graph, Cluster(name=f"{most} nodes", nodes=(node,) * most), engine.request)
        cluster = Cluster(name=f"{count} nodes", nodes=(node,) * count)
        return fits(engine.graph, cluster, engine.request, work, chooser)

    few = fewest(engine.cluster, times) - 1
    for count in counts_to_try(engine.cluster, times):
        if work.is_over:
            return None
        if fit(count):
            break
        few = count
    else:
        return None
    while count - few > 1 and not work.is_over:
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


def fits(
    graph: ModelGraph, cluster: Cluster, request: PlanRequest, work: Work, chooser: ShardingChooser | None = None
) -> bool:
    """Whether the planner would find a plan; False, too, where the work is over before that is known."""
    wider = Engine(graph, cluster, request, chooser=chooser)
    choice_work = CHOICE_WORK * sum(len(cls.ops) for cls in wider.chooser.classes)
    work.done += len(cluster.nodes)
    for across in (False, True):
        before = wider.chooser.num_choices
        try:
            space = candidates(cluster, request, wider.chooser, len(graph.blocks), tp_across_nodes=across)
        except (InfeasibleError, InputError):
            return False
        finally:
            work.done += choice_work * (wider.chooser.num_choices - before)
        for candidate in lean_first(space):
            if work.is_over:
                return False
            work.done += candidate.pp * (STAGE_WORK + len(graph.blocks))
            if wider.bounds.smallest_need(candidate) <= 1:
                return True
    return False
