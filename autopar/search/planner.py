"""find_plan: the fastest plan that fits, with what was proved about it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.graph.expert_params import unsplit_experts
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Certificate, Plan
from autopar.plan.verify import verify_plan
from autopar.search.baselines import run_baselines
from autopar.search.best_first import Engine, Outcome, Progress
from autopar.search.borders import search_borders
from autopar.search.candidates import PlanRequest, candidates, no_mesh
from autopar.search.context import MAX_SHARDINGS, PROMISE, ContextOutcome, search_context
from autopar.search.coverage import plan_coverage
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.experts import NOT_TRIED, ExpertsOutcome, fixed_size, search_experts, why_none
from autopar.search.mixed import MixedOutcome, search_mixed
from autopar.search.need import smallest_need
from autopar.search.plan_schedules import ORDERED, search_orders
from autopar.search.shares import NOT_SHARED, has_unlike_devices, search_shares

__all__ = ["Degrees", "PlanRequest", "find_plan", "plan_from_degrees"]

log = logging.getLogger(__name__)
OFFLOAD_NOTE = (
    "copies to host memory are counted at 0.8 of the host link's rate and were not measured: plan without offload "
    "(--no-offload) to do without them"
)
ALIKE = "stages with different meshes or ZeRO levels"
IN_RUNS = (
    "stages across unlike nodes or apart from others on nodes alike, more than 8, with a context axis, without "
    "sequence parallelism where it can be, with the optimizer offloaded, or of other sizes than parts of a node and "
    "whole nodes"
)
ONE_MESH = "plans of one mesh on unlike devices, beyond the {tried} that were simulated of {total}"
MAX_TO_ORDER = 12  # simulations of pipelines that are looked for only to be tried in other orders
MAX_BESIDE = 40  # simulations of such plans beside those of stages of their own mesh
OTHER_ORDERS = (
    f"other schedules than 1F1B, but for interleaved, zero-bubble, deeper warm-ups and list schedules of the {ORDERED} "
    "best pipelines"
)
OTHER_CHOICES = (
    "op strategies other than each block's own fastest at the smallest micro-batch",
    "rewrites of layers that keep more for the backward",
)
UNUSED = "leaving devices unused"
NOT_SEARCHED = (
    OTHER_ORDERS,
    f"a context axis where an estimate promised less than {PROMISE:.0%}, or beyond the {MAX_SHARDINGS} best estimates",
    "devices in another order than the cluster's",
    UNUSED,
    "a tensor axis that repeats all work, or across nodes where a plan without one fits",
    *OTHER_CHOICES,
)
UNLIKE_NOT_SEARCHED = (
    "interleaved schedules of such stages, and zero-bubble but for the best plan", UNUSED, *OTHER_CHOICES,
)


def find_plan(
    graph: ModelGraph, cluster: Cluster, request: PlanRequest, progress: Progress | None = None,
    engine: Engine | None = None, need: bool = True,
) -> Plan:
    """The fastest plan of the searched space in the cost model, with its certificate and baselines.

    `engine`: made for these, by a caller that goes on with it. `need`: where nothing fits, look for what would.

    The same input gives the same plan, unless `request.max_search_seconds` or an interrupt
    cuts the search short: then it is the best so far. InfeasibleError where nothing fits, with a change that would make
    something fit, or where the time limit came before any plan was found.
    """
    began = time.monotonic()
    deadline = began + request.max_search_seconds if request.max_search_seconds is not None else None
    engine = engine or Engine(graph, cluster, request)
    space = candidates(
        cluster, request, engine.chooser, len(graph.blocks), tp_across_nodes="tp" in dict(request.mesh)
    )
    if deadline is not None:
        engine.probe(space, deadline)
    ep = fixed_size(request) or 1
    mixed = MixedOutcome()
    if ep == 1:
        mixed = search_mixed(engine, cluster, engine.best.step_time_s if engine.best else math.inf, deadline, progress)
    baselines = run_baselines(engine, space, deadline)
    if ep > 1:
        outcome = Outcome(best=None, lower_bound_s=math.inf, num_simulated=0, complete=True)  # all is without the axis
    elif mixed.best is not None:
        outcome = engine.search(
            space, incumbent=engine.best, deadline=deadline, progress=progress, below_s=mixed.best.step_time_s,
            max_simulations=MAX_BESIDE,
        )
    else:
        outcome = engine.search(space, incumbent=engine.best, deadline=deadline, progress=progress)
    if outcome.best is None and not outcome.timed_out and not request.mesh and mixed.best is None:
        wider = candidates(cluster, request, engine.chooser, len(graph.blocks), tp_across_nodes=True)
        if len(wider) > len(space):
            space = wider
            outcome = engine.search(space, deadline=deadline, progress=progress)
    context = (
        search_context(engine, cluster, request, outcome.best, deadline, progress) if mixed.best is None and ep == 1
        else ContextOutcome()
    )
    if context.outcome is not None:
        outcome = replace(
            context.outcome, lower_bound_s=min(outcome.lower_bound_s, context.outcome.lower_bound_s),
            complete=outcome.complete and context.outcome.complete,
            timed_out=outcome.timed_out or context.outcome.timed_out,
            num_simulated=outcome.num_simulated + context.outcome.num_simulated,
        )
    if context.cut_short:
        outcome = replace(outcome, complete=False, timed_out=True)
    best = outcome.best
    step_s = min(own.step_time_s for own in (best, mixed.best) if own is not None) if best or mixed.best else math.inf
    before = engine.quickest_pipelines(ORDERED)
    if best is not None and best.step_time_s == step_s:
        best = search_borders(engine, best, deadline)
        step_s = best.step_time_s
    if mixed.best is not None:
        # What was proved is of stages of their own mesh; plans of one mesh for all were tried beside them.
        tried = ONE_MESH.format(tried=outcome.num_simulated, total=len(space))
        outcome = replace(
            outcome, lower_bound_s=min(step_s, mixed.lower_bound_s), complete=mixed.complete,
            timed_out=not mixed.complete, num_simulated=outcome.num_simulated + mixed.num_simulated,
        )
    experts = ExpertsOutcome()
    if best is None and mixed.best is None:
        experts = search_experts(engine, space, None, math.inf, deadline)
    if best is None and mixed.best is None and experts.best is None:
        if outcome.timed_out:
            raise InfeasibleError(
                f"the time limit of {request.max_search_seconds:g} s came before any plan was found; give "
                f"--max-search-seconds more time"
            )
        if not space:
            raise InputError(no_mesh(cluster, request))
        if ep > 1:
            raise InputError(why_none(engine, ep))
        raise InfeasibleError(
            smallest_need(engine, space, deadline) if need
            else f"{graph.name} does not fit into the memory of {cluster.name}"
        )
    if mixed.best is not None and not engine.interrupted and len(engine.quickest_pipelines(ORDERED)) < ORDERED:
        # What is slower in the usual order may be quicker than stages of unlike meshes in another.
        try:
            engine.search([own for own in space if own.pp > 1], deadline=deadline, max_simulations=MAX_TO_ORDER)
        except KeyboardInterrupt:
            engine.interrupted = True
    ordered = search_orders(engine, step_s, deadline, before) if ep == 1 else None
    if ordered is not None:
        step_s = ordered.step_time_s
    shared = search_shares(engine, request, step_s, deadline) if ep == 1 else None
    if shared is not None:
        step_s = shared.step_time_s
    if experts.best is None:
        experts = search_experts(engine, space, best, step_s, deadline)
    if experts.best is not None:
        step_s = experts.best.step_time_s
        outcome = replace(outcome, lower_bound_s=min(outcome.lower_bound_s, experts.lower_bound_s))
    if experts.timed_out:
        outcome = replace(outcome, complete=False, timed_out=True)
    if engine.interrupted:
        outcome = replace(outcome, complete=False)
    outcome = replace(outcome, lower_bound_s=min(step_s, outcome.lower_bound_s))
    searched_s = time.monotonic() - began
    offload = request.offload and all(node.device.host_bandwidth_bytes_per_s for node in cluster.nodes)
    log.info("searched %d candidates, simulated %d, in %.2f s", len(space), outcome.num_simulated, searched_s)
    if experts.best is not None:
        plan = experts.best.plan
        memory = tuple(zip(experts.best.peak_bytes, experts.best.limit_bytes, strict=True))
    elif shared is not None:
        plan = shared.plan
        memory = tuple(zip(shared.peak_bytes, shared.limit_bytes, strict=True))
    elif ordered is not None:
        plan = ordered.plan
        memory = tuple(zip(ordered.peak_bytes, ordered.limit_bytes, strict=True))
    elif mixed.best is not None and mixed.best.step_time_s == step_s:
        plan = mixed.best.plan
        memory = tuple(zip(mixed.best.peak_bytes, mixed.best.limit_bytes, strict=True))
    else:
        assert best is not None, "one of them was found"
        plan = engine.plan(best.candidate, best.cuts)
        memory = tuple(zip(best.peak_bytes, best.limit_bytes, strict=True))
    if mixed.best is not None:
        what = (
            f"{mixed.num_searched} settings of tp, dp, ZeRO and micro-batch of groups of devices, as stages of their "
            "own mesh in all orders of the kinds of nodes and with warm-ups as deep as memory lets"
        )
        lacking: tuple[str, ...] = (IN_RUNS, tried, *UNLIKE_NOT_SEARCHED)
    else:
        what = (
            f"{len(space) + context.num_searched} settings of pp, tp, sequence parallelism, dp, ZeRO"
            f"{', optimizer offload' * offload} and micro-batch{_context_words(context)}{f' with ep {ep}' * (ep > 1)}"
        )
        lacking = (ALIKE, *NOT_SEARCHED)
    if has_unlike_devices(cluster):
        lacking = (*lacking, NOT_SHARED)
    if not unsplit_experts(graph, 1):
        lacking = (*lacking, NOT_TRIED)
    certificate = Certificate(
        upper_bound_s=step_s, lower_bound_s=outcome.lower_bound_s,
        searched=f"{what}, each over all cuts of {len(graph.blocks)} blocks and all counts of layers that recompute"
                 f"{' or offload' * offload}{_early(engine, outcome)}",
        not_searched=(*lacking, *(() if offload else ("offload to host memory",))),
        search_seconds=searched_s, stopped_early=not outcome.complete,
    )
    notes = (*plan.notes, *mixed.idle_notes(step_s))
    if one_part := engine.chooser.needs_whole_batch:
        notes = (*notes, f"searched without data axes and micro-batches: {one_part}")
    if any(stage.num_offloaded or stage.offload_optimizer for stage in plan.stages):
        notes = (*notes, OFFLOAD_NOTE)
    plan = replace(
        plan, certificate=certificate, baselines=baselines, coverage=plan_coverage(graph, cluster, plan),
        notes=notes,
        stages=tuple(
            replace(stage, peak_memory_bytes=peak, memory_limit_bytes=limit)
            for stage, (peak, limit) in zip(plan.stages, memory, strict=True)
        ),
    )
    verify_plan(plan, graph, cluster)
    return plan


def _context_words(context: ContextOutcome) -> str:
    return f", {context.num_searched} of them with a context axis" if context.num_searched else ""


def _early(engine: Engine, outcome: Outcome) -> str:
    """Why the search ended before all was settled."""
    if outcome.complete:
        return ""
    if engine.interrupted:
        return "; an interrupt came first"
    if outcome.timed_out:
        return f"; the time limit of {engine.request.max_search_seconds:g} s came first"
    return f"; the limit of work, here {outcome.num_simulated} simulations, came first"
