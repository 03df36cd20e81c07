"""The quickest pipelines with the borders between their stages moved while that makes the simulated step shorter.

Bounds choose the cuts that are simulated, and the cut of least bound need not be the quickest: where a step has about
as many micro-batches as stages it may take some per cent longer than the bound says, and other cuts less. So from what
was simulated a layer is taken from one stage for another, and all borders between the two move on by one. Which of
these moves are simulated first, an estimate says: the closed form of the schedule on the costs of the stages, each of
which is found once for all cuts in which a stage holds such blocks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autopar.search.best_first import Engine, Found
from autopar.search.bounds import Cuts
from autopar.search.candidates import Candidate
from autopar.search.elimination import Table
from autopar.sharding.rewrites import rewritten
from autopar.simulate.closed_form import one_f_one_b_s
from autopar.simulate.events import StageTimes
from autopar.simulate.members import member_costs, slowest_times
from autopar.simulate.one_f_one_b import run_one_f_one_b
from autopar.simulate.simulator import pipeline_times

IMPROVED = 4  # pipelines, those of least time
NEAR = 1.05  # times the best step: what takes longer is not tried
MAX_SIMULATED = 60  # of one pipeline
MAX_ACTIONS = 500_000  # executed for all pipelines together
MAX_ESTIMATES = 6_000  # of one pipeline
TRIES = 40  # moves of least estimate whose schedules are executed
GAIN = 1e-9  # relative; less is rounding

Estimate = tuple[float, Cuts]  # seconds of a step, under which cut


class BorderSearch:
    """Moves the borders of the quickest pipelines, of each candidate once, where that may give a quicker plan."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.moved: set[Found] = set()  # what borders were moved for
        self._climbs: dict[Candidate, _Climb] = {}
        self._actions = MAX_ACTIONS

    def best(self, best: Found, deadline: float | None, *, number: int = IMPROVED) -> Found:
        """The best of that many of the quickest pipelines with their borders moved; `best`, where none is better.

        The time limit and an interrupt end it with the best so far.
        """
        engine, climbs = self.engine, list[_Climb]()
        try:
            for base in engine.quickest_pipelines(number):
                if engine.out_of_time(deadline) or base.step_time_s > NEAR * best.step_time_s:
                    break
                known = self._climbs.get(base.candidate)
                if base.candidate.pp == len(engine.graph.blocks) or (known is not None and known.now <= base):
                    continue  # no border can move, or it went on from there
                climb = _Climb(engine, base, deadline, self._actions)
                climbs.append(climb)
                self._climbs[base.candidate] = climb
                climb.run(best)
                self._actions = climb.actions
                best = min(best, climb.now)
        except KeyboardInterrupt:
            engine.interrupted = True
        self.moved |= {found for climb in climbs for found in climb.found}
        return min((best, *(climb.now for climb in climbs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimated:
    """A stage's times, what it does once a step, and what of that comes after its gradients are reduced."""

    times: StageTimes
    once_s: float
    after_s: float

    @property
    def figures(self) -> tuple[float, ...]:
        """Those that an estimate needs."""
        times = self.times
        return times.forward_s, times.backward_s, times.send_forward_s, times.send_backward_s, self.once_s


_NONE = (0.0, 0.0, 0.0, 0.0, math.inf)  # the figures of a stage that does not fit


class _Climb:
    """Moves the borders of one pipeline.

    `now`: how far it came; `found`: all that was simulated on the way; `actions`: how many may still be executed.
    """

    def __init__(self, engine: Engine, base: Found, deadline: float | None, actions: int) -> None:
        self.engine, self.now, self.deadline, self.actions = engine, base, deadline, actions
        self.candidate, self.kinds = base.candidate, engine.layout.kinds(base.candidate)
        self.plan = engine.plan_of(base.candidate, base.cuts)
        self.graph = rewritten(engine.graph, self.plan.rewrites)
        _, self.links = pipeline_times(self.graph, engine.cluster, self.plan)
        self.simulated = self.estimated = 0
        self.found: list[Found] = []
        self.beside_s = 0.0  # what the simulator adds to the schedule: sums of tied gradients over stages
        self._stages: dict[tuple[object, ...], _Estimated | None] = {}
        self._known: dict[Cuts, float] = {}
        self._executed: dict[Cuts, float] = {}

    def run(self, best: Found) -> None:
        """Moves borders while that helps; not at all where estimates promise nothing below the best."""
        least_s, promising = self._descend(self.now.cuts)
        if self.now != best and least_s >= best.step_time_s:
            return
        executed_s = self._execute(self.now.cuts)
        if executed_s < math.inf:
            self.beside_s = self.now.step_time_s - executed_s
        self._step([(least_s, promising)])
        while not self.engine.out_of_time(self.deadline):
            own = sorted(self.estimates(list(moves(self.now.cuts))))
            if not self._step([each for each in own[:TRIES] if each[0] < self.now.step_time_s]):
                break

    def _step(self, tried: list[Estimate]) -> bool:
        """Whether the simulator sees one of these cuts quicker, so that it is now that; the quickest come first.

        No schedule is shorter than its estimate, so that one is executed when it may be the quickest.
        """
        limit_s = self.now.step_time_s * (1 - GAIN)
        queue = [(estimate_s * (1 - GAIN), cuts, False) for estimate_s, cuts in tried]
        heapq.heapify(queue)
        while queue:
            time_s, cuts, is_executed = heapq.heappop(queue)
            out = self.simulated >= MAX_SIMULATED or self.engine.out_of_time(self.deadline)
            if out or time_s + self.beside_s >= limit_s:
                return False
            if not is_executed:
                heapq.heappush(queue, (self._execute(cuts), cuts, True))
                continue
            self.simulated += 1
            found = self.engine.simulate(self.candidate, cuts)
            self.found += [found] if found is not None else ()
            if found is not None and found.step_time_s < limit_s:
                self.now = found
                return True
        return False

    def _execute(self, cuts: Cuts) -> float:
        """What the step takes by the schedule's own order; infinite where it does not fit, or the work is done."""
        if cuts not in self._executed:
            stages, cost = self._all(cuts), 2 * self.candidate.pp * self.candidate.num_micro_batches
            if stages is None or self.actions < cost or self.engine.out_of_time(self.deadline):
                return math.inf
            self.actions -= cost
            ends = run_one_f_one_b([own.times for own in stages], self.candidate.num_micro_batches).rank_end_s
            self._executed[cuts] = max(end + own.after_s for end, own in zip(ends, stages, strict=True))
        return self._executed[cuts]

    def _descend(self, cuts: Cuts) -> Estimate:
        """The cut that is reached by the moves of least estimate, while they lower it, after its estimate."""
        at = self.estimates([cuts])[0]
        while not self.engine.out_of_time(self.deadline):
            least = min(self.estimates(list(moves(at[1]))), default=at)
            if not least[0] < at[0] * (1 - GAIN):
                break
            at = least
        return at

    def estimates(self, every: Sequence[Cuts]) -> list[Estimate]:
        """About what the step takes under each of these cuts; infinite where it does not fit.

        Also where too much was estimated.
        """
        new = [cuts for cuts in dict.fromkeys(every) if cuts not in self._known][: MAX_ESTIMATES - self.estimated]
        self.estimated += len(new)
        if new:
            self._known.update(zip(new, self._estimate(np.array(new)).tolist(), strict=True))
        return [(self._known.get(cuts, math.inf), cuts) for cuts in every]

    def _estimate(self, cuts: NDArray[np.intp]) -> Table:
        """The estimates of these cuts, one a row: the closed form, and all that one stage does."""
        m, end = self.candidate.num_micro_batches, int(cuts[0, -1]) + 1
        of_cuts = np.empty((len(_NONE), len(cuts), cuts.shape[1] - 1))
        for stage in range(cuts.shape[1] - 1):
            spans, which = np.unique(cuts[:, stage] * end + cuts[:, stage + 1], return_inverse=True)
            each = [self._stage(stage, *divmod(int(span), end)) for span in spans]
            figures = np.array([_NONE if own is None else own.figures for own in each])
            of_cuts[:, :, stage] = figures[which].T
        forward, backward, send_forward, send_backward, once = of_cuts
        fits = np.isfinite(once).all(axis=1)
        forward, backward = (np.where(fits[:, None], table, 0.0) for table in (forward, backward))
        through = one_f_one_b_s(forward, backward, send_forward, send_backward, m) + once[:, 0]
        return np.where(fits, np.maximum(through, (m * (forward + backward) + once).max(axis=1)), np.inf)

    def _all(self, cuts: Cuts) -> list[_Estimated] | None:
        """All stages under this cut; None where one does not fit."""
        found = []
        for stage, (first, last) in enumerate(pairwise(cuts)):
            own = self._stage(stage, first, last)
            if own is None:
                return None
            found.append(own)
        return found

    def _stage(self, stage: int, first: int, last: int) -> _Estimated | None:
        """What a stage of these blocks takes. Links are taken as they were: what crosses borders is mostly alike."""
        key = (stage, *(block.cls for block in self.graph.blocks[first:last]))
        if key not in self._stages:
            self._stages[key] = self._cost(stage, first, last)
        return self._stages[key]

    def _cost(self, stage: int, first: int, last: int) -> _Estimated | None:
        engine, c, plan = self.engine, self.candidate, self.plan
        own = replace(plan.stages[stage], first=first, last=last)
        moved = replace(plan, stages=(*plan.stages[:stage], own, *plan.stages[stage + 1 :]))
        options = engine.options(c, self.kinds[stage], moved, stage)
        if options is not None:
            own = own.with_variants([option.variant for option in options])
            moved = replace(plan, stages=(*plan.stages[:stage], own, *plan.stages[stage + 1 :]))
        costs = list(member_costs(self.graph, engine.cluster, moved, stage).values())
        in_flight = min(c.pp - stage, c.num_micro_batches)
        left = self.kinds[stage].memory_limit_bytes
        for cost in costs:
            if cost.peak_bytes(in_flight) > left:
                return None
        link = self.links[stage]
        return _Estimated(
            times=slowest_times(costs, link.send_forward_s, link.send_backward_s),
            once_s=max(cost.step_once_s for cost in costs),
            after_s=max(cost.step_tp_s + cost.optimizer_s for cost in costs),
        )


def moves(cuts: Cuts) -> Iterator[Cuts]:
    """The cuts in which one stage has a block less and another one more: all borders between them move by one."""
    for low in range(1, len(cuts) - 1):
        for high in range(low, len(cuts) - 1):
            for step in (-1, 1):
                moved = (*cuts[:low], *(at + step for at in cuts[low : high + 1]), *cuts[high + 1 :])
                if moved[low - 1] < moved[low] and moved[high] < moved[high + 1]:
                    yield moved
