"""Whole plans that were simulated and fit: what the searches beside that of cuts give."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from autopar.errors import AutoparError
from autopar.plan.plan import Plan
from autopar.plan.verify import problems
from autopar.search.best_first import Engine, Found
from autopar.search.stage_kinds import memory_limit
from autopar.simulate.simulator import simulate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPlan:
    """A plan that was simulated and fits. Bytes are of the devices of each of its stages."""

    step_time_s: float
    plan: Plan
    peak_bytes: tuple[float, ...]
    limit_bytes: tuple[float, ...]

    @staticmethod
    def of(engine: Engine, found: Found) -> SimulatedPlan:
        """What was found of a candidate and a cut, as a plan."""
        return SimulatedPlan(
            step_time_s=found.step_time_s, plan=engine.plan(found.candidate, found.cuts),
            peak_bytes=found.peak_bytes, limit_bytes=found.limit_bytes,
        )


def simulated(engine: Engine, plan: Plan, limit_s: float = math.inf) -> SimulatedPlan | None:
    """The plan as the simulator sees it; None where it does not fit or is no plan, which is logged.

    Also where it is not below the limit.
    """
    try:
        timeline = simulate(engine.graph, engine.cluster, plan, detail=False)
    except AutoparError as error:
        log.info("a plan cannot be simulated: %s", error)
        return None
    if timeline.step_time_s >= limit_s:
        return None
    if not timeline.feasible or (problem := next(problems(plan, engine.graph), None)):
        log.info("a plan is left out: %s", problem if timeline.feasible else timeline.infeasible_reason)
        return None
    peaks = timeline.rank_peak_bytes  # of pipeline ranks; their chunks follow one another
    return SimulatedPlan(
        step_time_s=timeline.step_time_s, plan=plan,
        peak_bytes=tuple(peaks[index % len(peaks)] for index in range(plan.num_stages)),
        limit_bytes=tuple(memory_limit(engine.cluster, stage.devices) for stage in plan.stages),
    )
