"""find_plan: the fastest plan that fits, with what was proved about it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.errors import AutoparError, InfeasibleError, InputError
from autopar.graph.expert_params import unsplit_experts
from autopar.graph.loss_terms import loss_terms
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Baseline, Certificate, Plan
from autopar.plan.verify import verify_plan
from autopar.search.baselines import run_baselines
from autopar.search.best_first import Engine, Found, Outcome, Progress
from autopar.search.borders import BorderSearch
from autopar.search.candidates import PlanRequest, candidates, no_mesh
from autopar.search.context import MAX_SHARDINGS, PROMISE, ContextOutcome, search_context
from autopar.search.coverage import plan_coverage
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.experts import NOT_TRIED, fixed_size, search_experts, why_none
from autopar.search.mixed import MixedOutcome, has_unlike_stages, search_mixed
from autopar.search.need import smallest_need
from autopar.search.node_order import as_given, in_order
from autopar.search.plan_schedules import (
    DEEPENED_FROM,
    MAX_TRIED,
    ORDERED,
    least_in_any_order_s,
    search_deeper,
    search_estimated,
    search_orders,
)
from autopar.search.shares import NOT_SHARED, has_unlike_devices, search_shares
from autopar.search.simulated_plan import SimulatedPlan
from autopar.simulate.simulator import simulate

__all__ = ["Degrees", "PlanRequest", "find_plan", "plan_from_degrees"]

log = logging.getLogger(__name__)
OFFLOAD_NOTE = (
    "copies to host memory are counted at 0.8 of the host link's rate and were not measured: plan without offload "
    "(--no-offload) to do without them"
)
ALIKE = "stages with different meshes or ZeRO levels"
IN_RUNS = (
    "stages across unlike nodes or apart from others on nodes alike, more than 8, with a context axis across nodes, of "
    f"more ranks than rows leave over or where an estimate promised less than {PROMISE:.0%}, without sequence "
    "parallelism where it can be, with the optimizer offloaded, or of other sizes than parts of a node and whole nodes"
)
ONE_MESH = "plans of one mesh on unlike devices, beyond the {tried} that were simulated of {total}"
BEHIND = 1.1  # times the best: what a pipeline may take in the usual order to be tried in deeper warm-ups
MAX_TO_ORDER = 12  # simulations of pipelines that are looked for only to be tried in other orders
MAX_REFINED_TO_ORDER = 30  # and of which the best cut is looked for
MAX_BESIDE = 40  # simulations of such plans beside those of stages of their own mesh
MAX_REFINED = 150  # of them, those of least quick bound, of which the best cut is looked for
OTHER_ORDERS = (
    f"other schedules than 1F1B, but for interleaved, zero-bubble, deeper warm-ups and list schedules of the {ORDERED} "
    f"best pipelines, and interleaved or zero-bubble of {MAX_TRIED} each that an estimate promises most for"
)
OTHER_CHOICES = (
    "op strategies other than each block's own fastest at the smallest micro-batch",
    "rewrites of layers that keep more for the backward",
)
UNUSED = "leaving devices unused"
IN_ORDER = "devices in another order than the cluster's"
BY_MEMORY = "nodes in another order than by memory and speed"  # where they are unlike
NOT_SEARCHED = (
    OTHER_ORDERS,
    f"a context axis where an estimate promised less than {PROMISE:.0%}, or beyond the {MAX_SHARDINGS} best estimates",
    IN_ORDER,
    UNUSED,
    "a tensor axis that repeats all work, or across nodes where a plan without one fits",
    "rewrites of layers beside a context axis that do not pay without it",
    "a context axis beside a tensor axis without sequence parallelism, where that can be",
    "a longer context axis where fewer rows leave as many tokens on each rank of a shorter one",
    *OTHER_CHOICES,
)
UNLIKE_NOT_SEARCHED = (
    "interleaved schedules of such stages, and zero-bubble but for the best plans", UNUSED, *OTHER_CHOICES,
)


def find_plan(
    graph: ModelGraph, cluster: Cluster, request: PlanRequest, progress: Progress | None = None,
    engine: Engine | None = None, need: bool = True,
) -> Plan:
    """The fastest plan of the searched space in the cost model, with its certificate and baselines.

    `engine`: what `new_engine` made for these, by a caller that goes on with it. `need`: where nothing fits, look for
    what would.

    The same input gives the same plan, unless `request.max_search_seconds` or an interrupt
    cuts the search short: then it is the best so far. InfeasibleError where nothing fits, with a change that would make
    something fit, or where the time limit came before any plan was found.
    """
    began = time.monotonic()
    deadline = began + request.max_search_seconds if request.max_search_seconds is not None else None
    engine = engine or new_engine(graph, cluster, request)
    searches = _Searches(engine, deadline, progress)
    searches.run()
    found = searches.best
    if found is None and engine.interrupted:
        raise KeyboardInterrupt
    if found is None:
        raise searches.why_nothing(need=need)
    searched_s = time.monotonic() - began
    log.info("searched %d candidates, simulated %d, in %.2f s", len(searches.space), searches.num_simulated, searched_s)
    ranks = in_order(cluster, request.dtype)[1]
    plan = replace(
        found.plan, cluster_fingerprint=cluster_fingerprint(cluster), baselines=searches.baselines,
        coverage=plan_coverage(graph, engine.cluster, found.plan), notes=(*found.plan.notes, *searches.notes()),
        stages=tuple(
            replace(as_given(stage, ranks), peak_memory_bytes=peak, memory_limit_bytes=limit)
            for stage, peak, limit in zip(found.plan.stages, found.peak_bytes, found.limit_bytes, strict=True)
        ),
    )
    step_s = found.step_time_s if cluster.is_uniform else simulate(graph, cluster, plan, detail=False).step_time_s
    least_s = least_in_any_order_s(graph, cluster, plan)
    certificate = replace(
        searches.certificate(step_s, searched_s), order_bound_s=None if least_s is None else min(step_s, least_s)
    )
    plan = replace(plan, certificate=certificate)
    verify_plan(plan, graph, cluster)
    return plan


def new_engine(graph: ModelGraph, cluster: Cluster, request: PlanRequest) -> Engine:
    """What bounds and simulates plans for `find_plan`: on the cluster's nodes in the order that is searched."""
    return Engine(graph, in_order(cluster, request.dtype)[0], request)


