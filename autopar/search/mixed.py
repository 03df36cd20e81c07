"""Plans whose stages have meshes of their own, for clusters of unlike nodes.

For each number of micro-batches `find_stages` gives the best stages by estimate and by bound; both are simulated, and
the best plan of all is improved step by step: another setting of one stage, or a border between two moved by a block.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.cluster.cluster import Cluster
from autopar.errors import AutoparError, InfeasibleError
from autopar.plan.plan import Plan, Recompute, Stage
from autopar.plan.verify import problems
from autopar.search.best_first import Engine, Progress
from autopar.search.candidates import Candidate, divisors
from autopar.search.mixed_costs import ClusterPools, MixedCosts, Setting
from autopar.search.stage_dp import FoundStages, find_stages
from autopar.sharding.rewrite import Rewrite
from autopar.simulate.simulator import simulate

log = logging.getLogger(__name__)
MAX_SOLVES = 60  # for one number of micro-batches
MAX_IMPROVED = 300  # simulations


@dataclass(frozen=True, slots=True)
class Part:
    """A stage: blocks[first:last] under a setting on these ranks."""

    first: int
    last: int
    setting: Setting
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedFound:
    """A plan that was simulated and fits."""

    step_time_s: float
    plan: Plan
    peak_bytes: tuple[float, ...]
    limit_bytes: tuple[float, ...]


@dataclass(slots=True, kw_only=True)
class MixedOutcome:
    """The best found (None: none fits or none is better), what no plan of this space can beat, and how much was done.
    """

    best: MixedFound | None = None
    lower_bound_s: float = math.inf
    num_searched: int = 0  # settings of groups, over all numbers of micro-batches
    num_simulated: int = 0
    complete: bool = True
    tried: dict[tuple[Part, ...], MixedFound | None] = field(default_factory=dict)


def search_mixed(
    engine: Engine, cluster: Cluster, best_s: float, deadline: float | None, progress: Progress | None = None
) -> MixedOutcome:
    """The best plan with stages of their own meshes where the cluster's nodes are not alike; nothing elsewhere.

    `best_s` is what it has to beat. An interrupt ends it as the deadline does where there is a plan.
    """
    outcome = MixedOutcome()
    request = engine.request
    if not request.unlike_stages or cluster.is_uniform or request.mesh or engine.chooser.needs_whole_batch:
        return outcome
    pools = ClusterPools(cluster)
    queue: list[tuple[float, int, MixedCosts]] = []
    found: list[tuple[float, int, tuple[Part, ...], MixedCosts]] = []
    done = 0
    try:
        for rewrites in _families(engine, pools):
            for count in divisors(request.global_batch):
                if _late(deadline):
                    raise _StoppedError
                costs = MixedCosts(engine, pools, count, rewrites)
                if costs.groups:
                    outcome.num_searched += sum(map(len, costs.settings))
                    queue.append((costs.fluid_bound(), len(queue), costs))
        queue.sort(key=lambda entry: entry[:2])
        while queue:
            fluid, index, costs = queue[0]
            limit = min(best_s, outcome.best.step_time_s if outcome.best else math.inf)
            if fluid >= limit:
                break
            if _late(deadline):
                raise _StoppedError
            lower = fluid
            for own in (costs, costs.estimate()):
                try:
                    stages = find_stages(own, deadline=deadline, max_solves=MAX_SOLVES)
                except InfeasibleError:
                    lower = math.inf
                    break
                if own is costs:
                    lower = max(fluid, stages.lower_bound)
                    if lower >= limit:
                        break
                parts = _parts(costs, stages)
                made = _simulated(engine, cluster, costs, parts, outcome)
                if made is not None:
                    found.append((made.step_time_s, index, parts, costs))
            queue.pop(0)
            outcome.lower_bound_s = min(outcome.lower_bound_s, lower)
            done += 1
            if progress is not None:
                progress(done, done + len(queue), min(best_s, outcome.best.step_time_s if outcome.best else math.inf))
        for _, _, parts, costs in sorted(found, key=lambda entry: entry[:2])[:2]:
            _improve(engine, cluster, costs, parts, outcome, deadline)
    except _StoppedError:
        outcome.complete = False
    except KeyboardInterrupt:
        if not math.isfinite(best_s) and outcome.best is None:
            raise
        outcome.complete, engine.interrupted = False, True
    left = [entry[0] for entry in queue] if outcome.complete or queue else []
    outcome.lower_bound_s = min([outcome.lower_bound_s, *left]) if outcome.complete else 0.0
    if outcome.best is not None:
        outcome.lower_bound_s = min(outcome.lower_bound_s, outcome.best.step_time_s)
        if outcome.best.step_time_s >= best_s:
            outcome.best = None
    return outcome


class _StoppedError(Exception):
    """The time limit came."""


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _families(engine: Engine, pools: ClusterPools) -> list[tuple[Rewrite, ...]]:
    """The sets of rewrites that any size of a tensor axis chooses: a plan has one of them for all its stages."""
    found: dict[tuple[Rewrite, ...], None] = {}
    largest = max(max(pool.nodes) for pool in pools.pools)
    for tp in sorted({tp for pool in pools.pools for size in pool.nodes for tp in divisors(size) if tp <= largest}):
        for sequence_parallel in (False, True) if tp > 1 and engine.chooser.has_hidden_states else (False,):
            for split in (True, False) if tp > 1 else (True,):
                choice = engine.chooser.choose(tp, sequence_parallel=sequence_parallel, split_weights=split)
                if choice is not None:
                    found[choice.rewrites] = None
    return list(found)


def _parts(costs: MixedCosts, stages: FoundStages) -> tuple[Part, ...]:
    """Found stages with their best settings and the ranks of their nodes."""
    pools, taken = costs.cluster_pools, dict[int, int]()
    parts = []
    for stage in stages.stages:
        ranks: list[int] = []
        for pool, index, count in stage.nodes:
            node = pools.nodes[pool][index]
            start = taken.get(node, 0)
            ranks += pools.node_ranks(node)[start : start + count]
            taken[node] = start + count
        settings = costs.best_settings(stage.strategy, stage.in_flight, stage.first, stage.last)
        parts.append(Part(stage.first, stage.last, settings[0], tuple(sorted(ranks))))
    return tuple(parts)


def _simulated(
    engine: Engine, cluster: Cluster, costs: MixedCosts, parts: tuple[Part, ...], outcome: MixedOutcome
) -> MixedFound | None:
    """The parts as a plan, simulated; None where it does not fit or is not legal."""
    if parts not in outcome.tried:
        outcome.num_simulated += 1
        outcome.tried[parts] = _make(engine, cluster, costs, parts)
    found = outcome.tried[parts]
    if found is not None and (outcome.best is None or found.step_time_s < outcome.best.step_time_s):
        outcome.best = found
    return found


def _make(engine: Engine, cluster: Cluster, costs: MixedCosts, parts: tuple[Part, ...]) -> MixedFound | None:
    plan = mixed_plan(engine, costs, parts)
    try:
        timeline = simulate(engine.graph, cluster, plan)
    except AutoparError as error:
        log.info("a plan of unlike stages cannot be simulated: %s", error)
        return None
    if not timeline.feasible:
        return None
    if problem := next(problems(plan, engine.graph), None):
        log.info("a plan of unlike stages is not legal: %s", problem)
        return None
    return MixedFound(
        step_time_s=timeline.step_time_s, plan=plan,
        peak_bytes=timeline.rank_peak_bytes,
        limit_bytes=tuple(part.setting.kind.memory_limit_bytes for part in parts),
    )


def mixed_plan(engine: Engine, costs: MixedCosts, parts: Sequence[Part]) -> Plan:
    """The parts as a plan whose layers recompute or offload so that they fit, where that is enough."""
    first = parts[0].setting.candidate
    # The plan's own shardings are those of the first stage that has a tensor axis; other stages hold theirs.
    lead = next((part.setting.candidate for part in parts if part.setting.candidate.tp > 1), first)
    base = engine.plan_of(replace(lead, micro_batch=first.micro_batch), (0, len(engine.graph.blocks)))
    stages = []
    for part in parts:
        c = part.setting.candidate
        alike = c.tp == 1 or _sharding_key(c) == _sharding_key(lead)
        stages.append(Stage(
            first=part.first, last=part.last, devices=part.ranks, mesh=c.mesh, zero=c.zero, recompute=Recompute.NONE,
            rows=() if c.micro_batch == first.micro_batch else (c.micro_batch,) * c.dp,
            shardings=() if alike else engine.chooser.shardings(
                c.tp, first.micro_batch, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights
            ),
        ))
    plan = replace(
        base, stages=tuple(stages), num_micro_batches=costs.num_micro_batches,
        sequence_parallel=any(part.setting.candidate.sequence_parallel for part in parts),
    )
    fitted = []
    for index, part in enumerate(parts):
        options = engine.options(part.setting.candidate, part.setting.kind, plan, index)
        stage = plan.stages[index]
        fitted.append(stage if options is None else stage.with_variants([option.variant for option in options]))
    return replace(plan, stages=tuple(fitted))


def _sharding_key(c: Candidate) -> tuple[int, bool, bool]:
    return c.tp, c.sequence_parallel, c.split_weights


def _improve(
    engine: Engine, cluster: Cluster, costs: MixedCosts, parts: tuple[Part, ...], outcome: MixedOutcome,
    deadline: float | None,
) -> None:
    """Goes from plan to better plan by one change at a time, until none helps."""
    best = outcome.tried[parts]
    assert best is not None, "only plans that fit are improved"
    improved, before = True, outcome.num_simulated
    while improved:
        improved = False
        for other in _neighbours(costs, parts):
            if _late(deadline) or outcome.num_simulated - before > MAX_IMPROVED:
                return
            found = _simulated(engine, cluster, costs, other, outcome)
            if found is not None and found.step_time_s < best.step_time_s * (1 - 1e-9):
                best, parts, improved = found, other, True
                break


def _neighbours(costs: MixedCosts, parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    """Every change of one stage's setting, and of one border by a block."""
    for index in range(len(parts) - 1):
        here, there = parts[index], parts[index + 1]
        for border in (here.last - 1, here.last + 1):
            if here.first < border < there.last:
                moved = (replace(here, last=border), replace(there, first=border))
                yield (*parts[:index], *moved, *parts[index + 2 :])
    for index, part in enumerate(parts):
        strategy = next(i for i, own in enumerate(costs.settings) if part.setting in own)
        in_flight = min(len(parts) - index, costs.num_micro_batches)
        for setting in costs.best_settings(strategy, in_flight, part.first, part.last)[:8]:
            if setting != part.setting:
                yield (*parts[:index], replace(part, setting=setting), *parts[index + 1 :])
