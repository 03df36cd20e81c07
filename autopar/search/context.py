"""Plans with a context axis, which splits sequences: tried where they promise to be faster than all without one.

To choose the shardings of two axes at once takes seconds, so that candidates are first estimated: as if the context
axis split rows instead, for free. Only where this is well below the best so far, and still is with what a context axis
alone would add to a part of the work, are the shardings searched, at first without rewrites of layers, which are taken
to gain as much as without a context axis; and then with them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.search.best_first import Engine, Found, Outcome, Progress
from autopar.search.bounds import Bounds
from autopar.search.candidates import Candidate, PlanRequest, Work, divisors, meshes, node_size
from autopar.search.shardings import ShardingChooser

PROMISE = 0.02  # of the step time: what an estimate must be below the best
MAX_SHARDINGS = 3  # pairs of axes for which shardings are searched where there is a plan without a context axis
MAX_SHARDINGS_ALONE = 8  # and where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOutcome:
    """What was found: the outcome of the candidates that were searched, if any, and how many there were.

    `cut_short`: the time limit or an interrupt came before the shardings were chosen.
    """

    outcome: Outcome | None = None
    num_searched: int = 0
    cut_short: bool = False


def context_candidates(
    cluster: Cluster, request: PlanRequest, chooser: ShardingChooser, num_blocks: int
) -> list[Candidate]:
    """Every candidate with a context axis of at least two ranks, its groups aligned to nodes."""
    if not chooser.has_hidden_states:
        return []
    inside, found = node_size(cluster), []
    one_part = chooser.needs_whole_batch
    for pp, tp, ranks in meshes(cluster, num_blocks):
        for cp in divisors(ranks)[1:]:
            if (inside % (cp * tp) and (cp * tp) % inside) or request.global_batch % (ranks // cp):
                continue
            dp = ranks // cp
            rows = request.global_batch // dp
            if one_part and (dp > 1 or (request.micro_batch or rows) < rows):
                continue
            sizes = [rows] if one_part else [request.micro_batch] if request.micro_batch else divisors(rows)
            for size in sizes:
                if rows % size:
                    continue
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    found += [
                        Candidate(
                            pp=pp, tp=tp, cp=cp, dp_replicate=dp if zero == 0 else 1, dp_shard=1 if zero == 0 else dp,
                            zero=zero, sequence_parallel=sequence_parallel, offload_optimizer=False, micro_batch=size,
                            num_micro_batches=rows // size,
                        )
                        for zero in (0, 1, 2, 3)
                    ]
    return sorted(candidate for candidate in found if request.allows(candidate))


def estimated(engine: Engine, c: Candidate, limit: float = float("inf")) -> float:
    """The quick bound of the candidate as if its context axis were a data axis of as many parts of a row.

    Where a rougher one is not below the limit already, that one.
    """
    rough = _roughly(engine, c)
    return rough if rough >= limit else engine.bounds.quick(_without_axis(c), limit)


def _roughly(engine: Engine, c: Candidate) -> float:
    """What its estimate is at least."""
    if c.tp > 1 and engine.chooser.choose(c.tp, sequence_parallel=c.sequence_parallel) is None:
        return float("inf")
    return engine.bounds.work.rough(_without_axis(c))


def _without_axis(c: Candidate) -> Candidate:
    """The candidate with a data axis of as many parts of a row instead of its context axis."""
    replicate, shard = (c.dp_replicate * c.cp, 1) if c.zero == 0 else (c.dp_replicate, c.dp_shard * c.cp)
    return replace(c, cp=1, spread=c.spread * c.cp, dp_replicate=replicate, dp_shard=shard)


def _added_alone(engine: Engine, plain: Bounds, c: Candidate) -> float:
    """What the context axis adds to a step, roughly: what it adds without a tensor axis to as many parts of its rows.

    Its groups lie as they do beside the tensor axis, and share the network as those do. `plain` bounds with shardings
    of layers that are not rewritten, of which there are some for the axis alone.
    """
    replicate, shard = (c.dp_replicate * c.tp, 1) if c.zero == 0 else (c.dp_replicate, c.dp_shard * c.tp)
    alone = replace(
        c, tp=1, sequence_parallel=False, dp_replicate=replicate, dp_shard=shard, spread=c.spread * c.tp
    )
    without = _without_axis(alone)
    kind = engine.layout.kinds(without)[0]
    beside = replace(kind, context=engine.layout.kinds(c)[0].context)
    return plain.work.of_kind(alone, beside) - plain.work.of_kind(without, kind)


def _promises_alone(engine: Engine, plain: Bounds, space: Sequence[Candidate], limit: float) -> bool:
    """Whether the estimate of any of these is below the limit with what the context axis adds alone."""
    added: dict[Work, float] = {}
    for c in space:
        if c.work not in added:
            added[c.work] = _added_alone(engine, plain, c)
        if estimated(engine, c, limit) + added[c.work] < limit:
            return True
    return False


def _promises(engine: Engine, plain: Bounds, space: Sequence[Candidate], limit: float) -> bool:
    """Whether any of these candidates, which have the same inner axes, is estimated below the limit.

    `plain` bounds them with shardings of layers that are not rewritten.
    """
    for c in space:
        like = _without_axis(c)
        without = plain.quick(like)
        gained = engine.bounds.quick(like) / without if 0 < without < float("inf") else 1.0
        if plain.work.rough(c) * gained < limit and plain.quick(c) * gained < limit:
            return True
    return False


def search_context(
    engine: Engine, cluster: Cluster, request: PlanRequest, best: Found | None, deadline: float | None,
    progress: Progress | None = None,
) -> ContextOutcome:
    """The best plan with a context axis among those that promise enough; never worse than `best`.

    An interrupt ends it as the time limit does where there is a plan; else the caller gets the interrupt.
    """
    try:
        chosen = _promising(engine, cluster, request, best, deadline)
    except KeyboardInterrupt:
        if best is None:
            raise
        engine.interrupted = True
        chosen = None
    if chosen is None:
        return ContextOutcome(cut_short=True)
    if not chosen:
        return ContextOutcome()
    outcome = engine.search(chosen, incumbent=best, deadline=deadline, progress=progress)
    return ContextOutcome(outcome=outcome, num_searched=len(chosen))


def _promising(
    engine: Engine, cluster: Cluster, request: PlanRequest, best: Found | None, deadline: float | None
) -> list[Candidate] | None:
    """The candidates to search, with their shardings chosen; None where there was no time for it."""
    space = context_candidates(cluster, request, engine.chooser, len(engine.graph.blocks))
    asked = any(axis == "cp" and size > 1 for axis, size in request.mesh)
    limit = float("inf") if best is None or asked else best.step_time_s * (1 - PROMISE)
    most = MAX_SHARDINGS if best is not None else MAX_SHARDINGS_ALONE
    groups: dict[tuple[int, int, bool], list[Candidate]] = {}
    for c in space:
        groups.setdefault((c.cp, c.tp, c.sequence_parallel), []).append(c)
    ordered: list[tuple[int, int, bool]] = []  # the groups by their least estimates
    # What an estimate is at least: roughly and by the work alone, for all of the same work at once; and itself.
    works: dict[Work, list[Candidate]] = {}
    for c in space:
        works.setdefault(c.work, []).append(c)
    queue = [(_roughly(engine, alike[0]), alike[0], 0) for alike in works.values()]
    heapq.heapify(queue)
    while queue and queue[0][0] < limit and len(ordered) < most:
        if engine.out_of_time(deadline):
            return None
        least, c, level = heapq.heappop(queue)
        key = c.cp, c.tp, c.sequence_parallel
        if key in ordered:
            continue
        if level == 0:
            heapq.heappush(queue, (max(least, engine.bounds.work.of_work(_without_axis(c))), c, 1))
        elif level == 1:
            for own in works[c.work]:
                heapq.heappush(queue, (max(least, estimated(engine, own, limit)), own, 2))
        else:
            ordered.append(key)
    chooser = ShardingChooser(
        engine.graph, cluster, request.dtype, rows=request.micro_batch or 1, compile=request.compile
    )
    plain = Bounds(engine.graph, engine.layout, request, chooser)
    found: list[Candidate] = []
    for cp, tp, sequence_parallel in ordered:
        if engine.out_of_time(deadline):
            break
        estimates = sorted((estimated(engine, c, limit), c) for c in groups[cp, tp, sequence_parallel])
        alike = [c for estimate, c in estimates if estimate < limit]
        # Alone, the axis is chosen for in a tenth of the time.
        alone = chooser.choose(1, sequence_parallel=False, cp=cp) if tp > 1 and limit < float("inf") else None
        if alone is not None and not _promises_alone(engine, plain, alike, limit):
            continue
        if chooser.choose(tp, sequence_parallel=sequence_parallel, cp=cp) is None:
            continue
        if _promises(engine, plain, alike, limit):
            chosen = engine.chooser.choose(tp, sequence_parallel=sequence_parallel, cp=cp)
            found += alike if chosen is not None else ()
    return found
