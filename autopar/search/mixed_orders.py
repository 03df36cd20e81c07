"""Plans of unlike stages in other orders: with more micro-batches in flight, and with gradients of weights put off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.plan.plan import Plan
from autopar.plan.verify import problems
from autopar.search.best_first import Engine
from autopar.search.mixed_costs import MixedCosts
from autopar.search.mixed_plans import Part, mixed_plan, neighbours
from autopar.search.plan_schedules import WORTH, deepened, other_schedule
from autopar.search.simulated_plan import SimulatedPlan
from autopar.simulate.simulator import simulate

MAX_MOVED_ACTIONS = 25_000  # of the plans next to the best one that are ordered, all together
BETTER = 1e-4  # what such a plan must gain, of the step
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


def moved_put_off(
    engine: Engine, cluster: Cluster, costs: MixedCosts, parts: tuple[Part, ...], best: SimulatedPlan,
    check_time: Callable[[], None],
) -> Iterator[SimulatedPlan]:
    """From the best plan, which has these parts and puts off gradients of weights, to better ones of the same kind.

    One change at a time, another setting of a stage or a border moved by a block, until none helps or the limit of work
    comes: where a pipeline waits less while it fills, other borders are better than in 1F1B.
    """
    seen, improved, actions = {parts}, True, 0
    while improved:
        improved = False
        for other in neighbours(costs, parts):
            if other in seen:
                continue
            actions += 2 * len(other) * costs.num_micro_batches
            if actions > MAX_MOVED_ACTIONS:
                return
            seen.add(other)
            check_time()
            limits = tuple(part.setting.kind.memory_limit_bytes for part in other)
            base = replace(best, plan=mixed_plan(engine, costs, other), limit_bytes=limits)
            found = weights_put_off(engine, cluster, base, best.step_time_s, BETTER)
            if found is not None and next(problems(found.plan, engine.graph), None) is None:
                yield found
                best, parts, improved = found, other, True
                break


def weights_put_off(
    engine: Engine, cluster: Cluster, base: SimulatedPlan, best_s: float, worth: float = WORTH
) -> SimulatedPlan | None:
    """The plan in an order that puts off gradients of weights, where that is quicker than the best by what is worth it.
    """
    limit_s = best_s * (1 - worth)
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