class _Searches:
    """The searches of one request, one after another, each for what beats `best`; and what they proved together.

    What is interrupted or out of time ends at once, and so do all after it.
    """

    def __init__(self, engine: Engine, deadline: float | None, progress: Progress | None) -> None:
        self.engine, self.deadline, self.progress = engine, deadline, progress
        self.graph, self.cluster, self.request = engine.graph, engine.cluster, engine.request
        self.no_mesh: InfeasibleError | None = None  # why no one mesh for all stages is there
        try:
            self.space = candidates(
                self.cluster, self.request, engine.chooser, len(self.graph.blocks),
                tp_across_nodes="tp" in dict(self.request.mesh),
            )
        except InfeasibleError as error:
            if not has_unlike_stages(engine, self.cluster):
                raise
            self.space, self.no_mesh = [], error
        self.ep = fixed_size(self.request) or 1  # of the expert axis, where the user fixed it
        self.best: SimulatedPlan | None = None
        self.lower_bound_s = math.inf
        self.num_simulated = 0
        self.complete, self.timed_out = True, False
        self.baselines: tuple[Baseline, ...] = ()
        self.mixed = MixedOutcome()
        self.context = ContextOutcome()
        self._one_mesh: Found | None = None  # the best of one mesh for all stages
        self._num_one_mesh = 0  # simulated
        self._borders = BorderSearch(engine)

    @property
    def best_s(self) -> float:
        return math.inf if self.best is None else self.best.step_time_s

    def run(self) -> None:
        """Runs all searches; `best` is None where nothing was found that fits."""
        engine, deadline = self.engine, self.deadline
        if deadline is not None:
            engine.probe(self.space, deadline)
        if self.ep == 1:
            self.mixed = search_mixed(
                engine, self.cluster, engine.best.step_time_s if engine.best else math.inf, deadline, self.progress
            )
        self.baselines = run_baselines(engine, self.space, deadline)
        if self.ep == 1:
            self._search_one_mesh()
            before = engine.quickest_pipelines(ORDERED, but=self._borders.moved)
            self._move_borders()
            if self.best is not None:
                self._order_pipelines(before)
                self._take(search_shares(engine, self.request, self.best_s, deadline))
        self._search_experts()
        self.lower_bound_s = min(self.best_s, self.lower_bound_s)
        self.complete = self.complete and not engine.interrupted

    def _take(self, found: SimulatedPlan | None) -> None:
        """What was found is the best if it is there: it was looked for as what beats the best so far."""
        if found is not None:
            self.best = found

    def _search_one_mesh(self) -> None:
        """Plans of one mesh for all stages; a few of them where stages of unlike nodes have meshes of their own."""
        engine, mixed = self.engine, self.mixed.best
        # Where a context axis pays, most others are passed over at once. Under a time limit those without go first.
        context_first = mixed is None and engine.best is not None and self.deadline is None
        if context_first:
            self._search_context(engine.best)
        if mixed is None:
            outcome = engine.search(
                self.space, incumbent=self._first_incumbent(), deadline=self.deadline, progress=self.progress
            )
        else:
            outcome = engine.search(
                self.space, incumbent=engine.best, deadline=self.deadline, progress=self.progress,
                below_s=mixed.step_time_s, max_simulations=MAX_BESIDE, max_refined=MAX_REFINED, proves=False,
            )
        unsettled = outcome.best is None and not outcome.timed_out and self.no_mesh is None
        if unsettled and not self.request.mesh and mixed is None:
            wider = candidates(
                self.cluster, self.request, engine.chooser, len(self.graph.blocks), tp_across_nodes=True
            )
            if len(wider) > len(self.space):
                self.space = wider
                outcome = engine.search(wider, deadline=self.deadline, progress=self.progress)
        if mixed is None:
            if not context_first:
                self._search_context(outcome.best)
            outcome = self._with_context(outcome)
        self._one_mesh, self._num_one_mesh = outcome.best, outcome.num_simulated
        self.num_simulated = outcome.num_simulated + self.mixed.num_simulated
        if mixed is None:
            self.lower_bound_s, self.complete = outcome.lower_bound_s, outcome.complete
            self.timed_out = outcome.timed_out
        else:  # what was proved is of stages of their own mesh
            self.lower_bound_s, self.complete = self.mixed.lower_bound_s, self.mixed.complete
            self.timed_out = not self.mixed.complete
        if outcome.best is not None and (mixed is None or outcome.best.step_time_s < mixed.step_time_s):
            self.best = SimulatedPlan.of(engine, outcome.best)
        else:
            self.best = mixed

    def _first_incumbent(self) -> Found | None:
        """The best of the experts' plans, with its borders moved: the closer to the best, the less is looked at."""
        best, until = self.engine.best, self.deadline
        if until is not None:
            now = time.monotonic()
            until = now + (until - now) / 4
        return best if best is None or best.candidate.pp == 1 else self._borders.best(best, until, number=1)

    def _search_context(self, best: Found | None) -> None:
        self.context = search_context(
            self.engine, self.cluster, self.request, best, self.deadline, self.progress
        )

    def _with_context(self, outcome: Outcome) -> Outcome:
        """The outcome with that of plans with a context axis."""
        if (own := self.context.outcome) is not None:
            outcome = replace(
                outcome, best=min((each.best for each in (outcome, own) if each.best is not None), default=None),
                lower_bound_s=min(outcome.lower_bound_s, own.lower_bound_s),
                complete=outcome.complete and own.complete, timed_out=outcome.timed_out or own.timed_out,
                num_simulated=outcome.num_simulated + own.num_simulated,
            )
        if not self.context.cut_short:
            return outcome
        lower = min(outcome.lower_bound_s, self.context.rough_s)
        return replace(outcome, lower_bound_s=lower, complete=False, timed_out=True)

    def _move_borders(self) -> None:
        """Moves borders of the best pipeline of one mesh, where no other plan beats it."""
        found = self._one_mesh
        if found is None or found.step_time_s != self.best_s:
            return
        moved = self._borders.best(found, self.deadline)
        if moved is not found:
            self._one_mesh, self.best = moved, SimulatedPlan.of(self.engine, moved)

    def _order_pipelines(self, before: Sequence[Found]) -> None:
        """Other orders of micro-batches of the quickest pipelines, and of those `before` borders were moved."""
        engine = self.engine
        # What is slower in the usual order may be quicker in another.
        if self.mixed.best is None:
            self._take(search_estimated(engine, self.best_s, self.deadline))
        try:
            if self.mixed.best is None:
                engine.simulate_behind(ORDERED, self.best_s * BEHIND)
            elif len(engine.quickest_pipelines(ORDERED)) < ORDERED and not engine.interrupted:
                pipelines = [own for own in self.space if own.pp > 1]
                engine.search(
                    pipelines, deadline=self.deadline, max_simulations=MAX_TO_ORDER, max_refined=MAX_REFINED_TO_ORDER,
                    proves=False,
                )
        except KeyboardInterrupt:
            engine.interrupted = True
        self._take(search_orders(engine, self.best_s, self.deadline, before))
        if self.mixed.best is None and self.best_s > self.lower_bound_s * (1 + DEEPENED_FROM):
            self._take(search_deeper(engine, self.best_s, self.deadline))

    def _search_experts(self) -> None:
        found = search_experts(self.engine, self.space, self._one_mesh, self.best_s, self.deadline)
        self._take(found.best)
        if found.best is not None:
            self.lower_bound_s = min(self.lower_bound_s, found.lower_bound_s)
        if found.timed_out:
            self.complete, self.timed_out = False, True

    def why_nothing(self, *, need: bool) -> AutoparError:
        """What to tell where no plan was found."""
        if self.timed_out:
            return InfeasibleError(
                f"the time limit of {self.request.max_search_seconds:g} s came before any plan was found; give "
                f"--max-search-seconds more time"
            )
        if self.no_mesh is not None:
            return self.no_mesh
        if not self.space:
            return InputError(no_mesh(self.cluster, self.request, self.engine.chooser.needs_whole_batch))
        if self.ep > 1:
            return InputError(why_none(self.engine, self.ep))
        return InfeasibleError(
            smallest_need(self.engine, self.space, self.deadline) if need
            else f"{self.graph.name} does not fit into the memory of {self.cluster.name}"
        )

    def certificate(self, step_s: float, searched_s: float) -> Certificate:
        """What was proved of the best plan, which takes `step_s`, and of which plans."""
        offload, mixed = self._offloads, self.mixed
        num_context = self.context.num_searched if mixed.best is None else mixed.num_context
        context = f", {num_context} of them with a context axis" if num_context else ""
        if mixed.best is not None:
            what = (
                f"{mixed.num_searched} settings of tp, dp, ZeRO and micro-batch of groups of devices{context}, as "
                "stages of their own mesh in all orders of the kinds of nodes and with warm-ups as deep as memory lets"
            )
            tried = ONE_MESH.format(tried=self._num_one_mesh, total=len(self.space))
            lacking: tuple[str, ...] = (IN_RUNS, tried, *UNLIKE_NOT_SEARCHED)
        else:
            what = (
                f"{len(self.space) + num_context} settings of pp, tp, sequence parallelism, dp, ZeRO"
                f"{', optimizer offload' * offload} and micro-batch{context}{f' with ep {self.ep}' * (self.ep > 1)}"
            )
            order = IN_ORDER if self.cluster.is_uniform else BY_MEMORY
            lacking = (ALIKE, *(order if item == IN_ORDER else item for item in NOT_SEARCHED))
        if has_unlike_devices(self.cluster):
            lacking = (*lacking, NOT_SHARED)
        if not unsplit_experts(self.graph, 1):
            lacking = (*lacking, NOT_TRIED)
        return Certificate(
            upper_bound_s=step_s, lower_bound_s=min(step_s, self.lower_bound_s),
            searched=f"{what}, each over all cuts of {len(self.graph.blocks)} blocks and all counts of layers that "
                     f"recompute{' or offload' * offload}{self._early()}",
            not_searched=(*lacking, *(() if offload else ("offload to host memory",))),
            search_seconds=searched_s, stopped_early=not self.complete,
        )

    @property
    def _offloads(self) -> bool:
        return self.request.offload and all(node.device.host_bandwidth_bytes_per_s for node in self.cluster.nodes)

    def _early(self) -> str:
        """Why the searches ended before all was settled."""
        if self.complete:
            return ""
        if self.engine.interrupted:
            return "; an interrupt came first"
        if self.timed_out:
            return f"; the time limit of {self.request.max_search_seconds:g} s came first"
        return f"; the limit of work, here {self.num_simulated} simulations, came first"

    def notes(self) -> tuple[str, ...]:
        """What to tell beside the plan's own notes."""
        assert self.best is not None, "there is a plan"
        notes, plan = self.mixed.idle_notes(self.best_s), self.best.plan
        if one_part := self.engine.chooser.needs_whole_batch:
            notes = (*notes, f"searched without data axes and micro-batches: {one_part}")
        elif (num_parts := plan.num_micro_batches * plan.stages[-1].mesh.dp) > 1:
            notes = (*notes, *loss_terms(self.engine.graph, num_parts=num_parts).notes)
        if any(stage.num_offloaded or stage.offload_optimizer for stage in plan.stages):
            notes = (*notes, OFFLOAD_NOTE)
        return notes
