"""Plans with a context axis, which splits sequences: tried where they promise to be faster than all without one.

To choose the shardings of two axes at once takes seconds, so that candidates are first estimated: as if the context
axis split rows instead, for free; then with what a context axis alone adds to as many parts of the rows, and for a cut.
Only where this is well below the best so far are the shardings searched, those of the best estimate first: without
rewrites of layers, which are taken to gain as much as without a context axis; and then with them. What is a little
slower than the best that was found is looked at for the sake of other orders of micro-batches, unless those promise
less, too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster
from autopar.search.best_first import Engine, Found, Outcome, Progress
from autopar.search.bounds import Bounds
from autopar.search.candidates import Candidate, PlanRequest, Work, divisors, meshes, node_size
from autopar.search.shardings import ShardingChooser

PROMISE = 0.02  # of the step time: what an estimate must be below the best
NEAR = 1.01  # times the best with a context axis: what other axes are looked at beside it
MAX_SHARDINGS = 3  # pairs of axes for which shardings are searched where there is a plan without a context axis
MAX_SHARDINGS_ALONE = 8  # and where there is none
MAX_ORDERED = 4  # candidates of a pair of axes whose time in other orders is estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOutcome:
    """What was found: the outcome of the candidates that were searched, if any, and how many there were.

    `cut_short`: the time limit or an interrupt came before the shardings were chosen; then `rough_s` is what no plan
    with a context axis is below, as if that axis split rows for free.
    """

    outcome: Outcome | None = None
    num_searched: int = 0
    cut_short: bool = False
    rough_s: float = math.inf


def context_candidates(
    cluster: Cluster, request: PlanRequest, chooser: ShardingChooser, num_blocks: int
) -> list[Candidate]:
    """Every candidate with a context axis of at least two ranks, its groups aligned to nodes.

    But for those that have as many tokens on a rank as another one with fewer rows in a micro-batch, of which each is
    on fewer ranks: that one has about the same work and less to exchange. Beside a tensor axis sequences are parallel
    where they can be.
    """
    if not chooser.has_hidden_states:
        return []
    inside, found = node_size(cluster), []
    one_part = chooser.needs_whole_batch
    free = not (request.micro_batch or request.mesh or one_part)

    def is_aligned(ranks: int) -> bool:
        return not (inside % ranks and ranks % inside)

    for pp, tp, ranks in meshes(cluster, num_blocks):
        for cp in divisors(ranks)[1:]:
            if not is_aligned(cp * tp) or request.global_batch % (ranks // cp):
                continue
            dp = ranks // cp
            rows = request.global_batch // dp
            if one_part and (dp > 1 or (request.micro_batch or rows) < rows):
                continue
            sizes = [rows] if one_part else [request.micro_batch] if request.micro_batch else divisors(rows)
            for size in sizes:
                if rows % size or (free and any(is_aligned(cp // d * tp) for d in divisors(math.gcd(cp, size))[1:])):
                    continue
                found += [
                    Candidate(
                        pp=pp, tp=tp, cp=cp, dp_replicate=dp if zero == 0 else 1, dp_shard=1 if zero == 0 else dp,
                        zero=zero, sequence_parallel=tp > 1 and chooser.splits_sequence(cp * tp),
                        offload_optimizer=False, micro_batch=size, num_micro_batches=rows // size,
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
    asked = any(axis == "cp" and size > 1 for axis, size in request.mesh)
    most = MAX_SHARDINGS if best is not None else MAX_SHARDINGS_ALONE
    plain = Bounds(engine.graph, engine.layout, request, engine.chooser.plain)
    found: Outcome | None = None
    num_searched, cut_short = 0, True
    looked_at: list[Sequence[Candidate]] = []
    try:
        promising = _Promising(engine, plain, _space(engine, cluster, request))
        limit = estimate_limit = float("inf") if best is None or asked else best.step_time_s * (1 - PROMISE)
        for _ in range(most):
            space = promising.next_group(estimate_limit, deadline)
            if space is None:
                break
            if best is not None and promising.estimate_s > best.step_time_s:
                seen_s = min(map(promising.in_other_orders_s, looked_at), default=math.inf)
                if seen_s < promising.in_other_orders_s(space) < math.inf:
                    continue  # slower in the usual order, and promises less in others
            looked_at.append(space)
            alike = _with_shardings(engine, plain, space, limit)
            if not alike:
                continue
            own = engine.search(alike, incumbent=best, deadline=deadline, progress=progress)
            num_searched += len(alike)
            found = own if found is None else _both(found, own)
            if own.best is not None and own.best != best:
                # Those behind may be as quick, or quicker in other orders; estimates are off alike.
                best = own.best
                if not asked:
                    limit = best.step_time_s * NEAR
                    estimate_limit = NEAR * max(promising.estimate_s, best.step_time_s)
        cut_short = engine.out_of_time(deadline)
    except KeyboardInterrupt:
        if best is None:
            raise
        engine.interrupted = True
    rough = (_roughly(engine, c) for c in _space(engine, cluster, request)) if cut_short else ()
    return ContextOutcome(
        outcome=found, num_searched=num_searched, cut_short=cut_short, rough_s=min(rough, default=math.inf)
    )


def _space(engine: Engine, cluster: Cluster, request: PlanRequest) -> list[Candidate]:
    return context_candidates(cluster, request, engine.chooser, len(engine.graph.blocks))


def _both(before: Outcome, after: Outcome) -> Outcome:
    """The outcome of a search and of one after it for what is better."""
    return replace(
        after, lower_bound_s=min(before.lower_bound_s, after.lower_bound_s),
        complete=before.complete and after.complete, timed_out=before.timed_out or after.timed_out,
        num_simulated=before.num_simulated + after.num_simulated,
    )


class _Promising:
    """The candidates of each pair of axes, those of the best estimate first.

    Estimates are made one after another, each taking longer and saying more, of what may be the best by the one before:
    roughly, by the work alone, as if the context axis split rows for free, with what it adds alone, and so for an even
    cut.
    """

    def __init__(self, engine: Engine, plain: Bounds, space: Sequence[Candidate]) -> None:
        self.engine, self.plain = engine, plain
        self.groups: dict[tuple[int, int, bool], list[Candidate]] = {}  # of those that were not given yet
        self.works: dict[Work, list[Candidate]] = {}
        for c in space:
            self.groups.setdefault((c.cp, c.tp, c.sequence_parallel), []).append(c)
            self.works.setdefault(c.work, []).append(c)
        self.added: dict[Work, float] = {}
        self.ordered: dict[tuple[int, int, bool], float] = {}  # by a group's axes
        self.estimate_s = 0.0  # of what was given last
        self.queue = [(_roughly(engine, alike[0]), alike[0], 0) for alike in self.works.values()]
        heapq.heapify(self.queue)

    def next_group(self, limit: float, deadline: float | None) -> list[Candidate] | None:
        """The next ones that are estimated below the limit; None where there are none, or no time is left."""
        engine, queue = self.engine, self.queue
        while queue and queue[0][0] < limit:
            if engine.out_of_time(deadline):
                return None
            least, c, level = heapq.heappop(queue)
            key = c.cp, c.tp, c.sequence_parallel
            if key not in self.groups:
                continue
            if level == 0:
                heapq.heappush(queue, (max(least, engine.bounds.work.of_work(_without_axis(c))), c, 1))
            elif level == 1:
                for own in self.works[c.work]:
                    heapq.heappush(queue, (max(least, estimated(engine, own, limit)), own, 2))
            elif level == 2:
                heapq.heappush(queue, (least + self._added_s(c), c, 3))
            elif level == 3:
                heapq.heappush(queue, (max(least, self._of_even_cut(c, limit)), c, 4))
            else:
                self.estimate_s = least
                return self.groups.pop(key)
        return None

    def in_other_orders_s(self, space: Sequence[Candidate]) -> float:
        """About the least that these take in orders that wait less than 1F1B; infinite where none can have one.

        As if the context axis split rows, with what it adds alone; of those that do least in all orders.
        """
        key = space[0].cp, space[0].tp, space[0].sequence_parallel
        if key not in self.ordered:
            orders, found = self.engine.bounds.orders, list[float]()
            likes = [(_without_axis(c), c) for c in space]
            able = [(like, c) for like, c in likes if orders.known(like) and orders.keeps_all(like)]
            for _, like, c in sorted((orders.with_ends(like), like, c) for like, c in able):
                if len(found) < MAX_ORDERED and (cut := orders.best_cut(like)) is not None:
                    found.append(cut[0] + self._added_s(c))
            self.ordered[key] = min(found, default=math.inf)
        return self.ordered[key]

    def _added_s(self, c: Candidate) -> float:
        """What the context axis adds alone; 0 where that is not known."""
        if c.work not in self.added:
            alone = self.engine.chooser.plain.choose(1, sequence_parallel=False, cp=c.cp)
            self.added[c.work] = 0.0 if alone is None else max(0.0, _added_alone(self.engine, self.plain, c))
        return self.added[c.work]

    def _of_even_cut(self, c: Candidate, limit: float) -> float:
        """The estimate for the even cut, or where that does not fit for one that promises much and does."""
        bounds, like = self.engine.bounds, _without_axis(c)
        cuts = self.engine.even_cuts(c.pp)
        found = float("inf") if cuts is None else bounds.closer_of_cut(like, cuts)
        if found == float("inf") and (best := bounds.best_cut(like, limit)) is not None:
            found = bounds.closer_of_cut(like, best[1])
        return found + self._added_s(c)


def _with_shardings(engine: Engine, plain: Bounds, space: Sequence[Candidate], limit: float) -> list[Candidate]:
    """Of candidates with the same inner axes those that promise to be below the limit, their shardings chosen."""
    cp, tp, sequence_parallel = space[0].cp, space[0].tp, space[0].sequence_parallel
    estimates = sorted((estimated(engine, c, limit), c) for c in space)
    alike = [c for estimate, c in estimates if estimate < limit]
    if not alike or engine.chooser.plain.choose(tp, sequence_parallel=sequence_parallel, cp=cp) is None:
        return []
    if not _promises(engine, plain, alike, limit):
        return []
    return alike if engine.chooser.choose(tp, sequence_parallel=sequence_parallel, cp=cp) is not None else []
