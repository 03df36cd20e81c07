"""Message times among the processes of a job, over the groups that plans use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from autopar.cluster.measured import CollectiveFit
from autopar.gloo import one_worker_thread
from autopar.profiler.fit_pieces import fit_pieces
from autopar.profiler.link_groups import GroupKind, group_kinds, pair_kinds
from autopar.profiler.step_collectives import step_collective

SIZES_BYTES = (1024, 4096, 256 * 1024, 1024 * 1024, 4 * 1024 * 1024, 16 * 1024 * 1024)  # of the short profile
MIN_ROUNDS = 3
MAX_ROUNDS = 30
SMALLEST_BYTES = 1024
LARGEST_BYTES = 2**30
LEAST_BYTES = 2**20  # up to here every size is measured: small ones tell nothing of a link's rate
WORK_SIZE = 512  # of a product before a collective: 5 ms at 50 GFLOP/s
CHAIN = 6  # collectives with work before each, one after another as in a step
SHORTEST_S = 1e-6
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def all_reduce_times_s(device: torch.device, budget_s: float) -> dict[int, float]:
    """Median seconds of an all-reduce by size of the tensor, of the slowest process."""
    return _times(lambda buffer: dist.all_reduce(buffer), device, budget_s)


def send_recv_times_s(device: torch.device, budget_s: float) -> dict[int, float]:
    """Median seconds of a message by size, half of there and back, between ranks 2i and 2i+1, all pairs at once."""
    other = dist.get_rank() ^ 1

    def there_and_back(buffer: torch.Tensor) -> None:
        if other < dist.get_world_size():
            _there_and_back(buffer, other, dist.get_rank() % 2 == 0, None)

    return {size: time_s / 2 for size, time_s in _times(there_and_back, device, budget_s).items()}


def _times(operation: Callable[[torch.Tensor], object], device: torch.device, budget_s: float) -> dict[int, float]:
    buffers = {size: torch.zeros(size // 4, device=device) for size in SIZES_BYTES}
    for buffer in buffers.values():
        operation(buffer)
    times: dict[int, list[float]] = {size: [] for size in SIZES_BYTES}
    start = time.perf_counter()
    for count in range(MAX_ROUNDS):
        over = float(time.perf_counter() - start > budget_s and count >= MIN_ROUNDS)
        if largest(over, device) > 0:  # every process stops after the same round
            break
        for size, buffer in buffers.items():
            largest(0.0, device)  # all begin together
            times[size].append(_once_s(partial(operation, buffer), device))
    return {size: largest(median(seen), device) for size, seen in times.items()}


def largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


# -- every collective over every group


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWork:
    """One collective over one kind of group."""

    collective: str
    kind: GroupKind


def link_work(world: int, per_node: int) -> tuple[LinkWork, ...]:
    """What there is to measure in a job of `world` ranks, `per_node` on each node; nothing for one rank."""
    found = [LinkWork(collective=name, kind=kind) for kind in group_kinds(world, per_node) for name in COLLECTIVES]
    return (*found, *(LinkWork(collective="send_recv", kind=kind) for kind in pair_kinds(world, per_node)))


def measure_links(
    work: tuple[LinkWork, ...], device: torch.device, *, budget_s: float, largest_bytes: int = LARGEST_BYTES
) -> Iterator[CollectiveFit]:
    """The fit of each piece of work as soon as it is measured. All ranks of the job must iterate.

    `budget_s` is what each piece may take, about; messages grow fourfold, then twofold, to a MiB at least, until one
    takes half of what is left, or reaches `largest_bytes`.
    """
    if not work:
        return  # a process alone has no group
    made: dict[GroupKind, dist.ProcessGroup | None] = {}
    backend = dist.get_backend()
    for item in work:
        if item.kind not in made:
            made[item.kind] = None
            for ranks in item.kind.groups:
                with one_worker_thread():  # as groups of a training step have
                    group = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    made[item.kind] = group
        points = _points(item, made[item.kind], device, budget_s, largest_bytes)
        pieces, error = fit_pieces(points)
        yield CollectiveFit(
            collective=item.collective, backend=backend, num_ranks=item.kind.size, num_nodes=item.kind.num_nodes,
            per_node=item.kind.per_node, groups_per_node=item.kind.groups_per_node, pieces=pieces,
            relative_error=error, points=points,
        )


def _points(
    item: LinkWork, group: dist.ProcessGroup | None, device: torch.device, budget_s: float, largest_bytes: int
) -> tuple[tuple[int, float], ...]:
    """(size_bytes, median of what the slowest rank takes), until time or memory runs out."""
    points: list[tuple[int, float]] = []
    work = WorkBefore(device, nothing=item.collective == "send_recv")
    work_s = work.slowest_s(device, CHAIN)  # whatever decides how often is the same on all ranks
    chain = 1 if work.nothing else CHAIN
    size, start = SMALLEST_BYTES, time.perf_counter()
    count = 12  # sizes that are still to come, about
    while size <= largest_bytes:
        operation = _operation(item, group, size, device)
        largest(0.0, device)
        first_s = largest(_once_s(operation, device), device)
        left_s = budget_s - largest(time.perf_counter() - start, device)
        if points and size > LEAST_BYTES and (left_s <= 0 or first_s > left_s / 2):
            break
        share_s = max(0.0, left_s) / max(2, count)
        round_s = chain * (first_s + 2 * work_s)
        rounds = int(max(MIN_ROUNDS, min(MAX_ROUNDS, share_s / max(round_s, 1e-6))))
        seen = [work.added_s(operation, device, chain) for _ in range(rounds)]
        halves = 2 if item.collective == "send_recv" else 1
        points.append((size, max(median(seen), SHORTEST_S) / halves))
        del operation
        size *= 4 if size < 2**18 else 2
        count -= 1
    return tuple(points)


class WorkBefore:
    """What a CPU computes before each collective, as in a training step, and what that takes alone.

    Processes that have just met have awake threads and no skew between them. In a step they compute for some
    milliseconds, wait for the slower one, and leave a collective at unlike times, so that the next finds them apart: a
    collective takes what a chain of work and collectives takes beyond the work alone. Work takes as long as the slowest
    process needs, as all that is measured of ops does, so that waiting for it is no part of the collective. A GPU works
    on while its links do: there it is nothing. A message between stages is waited for by itself, so that its sender's
    skew is no part of it.
    """

    def __init__(self, device: torch.device, *, nothing: bool = False) -> None:
        self.nothing = nothing or device.type != "cpu"
        self._data = torch.ones(1 if self.nothing else WORK_SIZE, 1 if self.nothing else WORK_SIZE)

    def run(self) -> None:
        """Computes for some milliseconds."""
        if not self.nothing:
            torch.mm(self._data, self._data)

    def slowest_s(self, device: torch.device, count: int) -> float:
        """Seconds of the work alone, on average over so many in a row, of the slowest process; all ranks call it."""
        return 0.0 if self.nothing else largest(self._chain_s(_nothing, device, count), device)

    def added_s(self, operation: Callable[[], object], device: torch.device, chain: int) -> float:
        """Seconds that an operation adds to the work before it, in a chain of so many; all ranks call it.

        Of the slowest process in the chain, over the slowest with the work alone: the same on all ranks.
        """
        alone_s = self.slowest_s(device, chain)
        return largest(self._chain_s(operation, device, chain), device) - alone_s

    def _chain_s(self, operation: Callable[[], object], device: torch.device, chain: int) -> float:
        """Seconds of the work and the operation after it, on average over a chain that all ranks begin together."""

        def one_after_another() -> None:
            for _ in range(chain):
                self.run()
                operation()

        largest(0.0, device)
        return _once_s(one_after_another, device) / chain


def _nothing() -> None:
    """No operation."""


def _once_s(operation: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


# torch 2.13 has new names for these and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _operation(
    item: LinkWork, group: dist.ProcessGroup | None, size_bytes: int, device: torch.device
) -> Callable[[], object]:
    """One call of the collective on a tensor of that size as a whole; nothing on ranks that look on."""
    if group is None:
        return lambda: None
    ranks = item.kind.size
    numel = max(1, math.ceil(size_bytes / 4 / ranks)) * ranks
    if item.collective == "all_to_all":  # the size is that of all ranks' tensors together
        numel = max(1, numel // ranks // ranks) * ranks
    if device.type == "cpu" and item.collective in COLLECTIVES:
        return step_collective(item.collective, group, numel)
    whole = torch.zeros(numel, device=device)
    match item.collective:
        case "all_reduce":
            return lambda: dist.all_reduce(whole, group=group)
        case "all_gather":
            part = torch.zeros(numel // ranks, device=device)
            return lambda: _all_gather(whole, part, group=group)
        case "reduce_scatter":
            part = torch.zeros(numel // ranks, device=device)
            return lambda: _reduce_scatter(part, whole, group=group)
        case "all_to_all":
            other = torch.zeros(numel, device=device)
            return lambda: dist.all_to_all_single(other, whole, group=group)
    mine = dist.get_group_rank(group, dist.get_rank())
    peer = dist.get_global_rank(group, 1 - mine)
    return lambda: _there_and_back(whole, peer, mine == 0, group)


def _there_and_back(
    buffer: torch.Tensor, other: int, sends_first: bool, group: dist.ProcessGroup | None
) -> None:
    for sends in (sends_first, not sends_first):
        if sends:
            dist.send(buffer, other, group=group)
        else:
            dist.recv(buffer, other, group=group)
