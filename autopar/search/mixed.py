"""Plans whose stages have meshes of their own, for clusters of unlike nodes.

For each number of micro-batches `runs` gives the stages of least bound that may still beat the best plan; they are
simulated, and the best plan of all is improved step by step: another setting of one stage, or a border between two
moved by a block. What bound is left where no better plan was found is then raised by halving.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from autopar.cluster.cluster import Cluster
from autopar.errors import AutoparError
from autopar.plan.verify import problems
from autopar.search.best_first import Engine, Progress
from autopar.search.candidates import divisors
from autopar.search.mixed_context import context_families, promising_counts
from autopar.search.mixed_costs import ClusterPools, MixedCosts
from autopar.search.mixed_orders import deeper_plans, moved_put_off, weights_put_off
from autopar.search.mixed_plans import Part, mixed_plan, neighbours
from autopar.search.plan_schedules import DEEPENED_FROM, WORTH, busiest_s, other_schedule
from autopar.search.runs import Passed, Runs, RunStage
from autopar.search.simulated_plan import SimulatedPlan
from autopar.sharding.rewrite import Rewrite
from autopar.simulate.simulator import simulate

log = logging.getLogger(__name__)
CLOSE = 0.005  # what is not better by so much is not looked for
MAX_IMPROVED = 150  # simulations
MAX_POOLS = 6
MAX_OTHERS = 60  # simulations of stages of other numbers and orders than those of least bound
STEP = 1.25  # by which limits of the step time rise while nothing is found below them
FAR = 8.0  # times what all devices would take if work could be shared out at will: then there is no limit
PUT_OFF = 6  # plans, the quickest of each number of micro-batches, that are tried with gradients of weights put off
MAX_COUNTS = 3  # numbers of micro-batches, those with the quickest plans, of which they are tried
MAX_DEEPENED = 8  # plans that are tried with more micro-batches in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleFound:
    """What leaves whole pools unused and is faster."""

    step_time_s: float
    unused: str
    used: str


@dataclass(slots=True, kw_only=True)
class MixedOutcome:
    """The best found (None: none fits or none is better), what no plan of this space can beat, and how much was done.
    """

    best: SimulatedPlan | None = None
    lower_bound_s: float = math.inf
    num_searched: int = 0  # settings of groups, over all numbers of micro-batches
    num_context: int = 0  # those of them with a context axis
    num_simulated: int = 0
    complete: bool = True
    idle: IdleFound | None = None
    tried: dict[tuple[Part, ...], SimulatedPlan | None] = field(default_factory=dict)

    def idle_notes(self, step_s: float) -> tuple[str, ...]:
        """What to tell of devices that had better be left unused, beside a plan with this step time."""
        if self.idle is None or self.idle.step_time_s >= step_s:
            return ()
        return (
            f"slowed down by {self.idle.unused}: a step on {self.idle.used} alone would take "
            f"{self.idle.step_time_s:.4g} s; plan for that one, or with --idle-devices",
        )


@dataclass(slots=True, kw_only=True)
class _Problem:
    """One number of micro-batches under one set of rewrites. `lower_s`: nothing of it is under this."""

    index: int
    costs: MixedCosts
    runs: Runs
    fluid_s: float  # what `lower_s` was at first
    lower_s: float
    parts: tuple[Part, ...] = ()  # of the best plan so far
    others: tuple[tuple[float, tuple[Part, ...]], ...] = ()  # of other numbers and orders of stages, with bounds
    partly: dict[int, tuple[Part, ...]] = field(default_factory=dict)  # on some of the pools
    partly_s: dict[int, float] = field(default_factory=dict)

    @property
    def fill(self) -> float:
        """About what the best plan takes of the work spread evenly: a stage of each pool is to be filled."""
        return 1 + (len(self.costs.run_pools) - 1) / self.costs.num_micro_batches


class _Search:
    """A search under way."""

    def __init__(
        self, engine: Engine, cluster: Cluster, best_s: float, deadline: float | None, progress: Progress | None
    ) -> None:
        self.engine, self.cluster, self.deadline, self.progress = engine, cluster, deadline, progress
        self.before_s = best_s
        self.pools = ClusterPools(cluster)
        self.outcome = MixedOutcome()
        self.problems: list[_Problem] = []
        self.settled = 0
        self._least: dict[tuple[Part, ...], tuple[float, MixedCosts]] = {}  # what the busiest device of parts works

    @property
    def best_s(self) -> float:
        found = self.outcome.best
        return min(self.before_s, found.step_time_s if found else math.inf)

    @property
    def goal_s(self) -> float:
        """What a plan must take less than, to be looked for."""
        return self.best_s * (1 - CLOSE)

    def run(self) -> None:
        self._make_problems()
        open_ = self._still_open(self.problems)
        open_ += self._still_open(self._make_context_problems())
        self._try_others(open_)
        open_.sort(key=lambda own: (own.lower_s, own.index))
        for problem in sorted(open_, key=lambda own: (self._step_s(own.parts), own.index))[:2]:
            self._improve(problem)
        for problem in open_:
            self._raise(problem)
            problem.costs.forget()
        self._try_idle()
        self._put_off_weights()
        self._move_put_off()
        self._deepen()

    def _raise(self, problem: _Problem) -> None:
        """Raises what is left of the bound, and simulates the stages that are met."""
        def met(stages: tuple[RunStage, ...]) -> None:
            self._check_time()
            self._try(problem, self._parts(problem.costs, stages))

        self._check_time()
        if problem.lower_s < self.goal_s:
            problem.lower_s = problem.runs.least_limit(problem.lower_s, self.goal_s, met=met)

    def _make_problems(self) -> None:
        for rewrites in _families(self.engine, self.pools):
            for count in divisors(self.engine.request.global_batch):
                self._check_time()
                self._add(MixedCosts(self.engine, self.pools, count, rewrites))

    def _make_context_problems(self) -> list[_Problem]:
        """Those with context axes that promise enough; some of their stages may have none."""
        before = len(self.problems)
        for count in promising_counts(self.engine, self.pools, self.best_s):
            for rewrites in context_families(self.engine, self.pools, count):
                self._check_time()
                self._add(MixedCosts(self.engine, self.pools, count, rewrites, context=True))
        return self.problems[before:]

    def _add(self, costs: MixedCosts) -> None:
        """Makes a problem of costs that have a setting for every pool."""
        if len({pool for pool, _ in costs.groups}) == len(self.pools.pools):
            self.outcome.num_context += costs.num_context
            self.outcome.num_searched += costs.num_context or sum(map(len, costs.settings))  # others were counted
            fluid_s = costs.fluid_bound()
            self.problems.append(_Problem(
                index=len(self.problems), costs=costs, runs=Runs(costs), fluid_s=fluid_s, lower_s=fluid_s
            ))

    def _still_open(self, problems: Sequence[_Problem]) -> list[_Problem]:
        """Looks for something better in each; those that may still have it.

        Limits rise in all problems together, those first that promise most: the sooner a good plan is found, the fewer
        limits others are looked at below. Below low limits fewer tables have to be made.
        """
        open_, waiting = [], [
            (own.lower_s * STEP * own.fill, own.index, own.lower_s * STEP if own.lower_s > 0 else math.inf)
            for own in problems
        ]
        heapify(waiting)
        while waiting:
            _, index, limit_s = heappop(waiting)
            problem = self.problems[index]
            if problem.lower_s < self.best_s and not self._pass(problem, limit_s):
                limit_s = limit_s * STEP if limit_s < problem.fluid_s * FAR else math.inf
                heappush(waiting, (limit_s * problem.fill, index, limit_s))
            else:
                if problem.lower_s < self.goal_s:
                    open_.append(problem)
                self._told()
            problem.costs.forget()
        return open_

    def _pass(self, problem: _Problem, limit_s: float) -> bool:
        """Looks for the stages of least bound below the limit, or the best step if near; whether there are any."""
        self._check_time()
        if limit_s * STEP >= self.best_s:
            limit_s = self.best_s
        passed, every = problem.runs.passed(limit_s), problem.runs.all_pools
        self._keep_partly(problem, passed)
        if every not in passed.bounds_s:
            problem.lower_s = limit_s
            return False
        problem.lower_s = max(problem.lower_s, passed.bounds_s[every])
        self._try(problem, self._parts(problem.costs, passed.stages[every]))
        problem.others = tuple((bound, self._parts(problem.costs, stages)) for bound, stages in passed.others)
        return True

    def _try(self, problem: _Problem, parts: tuple[Part, ...]) -> None:
        """Simulates the parts, which are the problem's where none of it were better."""
        found = self._simulated(problem.costs, parts)
        if found is not None and found.step_time_s < self._step_s(problem.parts):
            problem.parts = parts

    def _step_s(self, parts: tuple[Part, ...]) -> float:
        """What the parts were found to take; infinite where they do not fit or there are none."""
        found = self.outcome.tried.get(parts)
        return math.inf if found is None else found.step_time_s

    def _try_others(self, problems: Sequence[_Problem]) -> None:
        """Simulates stages of other numbers and orders, which their bounds may put too far behind."""
        every = sorted(
            (bound, problem.index, at) for problem in problems for at, (bound, _) in enumerate(problem.others)
        )
        by_index = {problem.index: problem for problem in problems}
        for bound, index, at in every[:MAX_OTHERS]:
            self._check_time()
            if bound >= self.goal_s:
                break
            problem = by_index[index]
            self._try(problem, problem.others[at][1])

    def _keep_partly(self, problem: _Problem, passed: Passed) -> None:
        for mask, bound in passed.bounds_s.items():
            if mask != problem.runs.all_pools:
                problem.partly[mask] = self._parts(problem.costs, passed.stages[mask])
                problem.partly_s[mask] = bound

    def _try_idle(self) -> None:
        """Whether what leaves whole pools unused is faster: the stages of least bound are simulated."""
        every = sorted(
            (bound, problem.index, mask) for problem in self.problems for mask, bound in problem.partly_s.items()
            if bound < self.goal_s
        )
        least = math.inf
        for _, index, mask in every[:4]:
            self._check_time()
            problem = self.problems[index]
            found = self._make(problem.costs, problem.partly[mask], whole=False)
            if found is not None and found.step_time_s < min(least, self.goal_s):
                least = found.step_time_s
                pools = range(len(self.pools.pools))
                self.outcome.idle = IdleFound(
                    step_time_s=least,
                    unused=", ".join(self.pools.name(pool) for pool in pools if not mask >> pool & 1),
                    used="+".join(self.pools.name(pool) for pool in pools if mask >> pool & 1),
                )

    def _deepen(self) -> None:
        """Where the bound leaves a gap: more in flight in the parts that could take least, did no device ever wait."""
        lower_s = min(problem.lower_s for problem in self.problems)
        every = sorted(
            (least_s, at, parts) for at, (parts, (least_s, _)) in enumerate(self._least.items())
            if self._step_s(parts) < math.inf
        )
        deeper: list[SimulatedPlan] = []
        for least_s, _, parts in every[:MAX_DEEPENED]:
            if self.best_s <= lower_s * (1 + DEEPENED_FROM) or least_s >= self.goal_s:
                break
            known = self.outcome.tried[parts]
            assert known is not None, "only what fits is deepened"
            costs = self._least[parts][1]
            for found in deeper_plans(self.engine, self.cluster, costs, parts, known, self._check_time):
                deeper.append(found)
                self._keep(found)
        self._put_off_weights_of(sorted(deeper, key=lambda own: own.step_time_s)[:PUT_OFF])

    def _keep(self, found: SimulatedPlan) -> None:
        self.outcome.num_simulated += 1
        if found.step_time_s < self.best_s:
            self.outcome.best = found

    def _put_off_weights(self) -> None:
        """Takes the best plans in an order that puts off gradients of weights, where that is better."""
        quickest: dict[int, dict[float, SimulatedPlan]] = {}  # by micro-batches and time: plans of one time are alike
        for found in sorted(filter(None, self.outcome.tried.values()), key=lambda own: own.step_time_s):
            quickest.setdefault(found.plan.num_micro_batches, {}).setdefault(found.step_time_s, found)
        for own in list(quickest.values())[:MAX_COUNTS]:
            self._put_off_weights_of(list(own.values())[:PUT_OFF])

    def _put_off_weights_of(self, bases: Sequence[SimulatedPlan]) -> None:
        for base in bases:
            self._check_time()
            other = weights_put_off(self.engine, self.cluster, base, self.best_s)
            if other is not None:
                self._keep(other)

    def _move_put_off(self) -> None:
        """Where the bound leaves a gap: the best plan that puts off gradients of weights, one change at a time."""
        best, lower_s = self.outcome.best, min(problem.lower_s for problem in self.problems)
        if best is None or best.step_time_s <= lower_s * (1 + DEEPENED_FROM):
            return
        plain = replace(best.plan, actions=())
        for parts, known in self.outcome.tried.items():
            if known is not None and known != best and replace(known.plan, actions=()) == plain:
                costs = self._least[parts][1]
                for found in moved_put_off(self.engine, self.cluster, costs, parts, best, self._check_time):
                    self._keep(found)
                return

    def _told(self) -> None:
        self.settled += 1
        if self.progress is not None:
            best_s = self.best_s
            self.progress(self.settled, len(self.problems), best_s if math.isfinite(best_s) else None)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _StoppedError

    def _parts(self, costs: MixedCosts, stages: Sequence[RunStage]) -> tuple[Part, ...]:
        """Found stages with their best settings and their ranks."""
        found = []
        for stage in stages:
            pool, size = costs.groups[stage.group]
            setting = costs.best_settings(stage.group, stage.in_flight, stage.first, stage.last)[0]
            ranks = self.pools.ranks(pool, stage.start, size)
            found.append(Part(stage.first, stage.last, setting, ranks, stage.group))
        return tuple(found)

    def _simulated(self, costs: MixedCosts, parts: tuple[Part, ...]) -> SimulatedPlan | None:
        """The parts as a plan, simulated; None where it does not fit or is not legal."""
        outcome = self.outcome
        if parts not in outcome.tried:
            outcome.num_simulated += 1
            outcome.tried[parts] = self._make(costs, parts)
        found = outcome.tried[parts]
        if found is not None and (outcome.best is None or found.step_time_s < outcome.best.step_time_s):
            outcome.best = found
        return found

    def _make(self, costs: MixedCosts, parts: tuple[Part, ...], *, whole: bool = True) -> SimulatedPlan | None:
        """`whole`: the plan must be legal, with every device used."""
        plan = mixed_plan(self.engine, costs, parts)
        try:
            timeline = simulate(self.engine.graph, self.cluster, plan, detail=False)
        except AutoparError as error:
            log.info("a plan of unlike stages cannot be simulated: %s", error)
            return None
        if not timeline.feasible:
            return None
        if whole and (problem := next(problems(plan, self.engine.graph), None)):
            log.info("a plan of unlike stages is not legal: %s", problem)
            return None
        graph = self.engine.graph
        least_s = busiest_s(graph, self.cluster, plan)
        if whole:
            self._least[parts] = least_s, costs
        other = other_schedule(graph, self.cluster, plan, split_backward=False) if least_s < self.best_s else None
        if other is not None:
            ordered = simulate(self.engine.graph, self.cluster, other, detail=False)
            if ordered.feasible and ordered.step_time_s < timeline.step_time_s * (1 - WORTH):
                plan, timeline = other, ordered
        return SimulatedPlan(
            step_time_s=timeline.step_time_s, plan=plan,
            peak_bytes=timeline.rank_peak_bytes,
            limit_bytes=tuple(part.setting.kind.memory_limit_bytes for part in parts),
        )

    def _improve(self, problem: _Problem) -> None:
        """Goes from plan to better plan by one change at a time, until none helps."""
        if not problem.parts:
            return
        parts = problem.parts
        best = self.outcome.tried[parts]
        assert best is not None, "only plans that fit are improved"
        improved, before = True, self.outcome.num_simulated
        while improved:
            improved = False
            for other in neighbours(problem.costs, parts):
                self._check_time()
                if self.outcome.num_simulated - before > MAX_IMPROVED:
                    return
                found = self._simulated(problem.costs, other)
                if found is not None and found.step_time_s < best.step_time_s * (1 - 1e-4):
                    best, parts, improved = found, other, True
                    break


