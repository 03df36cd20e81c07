"""Plans whose data ranks have the experts of a mixture between them, tried beside those where each rank has all.

An expert axis changes nothing but the experts: their exchange, their weights in memory, and what is reduced of them.
What a candidate's blocks take with it, shared evenly by the stages, is a bound, and so is all that one stage takes; one
over all cuts (`expert_cuts`) comes next. The settings of least bound are simulated, cut evenly and as the bound says.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autopar.graph.expert_params import unsplit_experts
from autopar.search.best_first import Engine, Found
from autopar.search.bounds import Cuts
from autopar.search.candidates import Candidate, PlanRequest, divisors
from autopar.search.expert_cuts import ExpertCuts
from autopar.search.simulated_plan import SimulatedPlan, simulated
from autopar.search.work_bounds import shared_work
from autopar.sharding.rewrites import rewritten
from autopar.simulate.block_cost import BlockCost
from autopar.simulate.stage_cost import inner_axis, stage_cost

MAX_SIMULATED = 120
MAX_SIMULATED_ACTIONS = 400_000
ROUNDING = 1e-9  # relative, of sums in another order
NOT_TRIED = (
    f"an expert axis beyond the {MAX_SIMULATED} settings of least bound, other "
    "schedules with it, a context axis, an offloaded optimizer or on devices of several types"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOutcome:
    """The best plan with an expert axis that beats all others, if any, and what none of them can be faster than.

    `timed_out`: the time limit or an interrupt came first.
    """

    best: SimulatedPlan | None = None
    lower_bound_s: float = float("inf")
    num_simulated: int = 0
    timed_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Setting:
    """A candidate with an expert axis of `ep` data ranks, and what its step takes at least.

    Where `cut` is given, that is a bound of all cuts and `cut` is the one that it is of.
    """

    bound_s: float
    ep: int
    candidate: Candidate
    cut: Cuts | None = field(default=None, compare=False)


def search_experts(
    engine: Engine, space: Sequence[Candidate], best: Found | None, best_s: float, deadline: float | None
) -> ExpertsOutcome:
    """The best plan with an expert axis that is faster than `best_s`; `best` is tried with its own cuts too.

    Its size is the user's, where that is fixed. An interrupt ends it with the best so far.
    """
    fixed = fixed_size(engine.request)
    if not engine.cluster.is_uniform or unsplit_experts(engine.graph, 1) or fixed == 1:
        return ExpertsOutcome()
    found: SimulatedPlan | None = None
    lower_s, number, actions = float("inf"), 0, 0
    try:
        queue = sorted(_settings(engine, space, best_s, deadline))
        while queue:
            setting, limit_s = heapq.heappop(queue), found.step_time_s if found is not None else best_s
            c = setting.candidate
            if setting.bound_s >= limit_s:
                break
            if number >= MAX_SIMULATED or actions >= MAX_SIMULATED_ACTIONS or engine.out_of_time(deadline):
                lower_s = min(lower_s, setting.bound_s)  # of this setting and all after it
                break
            if setting.cut is None:
                closer = _of_cuts(engine, setting, limit_s)
                if closer is not None:
                    heapq.heappush(queue, closer)
                continue
            cuts = {engine.even_cuts(c.pp), best.cuts if best is not None and best.candidate.pp == c.pp else None}
            for cut in sorted(own for own in {*cuts, setting.cut} if own is not None):
                number += 1
                actions += 2 * c.pp * c.num_micro_batches
                made = simulated(engine, engine.plan(c, cut, ep=setting.ep))
                if made is not None and made.step_time_s < (found.step_time_s if found is not None else best_s):
                    found = made
            if c.pp > 1:
                lower_s = min(lower_s, setting.bound_s)  # of other cuts
    except KeyboardInterrupt:
        engine.interrupted, lower_s = True, 0.0
    return ExpertsOutcome(
        best=found, lower_bound_s=lower_s, num_simulated=number, timed_out=engine.out_of_time(deadline)
    )


def fixed_size(request: PlanRequest) -> int | None:
    """The size that the user gave the expert axis; None where it is searched."""
    return dict(request.mesh).get("ep")


def why_none(engine: Engine, size: int) -> str:
    """Why no plan with an expert axis of the size that the user fixed was found."""
    if why := unsplit_experts(engine.graph, size):
        return f"{why}; change or leave out ep in --mesh"
    if not engine.cluster.is_uniform:
        return f"an expert axis is not searched on nodes that are not alike, as in {engine.cluster.name}; leave ep out"
    return (
        f"no plan with ep {size} on {engine.cluster.name} was found that fits: ep must divide the data ranks (dp_shard "
        "where ZeRO is on); change or leave out ep in --mesh"
    )


def _settings(engine: Engine, space: Sequence[Candidate], below_s: float, deadline: float | None) -> list[_Setting]:
    """Every setting with a bound that is below the limit; where there is no time for a bound it is 0."""
    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for c in space:
        if c.dp > 1 and not c.offload_optimizer and c.cp == 1:
            groups.setdefault((c.pp, c.tp, c.sequence_parallel, c.split_weights, c.micro_batch), []).append(c)
    found = []
    fixed = fixed_size(engine.request)
    allowed = [
        size for size in divisors(engine.cluster.num_devices)[1:]
        if fixed in (None, size) and not unsplit_experts(engine.graph, size)
    ]
    for candidates in groups.values():
        for size in allowed:
            own = [c for c in candidates if (c.dp_shard if c.zero else c.dp) % size == 0]
            late = engine.out_of_time(deadline)
            least_s = _bound(engine, own[0], size) if own and not late else 0.0
            for c in own if least_s < below_s else ():
                closer_s = least_s if late or c.pp > 1 else max(least_s, _alone_s(engine, c, size))
                if closer_s < below_s:
                    found.append(_Setting(bound_s=closer_s, candidate=c, ep=size))
    return found


def _alone_s(engine: Engine, c: Candidate, size: int) -> float:
    """Seconds of a step of one stage that keeps everything: what it must recompute or offload only adds to it."""
    plan = engine.plan_of(c, (0, len(engine.graph.blocks)), ep=size)
    cost = stage_cost(rewritten(engine.graph, plan.rewrites), engine.cluster, plan, 0)
    return (1 - ROUNDING) * (plan.num_micro_batches * (cost.forward_s + cost.backward_s) + cost.step_once_s)


def _of_cuts(engine: Engine, setting: _Setting, limit_s: float) -> _Setting | None:
    """The setting with a closer bound over all cuts of its stages; None where none is below the limit."""
    c = setting.candidate
    bound_s, cut = ExpertCuts(engine, c, setting.ep, _costs(engine, c, setting.ep), limit_s).best()
    if cut is None:
        return None
    return replace(setting, bound_s=max(setting.bound_s, (1 - ROUNDING) * bound_s), cut=cut)


def _bound(engine: Engine, c: Candidate, size: int) -> float:
    """What a step takes at least with an expert axis of this size: all blocks' work, with nothing of data axes."""
    costs = _costs(engine, c, size)
    forward = backward = 0.0
    for name, number in Counter(block.cls for block in engine.graph.blocks).items():
        cost = costs[name]
        forward += number * (cost.forward_compute_s + cost.forward_tp_comm_s)
        backward += number * (cost.backward_compute_s + cost.backward_tp_comm_s)
    return shared_work(c, forward, backward)


def _costs(engine: Engine, c: Candidate, size: int) -> dict[str, BlockCost]:
    """What a block of each class costs with an expert axis of this size; nodes are alike."""
    axis = inner_axis(engine.cluster, tuple(i * c.tp for i in range(size)))
    return engine.bounds.block_costs(c, engine.layout.kinds(c)[0], expert_axis=axis)
