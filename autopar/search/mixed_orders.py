"""Plans of unlike stages in other orders: with more micro-batches in flight, and with gradients of weights put off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.plan.plan import Plan
from autopar.search.best_first import Engine
from autopar.search.mixed_costs import MixedCosts
from autopar.search.mixed_plans import Part, mixed_plan
from autopar.search.plan_schedules import WORTH, deepened, other_schedule
from autopar.search.simulated_plan import SimulatedPlan
from autopar.simulate.simulator import simulate

MAX_LISTED = 2000  # actions up to which list schedules are tried where gradients of weights are put off


def deeper_plans(
    engine: Engine, cluster: Cluster, costs: MixedCosts, parts: Sequence[Part], known: SimulatedPlan,
    check_time: Callable[[], None],
) -> Iterator[SimulatedPlan]:
    """The parts with more micro-batches in flight, quicker than as they are known.

    `check_time` is called before each that is looked at, most of which are not quicker.
    """
    def make(deeper: int) -> Plan:
        check_time()
        return mixed_plan(engine, costs, parts, deeper=deeper)

    for plan in deepened(engine, cluster, known.plan, make, known.step_time_s):
        found = _simulated(engine, cluster, plan, known)
        if found is not None and found.step_time_s < known.step_time_s:
            yield found


def weights_put_off(engine: Engine, cluster: Cluster, base: SimulatedPlan, best_s: float) -> SimulatedPlan | None:
    """The plan in an order that puts off gradients of weights, where that is quicker than the best by what is worth it.
    """
    limit_s = best_s * (1 - WORTH)
    other = other_schedule(
        engine.graph, cluster, replace(base.plan, actions=()), limit_s=limit_s, most_listed=MAX_LISTED
    )
    if other is None or other == base.plan:
        return None
    found = _simulated(engine, cluster, other, base)
    return found if found is not None and found.step_time_s < limit_s else None


def _simulated(engine: Engine, cluster: Cluster, plan: Plan, like: SimulatedPlan) -> SimulatedPlan | None:
    """The plan simulated, on the devices of another; None where it does not fit."""
    timeline = simulate(engine.graph, cluster, plan, detail=False)
    if not timeline.feasible:
        return None
    return replace(like, plan=plan, step_time_s=timeline.step_time_s, peak_bytes=timeline.rank_peak_bytes)