def search_mixed(
    engine: Engine, cluster: Cluster, best_s: float, deadline: float | None, progress: Progress | None = None
) -> MixedOutcome:
    """The best plan with stages of their own meshes where the cluster's nodes are not alike; nothing elsewhere.

    `best_s` is what it has to beat. An interrupt ends it as the deadline does where there is a plan.
    """
    if not has_unlike_stages(engine, cluster):
        return MixedOutcome()
    search = _Search(engine, cluster, best_s, deadline, progress)
    outcome = search.outcome
    try:
        search.run()
    except _StoppedError:
        outcome.complete = False
    except KeyboardInterrupt:
        if not math.isfinite(best_s) and outcome.best is None:
            raise
        outcome.complete, engine.interrupted = False, True
    outcome.lower_bound_s = min((own.lower_s for own in search.problems), default=math.inf)
    if not outcome.complete and not search.settled:
        outcome.lower_bound_s = 0.0  # not all problems may have been made
    if outcome.best is not None:
        outcome.lower_bound_s = min(outcome.lower_bound_s, outcome.best.step_time_s)
        if outcome.best.step_time_s >= best_s:
            outcome.best = None
    return outcome


def has_unlike_stages(engine: Engine, cluster: Cluster) -> bool:
    """Whether stages of unlike meshes are searched for this request on this cluster."""
    request = engine.request
    return (
        request.unlike_stages and not cluster.is_uniform and not request.mesh and not engine.chooser.needs_whole_batch
        and len(ClusterPools(cluster).pools) <= MAX_POOLS
    )


class _StoppedError(Exception):
    """The time limit came."""


def _families(engine: Engine, pools: ClusterPools) -> list[tuple[Rewrite, ...]]:
    """The sets of rewrites that any size of a tensor axis chooses: a plan has one of them for all its stages."""
    found: dict[tuple[Rewrite, ...], None] = {}
    for tp in sorted({tp for pool in pools.pools for tp in divisors(pool.node_size)}):
        for sequence_parallel in (False, True) if tp > 1 and engine.chooser.has_hidden_states else (False,):
            for split in (True, False) if tp > 1 else (True,):
                choice = engine.chooser.choose(tp, sequence_parallel=sequence_parallel, split_weights=split)
                if choice is not None:
                    found[choice.rewrites] = None
    return list(found)
