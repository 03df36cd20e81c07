"""Other orders of a plan's micro-batches: deeper warm-ups, weights' gradients put off, several stages on a device.

What is in flight in deeper warm-ups must fit: where layers recompute or offload so that those of 1F1B just do, more of
them have to. That is tried apart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import pairwise

from autopar.cluster.cluster import Cluster
from autopar.graph.model_graph import ModelGraph
from autopar.plan.actions import actions_to_csv
from autopar.plan.plan import Plan, Recompute, Schedule
from autopar.search.best_first import Engine, Found
from autopar.search.bounds import Cuts
from autopar.search.candidates import Candidate
from autopar.search.order_estimates import CHUNKS
from autopar.search.schedule_search import lower_bound_s, search_schedule
from autopar.search.simulated_plan import SimulatedPlan, simulated
from autopar.sharding.rewrites import rewritten
from autopar.simulate.events import StageTimes
from autopar.simulate.members import Member
from autopar.simulate.simulator import pipeline_times
from autopar.simulate.splitting import unsplit_reason
from autopar.simulate.stage_cost import StageCost

log = logging.getLogger(__name__)
PipelineTimes = tuple[list[dict[Member, StageCost]], list[StageTimes]]
MAX_ACTIONS = 20_000  # of a plan with an order of its own, all ranks together
MAX_LISTED = 600  # actions up to which list schedules are tried
WORTH = 0.002  # what another order must gain
ORDERED = 3  # pipelines, those of least time under 1F1B, that are tried in other orders
DEEPENED_FROM = 0.02  # relative; the gap from which on layers recompute more so that more are in flight
MAX_ESTIMATED = 64  # pipelines of which the best cut for zero-bubble is looked for
MAX_TRIED = 6  # pipelines of best estimate in zero-bubble, and in interleaved orders
ROUNDING = 1e-9  # relative, of sums in another order


def search_orders(
    engine: Engine, best_s: float, deadline: float | None, others: Sequence[Found] = ()
) -> SimulatedPlan | None:
    """The best of the quickest pipelines, and of some others, in other orders; None where none beats `best_s`.

    An interrupt ends it with the best so far.
    """
    found: SimulatedPlan | None = None
    try:
        for base in dict.fromkeys((*engine.quickest_pipelines(ORDERED), *others)):
            for plan in _orders(engine, base.candidate, base.cuts, best_s):
                if engine.out_of_time(deadline):
                    return found
                limit_s = found.step_time_s if found is not None else best_s * (1 - WORTH)
                found = simulated(engine, plan, limit_s) or found
    except KeyboardInterrupt:
        engine.interrupted = True
    return found


def _has_few_actions(num_stages: int, num_micro_batches: int) -> bool:
    return 3 * num_stages * num_micro_batches <= MAX_ACTIONS


def search_estimated(engine: Engine, best_s: float, deadline: float | None) -> SimulatedPlan | None:
    """The best of the pipelines that promise most with zero bubble or interleaved; None where none beats `best_s`.

    Those whose layers keep everything, by `OrderEstimates`: each estimate takes longer and says more than the one
    before. An interrupt ends it with the best so far.
    """
    found: SimulatedPlan | None = None
    limit_s, estimated, tried = best_s * (1 - WORTH), 0, [0, 0]
    try:
        estimates = engine.bounds.orders
        # What is estimated, how closely, stages on a device (1 for zero-bubble), their cut.
        queue: list[tuple[float, int, Candidate, int, Cuts]] = [
            (rough_s, 0, c, 1, ()) for c in engine.searched_pipelines()
            if _has_few_actions(c.pp, c.num_micro_batches) and (rough_s := estimates.rough(c)) < limit_s
        ]
        heapify(queue)
        while queue and queue[0][0] < limit_s and min(tried) < MAX_TRIED and not engine.out_of_time(deadline):
            least_s, level, c, chunks, cuts = heappop(queue)
            if level == 0 and estimates.known(c):
                heappush(queue, (max(least_s, estimates.of_work(c)), 1, c, 1, ()))
            elif level == 1 and estimates.keeps_all(c):
                heappush(queue, (max(least_s, estimates.with_ends(c)), 2, c, 1, ()))
            elif level == 2 and estimated < MAX_ESTIMATED:
                own = estimates.best_cut(c)
                each = [(own[0], 1, own[1])] if own is not None else []
                each += [(estimates.interleaved(c, number, even), number, even) for number, even in _chunked(engine, c)]
                estimated += min((time_s for time_s, _, _ in each), default=math.inf) < math.inf
                for time_s, number, cut in each:
                    heappush(queue, (max(least_s, time_s), 3, c, number, cut))
            elif level == 3 and tried[chunks > 1] < MAX_TRIED:
                tried[chunks > 1] += 1
                plan = engine.plan_of(c, cuts[::chunks])
                if chunks > 1:
                    other = _interleaved(plan, cuts)
                elif 2 * plan.num_stages * plan.num_micro_batches <= MAX_LISTED:
                    other = other_schedule(engine.graph, engine.cluster, plan, limit_s=limit_s) or plan
                else:
                    other = replace(plan, schedule=Schedule.ZERO_BUBBLE)
                found = simulated(engine, other, limit_s) or found
                limit_s = limit_s if found is None else found.step_time_s
    except KeyboardInterrupt:
        engine.interrupted = True
    return found


def search_deeper(engine: Engine, best_s: float, deadline: float | None) -> SimulatedPlan | None:
    """The best of the quickest pipelines with more in flight than they have room for as they are; None as above.

    An interrupt ends it with the best so far.
    """
    found: SimulatedPlan | None = None
    try:
        for base in engine.quickest_pipelines(ORDERED):
            if engine.out_of_time(deadline):
                return found
            plan = engine.plan(base.candidate, base.cuts)
            if busiest_s(engine.graph, engine.cluster, plan) >= best_s * (1 - WORTH):
                continue
            make = partial(_deeper, engine, base)
            for other in deepened(
                engine, engine.cluster, plan, make, best_s * (1 - WORTH), lambda: engine.out_of_time(deadline)
            ):
                limit_s = found.step_time_s if found is not None else best_s * (1 - WORTH)
                found = simulated(engine, other, limit_s) or found
    except KeyboardInterrupt:
        engine.interrupted = True
    return found


def _deeper(engine: Engine, base: Found, deeper: int) -> Plan:
    return engine.plan(base.candidate, base.cuts, deeper=deeper)


def deepened(
    engine: Engine, cluster: Cluster, base: Plan, make: Callable[[int], Plan], limit_s: float,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Plan]:
    """The plan in orders of its own, where layers recompute or offload more so that more micro-batches are in flight.

    A slow link, or a stage that takes long after one that does, is waited for less when more is sent ahead. `make`
    gives the plan that has room for so many more.
    """
    seen = {base.stages}
    for deeper in (2**power for power in range(base.num_micro_batches.bit_length())):
        if out_of_time():
            return
        plan = make(deeper)
        if plan.stages not in seen:
            seen.add(plan.stages)
            other = other_schedule(engine.graph, cluster, plan, split_backward=False, limit_s=limit_s)
            if other is not None:
                yield other


def _orders(engine: Engine, c: Candidate, cuts: Cuts, best_s: float) -> Iterator[Plan]:
    """The pipeline in other orders, where its busiest stage leaves room for a gain."""
    plan = engine.plan(c, cuts)
    times = pipeline_times(rewritten(engine.graph, plan.rewrites), engine.cluster, plan)
    if _busiest_s(plan, times[0]) >= best_s * (1 - WORTH):
        return
    other = other_schedule(engine.graph, engine.cluster, plan, limit_s=best_s * (1 - WORTH), known=times)
    if other is not None:
        yield other
    if all(stage.recompute is Recompute.NONE and not stage.variants for stage in plan.stages):
        for _, even in _chunked(engine, c):
            yield _interleaved(plan, even)


def _chunked(engine: Engine, c: Candidate) -> Iterator[tuple[int, Cuts]]:
    """The numbers of stages on a device that a pipeline may have, and the even cut into all of them."""
    for chunks in CHUNKS if c.num_micro_batches % c.pp == 0 else ():
        even = engine.even_cuts(c.pp * chunks)
        if even is not None and c.pp * chunks * c.num_micro_batches * 2 <= MAX_ACTIONS:
            yield chunks, even


def _interleaved(plan: Plan, cuts: Cuts) -> Plan:
    """The pipeline with the stages of this cut, several on each of its devices."""
    p = plan.num_stages
    stages = tuple(
        replace(plan.stages[i % p], first=first, last=last, virtual=i // p)
        for i, (first, last) in enumerate(pairwise(cuts))
    )
    return replace(plan, stages=stages, schedule=Schedule.INTERLEAVED)


def busiest_s(graph: ModelGraph, cluster: Cluster, plan: Plan) -> float:
    """Seconds that the busiest stage works: the step has no less in any order, where a rank runs one stage."""
    return _busiest_s(plan, pipeline_times(rewritten(graph, plan.rewrites), cluster, plan)[0])


def _busiest_s(plan: Plan, costs: Sequence[Mapping[Member, StageCost]]) -> float:
    return max(
        plan.num_micro_batches * (cost.forward_s + cost.backward_s) + cost.step_once_s
        for own in costs for cost in own.values()
    )


def least_in_any_order_s(graph: ModelGraph, cluster: Cluster, plan: Plan) -> float | None:
    """Seconds that the plan's stages take at least, in whatever order they run their micro-batches.

    None for one stage, which waits for no other, and where a device has several stages.
    """
    if plan.num_stages == 1 or any(stage.virtual for stage in plan.stages):
        return None
    _, times, ends, _ = _of_stages(graph, cluster, plan)
    return lower_bound_s(times, plan.num_micro_batches, end_s=ends)


def _of_stages(
    graph: ModelGraph, cluster: Cluster, plan: Plan, known: PipelineTimes | None = None
) -> tuple[list[dict[Member, StageCost]], list[StageTimes], list[float], bool]:
    """Of each stage its costs, its times and what ends it; and whether all can put off gradients of weights.

    `known`: its `pipeline_times`.
    """
    graph = rewritten(graph, plan.rewrites)
    costs, times = known or pipeline_times(graph, cluster, plan)
    whole = [not index or unsplit_reason(graph, plan, stage) for index, stage in enumerate(plan.stages)]
    # Where a backward runs whole, it is an I: that of the first stage has no gradients of inputs.
    times = [
        replace(own, input_backward_s=own.backward_s, weight_backward_s=0.0) if is_whole else own
        for own, is_whole in zip(times, whole, strict=True)
    ]
    ends = [max(cost.step_tp_s + cost.optimizer_s for cost in own.values()) for own in costs]
    return costs, times, ends, not any(whole[1:])


def other_schedule(
    graph: ModelGraph, cluster: Cluster, plan: Plan, *, split_backward: bool = True, limit_s: float = math.inf,
    most_listed: int = MAX_LISTED, known: PipelineTimes | None = None,
) -> Plan | None:
    """The plan in the quickest order found for the times of its stages, None where 1F1B is that.

    Memory is held with what its layers keep; what the plan then takes, the simulator says. `split_backward` allows
    orders that put off gradients of weights, where every stage can. None, too, where no order is quicker than the
    limit. `most_listed`: actions up to which list schedules are tried. `known`: its `pipeline_times`.
    """
    count = plan.num_stages * plan.num_micro_batches
    has_few = _has_few_actions(plan.num_stages, plan.num_micro_batches)
    if plan.num_stages == 1 or any(stage.virtual for stage in plan.stages) or not has_few:
        return None
    costs, times, ends, split = _of_stages(graph, cluster, plan, known)
    split = split and split_backward
    caps = []
    for own in costs:
        rooms = [
            (member.device.usable_memory_bytes - cost.static.total - cost.extra_bytes, cost.held_bytes)
            for member, cost in own.items()
        ]
        most = min((room / held if held > 0 else math.inf) for room, held in rooms)
        caps.append(int(max(1, min(most, plan.num_micro_batches))))
    least_s = lower_bound_s(times, plan.num_micro_batches, end_s=ends, split_backward=split)
    if least_s * (1 - ROUNDING) >= limit_s:
        return None
    found = search_schedule(
        times, plan.num_micro_batches, caps, split_backward=split, end_s=ends, exact=False,
        listed=2 * count <= most_listed, limit_s=limit_s,
    )
    if found.name == "1f1b":
        return None
    if found.name == "zb":
        return replace(plan, schedule=Schedule.ZERO_BUBBLE)
    return replace(plan, actions=tuple(actions_to_csv(found.lists).splitlines()))
