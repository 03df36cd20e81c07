"""Plans of one stage on unlike devices, whose data ranks get as many rows of a micro-batch as fits their speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster, DeviceType
from autopar.plan.plan import Plan
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, PlanRequest, axis_variants, data_settings, divisors, meshes
from autopar.search.simulated_plan import SimulatedPlan, simulated
from autopar.sharding.rewrites import rewritten
from autopar.simulate.stage_cost import stage_cost

MAX_SIMULATED = 12  # settings of least estimate
WORTH = 0.002  # what unequal shares must gain
FAR = 1.2  # times the best: where whole copies take so long, sharing out the states, which sends no less, is left out
NOT_SHARED = "unequal batch shares but in plans of one stage on all devices"

TimeOf = Callable[[int, int], float]  # seconds of a kind of data rank with so many rows


def has_unlike_devices(cluster: Cluster) -> bool:
    """Whether the cluster has several kinds of devices."""
    return len({node.device.name for node in cluster.nodes}) > 1


def search_shares(engine: Engine, request: PlanRequest, best_s: float, deadline: float | None) -> SimulatedPlan | None:
    """The best plan of one stage with unequal shares; None where none is better than `best_s`.

    The settings are estimated by their slowest data rank, and those of least estimate are simulated. An interrupt ends
    it with the best so far.
    """
    if not has_unlike_devices(engine.cluster) or request.micro_batch is not None or engine.chooser.needs_whole_batch:
        return None
    found: SimulatedPlan | None = None
    try:
        estimates: list[tuple[float, Candidate, tuple[int, ...]]] = []
        copies_s: dict[tuple[object, ...], float] = {}  # of whole copies of the states, which come first
        for candidate, total in _settings(engine, request):
            if engine.out_of_time(deadline):
                break
            key = (candidate.tp, candidate.sequence_parallel, candidate.split_weights, total)
            if copies_s.get(key, 0.0) >= best_s * FAR:
                continue
            estimate = _estimate(engine, candidate, total, best_s)
            if candidate.zero == 0 and estimate is not None:
                copies_s[key] = estimate[0]
            if estimate is not None and estimate[0] < best_s:
                estimates.append((estimate[0], candidate, estimate[1]))
        for _, candidate, rows in sorted(estimates)[:MAX_SIMULATED]:
            if engine.out_of_time(deadline):
                break
            limit_s = found.step_time_s if found is not None else best_s * (1 - WORTH)
            made = _simulated(engine, candidate, rows)
            if made is not None and made.step_time_s < limit_s:
                found = made
    except KeyboardInterrupt:
        engine.interrupted = True
    return found


def _settings(engine: Engine, request: PlanRequest) -> Iterator[tuple[Candidate, int]]:
    """Every setting of one stage, with the rows of a whole micro-batch; a candidate has those of an even share."""
    for pp, tp, dp in meshes(engine.cluster, 1):
        if pp > 1 or dp == 1:
            continue
        for sequence_parallel, split_weights in axis_variants(engine.chooser, tp):
            for zero, replicate, shard in data_settings(engine.cluster, tp, dp):
                for total in divisors(request.global_batch):
                    candidate = Candidate(
                        pp=1, tp=tp, dp_replicate=replicate, dp_shard=shard, zero=zero, offload_optimizer=False,
                        sequence_parallel=sequence_parallel, split_weights=split_weights,
                        micro_batch=max(1, total // dp), num_micro_batches=request.global_batch // total,
                    )
                    if total >= dp and request.allows(candidate):
                        yield candidate, total


def _estimate(
    engine: Engine, candidate: Candidate, total: int, limit_s: float
) -> tuple[float, tuple[int, ...]] | None:
    """Seconds of a step by the slowest data rank, and the rows of each; None where even shares are as good.

    Without the rows, and no more than the step takes, where a single row takes a data rank the limit or longer.
    """
    plan = engine.plan_of(candidate, (0, len(engine.graph.blocks)))
    graph, stage = rewritten(engine.graph, plan.rewrites), plan.stages[0]
    kinds: list[DeviceType] = []
    kind_of: list[int] = []
    for rank in range(candidate.dp):
        group = [engine.cluster.device(device) for device in stage.devices[rank * candidate.tp :][: candidate.tp]]
        slowest = min(group, key=lambda device: device.peak(plan.dtype))
        if slowest not in kinds:
            kinds.append(slowest)
        kind_of.append(kinds.index(slowest))
    known: dict[tuple[int, int], float] = {}

    def time_of(kind: int, rows: int) -> float:
        if (kind, rows) not in known:
            cost = stage_cost(graph, engine.cluster, plan, 0, device=kinds[kind], rows=float(rows))
            known[kind, rows] = plan.num_micro_batches * (cost.forward_s + cost.backward_s) + cost.step_once_s
        return known[kind, rows]

    for kind in range(len(kinds)):
        if (least_s := time_of(kind, 1)) >= limit_s:
            return least_s, ()
    rows = share_out(total, kind_of, time_of)
    if min(rows) == max(rows):
        return None
    return max(time_of(kind, own) for kind, own in set(zip(kind_of, rows, strict=True))), rows


def share_out(total: int, kinds: Sequence[int], time_of: TimeOf) -> tuple[int, ...]:
    """How many of `total` rows each data rank gets, at least one, so that the slowest of them is as fast as can be.

    Times are taken to be straight lines through two numbers of rows, which are drawn again near what they gave.
    """
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert total >= len(kinds), "a row for each data rank"
    even = max(1, total // len(kinds))
    near = dict.fromkeys(count, even)
    lines: dict[int, tuple[float, float]] = {}
    for _ in range(2):
        for kind, at in near.items():
            low, high = max(1, at - max(1, at // 4)), at + max(1, at // 4)
            slope = max((time_of(kind, high) - time_of(kind, low)) / (high - low), 1e-12)
            lines[kind] = time_of(kind, low) - slope * low, slope
        level = _level(total, count, lines)
        near = {kind: max(1, int((level - start) / slope + 1e-9)) for kind, (start, slope) in lines.items()}
    rows = [near[kind] for kind in kinds]
    for _ in range(sum(rows) - total):  # ranks that would have none have one: others give up what is too much
        worst = max((i for i in range(len(rows)) if rows[i] > 1), key=lambda i: _after(lines, kinds[i], rows[i]))
        rows[worst] -= 1
    for _ in range(total - sum(rows)):
        best = min(range(len(rows)), key=lambda i: _after(lines, kinds[i], rows[i] + 1))
        rows[best] += 1
    return tuple(rows)


def _after(lines: dict[int, tuple[float, float]], kind: int, rows: int) -> float:
    start, slope = lines[kind]
    return start + slope * rows


def _level(total: int, count: dict[int, int], lines: dict[int, tuple[float, float]]) -> float:
    """When all ranks end, if rows could be parted: the number of rows that end by then is `total`."""
    pace = sum(count[kind] / slope for kind, (_, slope) in lines.items())
    return (total + sum(count[kind] * start / slope for kind, (start, slope) in lines.items())) / pace


def _simulated(engine: Engine, candidate: Candidate, rows: tuple[int, ...]) -> SimulatedPlan | None:
    own = replace(candidate, micro_batch=max(rows))
    plan: Plan = engine.plan(own, (0, len(engine.graph.blocks)))
    plan = replace(plan, stages=(replace(plan.stages[0], rows=rows),))
    return simulated(engine, plan)
