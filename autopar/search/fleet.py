"""choose_devices: which of a cluster's devices to train on, by the cost of a step, their number or its time.

Parts of the cluster are whole nodes of each kind, or some devices of one node. No part takes less than all rows would
if each device did nothing but compute, at the rate that it has with the best tensor axis and no end of rows; the part
with the least objective by that bound is planned first, until no other can be better.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from autopar.cluster.cluster import Cluster
from autopar.cluster.part import part_of
from autopar.errors import InfeasibleError, InputError
from autopar.graph.model_graph import ModelGraph
from autopar.plan.goal import Goal
from autopar.plan.plan import Plan
from autopar.search.best_first import Engine, Progress
from autopar.search.candidates import Candidate, PlanRequest, axis_variants, divisors
from autopar.search.mixed_costs import ClusterPools
from autopar.search.objective import Objective, cost_of_step
from autopar.search.planner import UNUSED, find_plan, new_engine

log = logging.getLogger(__name__)
EACH = 8  # up to so many nodes of a kind every number of them is a part; beyond, 1, 2, 3, 4, 6, 8, 12, 16 ... and all
MAX_PLANNED = 40  # parts; a limit in work, so that the same input gives the same answer on every machine
MAX_QUICKER = 4  # parts that are planned where the time counts: the whole cluster comes first
# Where all devices are to be used and a part is only told of: parts that are planned, and how much less than the step
# a part must take by its bound, as no plan comes near that bound.
MAX_TOLD, TOLD = 2, 0.3
MAX_UNLIKE_NODES = 16  # of a cluster of unlike nodes that parts are planned of for the time's sake, as they take longer
WORTH = 0.005  # devices are left idle for the time's sake where a step is shorter by so much

Counts = tuple[int, ...]  # devices of each pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A part that was planned. `plan` is None where nothing fits or nothing divides; then `why` says it."""

    cluster: Cluster
    counts: Counts
    value: float  # of the objective; infinite where there is no plan, or its step is too long
    lower_bound: float
    plan: Plan | None
    cost: float | None = None  # of a step, where all prices are known
    why: str = ""

    @property
    def step_time_s(self) -> float:
        return _step_s(self.plan) if self.plan is not None else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best part with its plan, and the others that were planned, in the order of their number of devices.

    `lower_bound`: no part of the `num_parts` has an objective under it, as far as bounds and certificates prove it.
    """

    objective: Objective
    best: Planned
    planned: tuple[Planned, ...]
    lower_bound: float
    num_parts: int
    stopped_early: bool

    @property
    def plan(self) -> Plan:
        assert self.best.plan is not None
        return self.best.plan

    @property
    def gap(self) -> float:
        """How far the objective may be above the least there is, as a share of that."""
        return self.best.value / self.lower_bound - 1 if self.lower_bound > 0 else math.inf

    def report(self) -> dict[str, Any]:
        """The choice as plain values: the objective, what was proved of it, and a row for each part."""
        return {
            "goal": str(self.objective.goal), "max_step_time_s": self.objective.max_step_time_s,
            "value": self.best.value, "lower_bound": self.lower_bound, "gap": self.gap, "num_parts": self.num_parts,
            "stopped_early": self.stopped_early,
            "parts": [
                {
                    "cluster": own.cluster.name, "num_devices": sum(own.counts),
                    "chosen": own.counts == self.best.counts,
                    "step_time_s": own.step_time_s if own.plan is not None else None,
                    "cost_per_step": own.cost, "why_not": own.why,
                }
                for own in self.planned
            ],
        }


def choose_devices(
    graph: ModelGraph, cluster: Cluster, request: PlanRequest, objective: Objective, *, idle: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """The part of the cluster that is best by the objective, with its plan.

    For the time's sake devices are left unused only if `idle`; else the plan for all of them says what is quicker.
    InfeasibleError where nothing fits on any part, or no step is short enough; InputError where the cost is asked for
    and a device has no price.
    """
    pools = ClusterPools(cluster)
    return _Fleet(graph, cluster, request, objective, pools, idle=idle).run(progress)


class _Fleet:
    """A search over parts under way."""

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, request: PlanRequest, objective: Objective, pools: ClusterPools,
        *, idle: bool,
    ) -> None:
        self.graph, self.cluster, self.request, self.objective, self.pools = graph, cluster, request, objective, pools
        self.prices = [cluster.nodes[own[0]].device.price_per_hour for own in pools.nodes]
        self.objective.score(1.0, [pool.num_devices for pool in pools.pools], self.prices)  # prices that lack are told
        self.only_whole = objective.goal is Goal.TIME and not idle  # other parts are only told of
        self.whole: Counts = tuple(pool.num_devices for pool in pools.pools)
        self.engine: Engine | None = None  # of the whole cluster, once it was planned
        self.planned: list[Planned] = []
        self.errors: dict[Counts, InfeasibleError | InputError] = {}
        self.best: Planned | None = None
        # What is quicker by less is no reason to leave devices idle.
        self.worth = WORTH if objective.goal is Goal.TIME else 0.0
        self.interrupted = False

    def run(self, progress: Progress | None) -> Choice:
        began = time.monotonic()
        limit = self.request.max_search_seconds
        deadline = began + limit if limit is not None else None
        quicker = self.objective.goal is Goal.TIME
        every = list(parts(self.pools, few=quicker))
        large = quicker and not self.cluster.is_uniform and len(self.cluster.nodes) > MAX_UNLIKE_NODES
        if self.request.mesh or large:
            every = [self.whole]  # a mesh is one of all devices
        if quicker:
            self._plan(self.whole, 0.0, deadline, progress)
            if self.only_whole and self.planned[0].plan is None:
                raise self.errors[self.whole]
        queue: list[tuple[float, float, Counts]] = []
        stopped = bool(self.planned) and self._is_over(deadline)
        try:
            if not stopped and len(every) > len(self.planned):
                queue = [(*self._bound(counts), counts) for counts in every if not (quicker and counts == self.whole)]
        except KeyboardInterrupt:
            if self.best is None or self.best.plan is None:
                raise
            stopped = self.interrupted = True
        queue = [entry for entry in queue if entry[0] < math.inf]
        heapq.heapify(queue)
        most = MAX_TOLD if self.only_whole else MAX_QUICKER if quicker else MAX_PLANNED
        worth = TOLD if self.only_whole else self.worth
        while queue and (self.best is None or queue[0][0] < self.best.value * (1 - worth)):
            if self.planned and (len(self.planned) >= most or self._is_over(deadline)):
                stopped = True
                break
            bound, _, counts = queue[0]
            self._plan(counts, bound, deadline, progress)
            if self.interrupted:  # nothing more is known of the part than its bound
                stopped = True
                break
            heapq.heappop(queue)
        best = self.planned[0] if self.only_whole else self.best
        if best is None or best.plan is None or math.isinf(best.value):
            raise self._nothing()
        lower = best.lower_bound
        if not self.only_whole:
            lower = min([lower, *(own.lower_bound for own in self.planned), *(entry[0] for entry in queue[:1])])
        return Choice(
            objective=self.objective, best=replace(best, plan=self._told(best, best.plan, len(every))),
            lower_bound=min(lower, best.value), num_parts=len(every), stopped_early=stopped,
            planned=tuple(sorted(self.planned, key=lambda own: (sum(own.counts), own.counts))),
        )

    def _is_over(self, deadline: float | None) -> bool:
        return self.interrupted or (deadline is not None and time.monotonic() >= deadline)

    def _plan(self, counts: Counts, bound: float, deadline: float | None, progress: Progress | None) -> None:
        """Plans a part; it is the best so far where it is better."""
        try:
            found = self._planned(counts, bound, deadline, progress)
        except KeyboardInterrupt:
            if self.best is None or self.best.plan is None:
                raise
            self.interrupted = True
            return
        self.planned.append(found)
        best = self.best
        if best is None or found.value < best.value * (1 - self.worth) or (
            not self.worth and (found.value, found.step_time_s) < (best.value, best.step_time_s)
        ):
            self.best = found
        log.info("%s: %s", found.cluster.name, found.why or f"{found.value:.6g}")

    def _told(self, best: Planned, plan: Plan, num_parts: int) -> Plan:
        """The plan, saying which devices it leaves idle and what was searched of that."""
        certificate = plan.certificate
        assert certificate is not None
        if num_parts > 1:
            words = f"leaving devices unused, but for the {num_parts} parts of the cluster that were planned or bounded"
            certificate = replace(certificate, not_searched=tuple(
                words if item == UNUSED else item for item in certificate.not_searched
            ))
        idle = self.cluster.num_devices - plan.num_devices
        notes = plan.notes
        if idle:
            all_s = next((own.step_time_s for own in self.planned if own.counts == self.whole), math.inf)
            than = f"; with all devices a step takes {all_s:.4g} s" if math.isfinite(all_s) else ""
            notes = (
                f"leaves {idle} of the {self.cluster.num_devices} devices of {self.cluster.name} idle{than}: start "
                f"{plan.num_devices} processes, on {best.cluster.name}", *notes,
            )
        elif self.best is not None and self.best.value < best.value:
            other = self.best
            notes = (
                f"{other.cluster.name} alone takes {other.step_time_s:.4g} s a step, "
                f"{best.step_time_s / other.step_time_s:.2f}x less: --idle-devices plans for it", *notes,
            )
        return replace(plan, certificate=certificate, notes=notes)

    @cached_property
    def _least_seconds(self) -> list[float]:
        """For each pool: device-seconds that a row takes at least through all blocks, there and back."""
        found = []
        for own in self.pools.nodes:
            node = self.cluster.nodes[own[0]]
            engine = self.engine if self.engine is not None and self.cluster.is_uniform else None
            if engine is None:
                engine = Engine(self.graph, Cluster(name=node.device.name, nodes=(node,)), self.request)
            least = math.inf
            for tp in divisors(node.num_devices):
                for sequence_parallel, split_weights in axis_variants(engine.chooser, tp):
                    least = min(least, tp * self._row_s(engine, Candidate(
                        pp=1, tp=tp, dp_replicate=1, dp_shard=1, zero=0, sequence_parallel=sequence_parallel,
                        split_weights=split_weights, offload_optimizer=False, micro_batch=1, num_micro_batches=1,
                    )))
            found.append(least)
        return found

    def _row_s(self, engine: Engine, candidate: Candidate) -> float:
        """Seconds of a row on one tensor group at least: of endless batches, or the least of those that divide it."""
        endless = engine.bounds.work.rough(candidate)
        if endless > 0:
            return endless
        kind = engine.layout.kind_of(candidate, tuple(range(candidate.tp)))
        least = math.inf
        for rows in divisors(self.request.global_batch):
            costs = engine.bounds.block_costs(replace(candidate, micro_batch=rows), kind)
            least = min(least, sum(
                cost.forward_compute_s + cost.backward_compute_s + cost.forward_tp_comm_s + cost.backward_tp_comm_s
                for block in self.graph.blocks for cost in [costs[block.cls]]
            ) / rows)
        return least

    def _bound(self, counts: Counts) -> tuple[float, float]:
        """What the objective and the step of a part are not under."""
        step_s = self.request.global_batch / sum(
            count / least if least > 0 else math.inf
            for count, least in zip(counts, self._least_seconds, strict=True) if count
        )
        return self.objective.score(step_s, counts, self.prices)[0], step_s

    def _planned(
        self, counts: Counts, bound: float, deadline: float | None, progress: Progress | None
    ) -> Planned:
        part = part_of(self.cluster, self._ranks(counts))
        request = self.request
        if deadline is not None and self.planned:  # the first has all the time
            request = replace(request, max_search_seconds=max(0.0, deadline - time.monotonic()))
        try:
            engine = new_engine(self.graph, part, request)
            if part is self.cluster:
                self.engine = engine
            plan = find_plan(self.graph, part, request, progress, engine=engine, need=part is self.cluster)
        except (InfeasibleError, InputError) as error:
            self.errors[counts] = error
            return Planned(cluster=part, counts=counts, value=math.inf, lower_bound=math.inf, plan=None, why=str(error))
        self.interrupted = engine.interrupted
        assert plan.certificate is not None
        lower_s = plan.certificate.lower_bound_s
        value, lower = (self.objective.score(own, counts, self.prices)[0] for own in (_step_s(plan), lower_s))
        why = f"a step of {_step_s(plan):.4g} s is too long" if math.isinf(value) else ""
        known = all(price is not None for count, price in zip(counts, self.prices, strict=True) if count)
        return Planned(
            cluster=part, counts=counts, value=value, lower_bound=max(bound, lower), plan=plan, why=why,
            cost=cost_of_step(_step_s(plan), counts, self.prices) if known else None,
        )

    def _ranks(self, counts: Counts) -> tuple[int, ...]:
        """So many devices of each pool, its first."""
        ranks = [rank for pool, count in enumerate(counts) for rank in self.pools.ranks(pool, 0, count)]
        return tuple(sorted(ranks))

    def _nothing(self) -> InfeasibleError | InputError:
        """Why there is no plan."""
        planned = self.planned
        quickest = min((own for own in planned if own.plan is not None), key=lambda own: own.step_time_s, default=None)
        most_s = self.objective.max_step_time_s
        if quickest is not None and most_s is not None:
            return InfeasibleError(
                f"no part of {self.cluster.name} that was planned takes a step in {most_s:.4g} s; the quickest, "
                f"{quickest.cluster.name}, takes {quickest.step_time_s:.4g} s: allow more time, or give more devices"
            )
        if planned:
            return self.errors[max(self.errors, key=sum)]
        return InfeasibleError(
            f"all {self.cluster.num_devices} devices of {self.cluster.name} would take more than {most_s:.4g} s a step "
            "if they did nothing but compute: allow more time, or give more devices"
        )


def parts(pools: ClusterPools, *, few: bool = False) -> Iterator[Counts]:
    """The parts of a cluster, as devices of each pool: numbers of whole nodes, and some devices of one node.

    `few`: of the numbers only one, all, and the largest power of two between.
    """
    def chosen(most: int) -> list[int]:
        found = numbers_to_try(most)
        return [n for n in found if n in (1, most) or n == 1 << (most - 1).bit_length() - 1] if few else found

    numbers = [[0, *chosen(pool.num_nodes)] for pool in pools.pools]
    for counts in itertools.product(*numbers):
        if any(counts):
            yield tuple(count * pool.node_size for count, pool in zip(counts, pools.pools, strict=True))
    for index, pool in enumerate(pools.pools):
        for count in chosen(pool.node_size)[:-1]:
            yield tuple(count if other == index else 0 for other in range(len(pools.pools)))


def numbers_to_try(most: int) -> list[int]:
    """Numbers from 1 on that are tried, the last of them `most`."""
    if most <= EACH:
        return list(range(1, most + 1))
    powers = [2**i for i in range(most.bit_length())]
    return sorted({n for power in powers for n in (power, power * 3) if n < most} | {most})


def _step_s(plan: Plan) -> float:
    assert plan.certificate is not None
    return plan.certificate.upper_bound_s
