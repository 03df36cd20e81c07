"""A rank's memory over a step of one micro-batch, which its stages' backwards pass through once each."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.plan.actions import B, F
from autopar.simulate.events import Execution
from autopar.simulate.single_backward import Moment, SingleBackward
from autopar.simulate.stage_cost import StageCost
from autopar.simulate.timeline import MemoryBytes


def single_backwards(run: Execution, rank: int, costs: Mapping[int, StageCost]) -> dict[int, SingleBackward]:
    """Of each stage of a rank its only backward, in their order; none where it has several, or in two parts."""
    order = [action.stage for action in run.lists[rank] if action.kind is B]
    if sorted(order) != sorted(costs) or any(action.kind not in (F, B) for action in run.lists[rank]):
        return {}
    found = {stage: costs[stage].single for stage in order}
    return {stage: single for stage, single in found.items() if single is not None} if all(found.values()) else {}


def single_memory(
    run: Execution, rank: int, singles: Mapping[int, SingleBackward], stepping_bytes: float, reduced_s: float
) -> tuple[MemoryBytes, tuple[tuple[float, float], ...]]:
    """Of what the peak is made, and the bytes over time as (time_s, bytes from then on) until the optimizer's step.

    `stepping_bytes`: what the optimizer needs beside the states; it begins at `reduced_s`.
    """
    parameters = sum(single.always.parameters for single in singles.values())
    optimizer = sum(single.always.optimizer for single in singles.values())
    buffers = max(single.always.buffers for single in singles.values())  # stages take turns with them

    def memory(moment: Moment) -> MemoryBytes:
        return MemoryBytes(
            parameters=parameters + moment.copies, gradients=moment.gradients, optimizer=optimizer,
            activations=moment.activations, buffers=buffers + moment.buffers,
        )

    now = {stage: Moment(copies=single.before.copies) for stage, single in singles.items()}

    def together(stage: int, moment: Moment) -> Moment:
        for other, own in now.items():
            moment = moment.with_(own) if other != stage else moment
        return moment

    none = Moment()
    found = [(0.0, together(-1, none))]
    for action, start, end in zip(run.lists[rank], run.starts[rank], run.ends[rank], strict=True):
        stage, single = action.stage, singles[action.stage]
        if action.kind is F:
            now[stage] = single.before
            found.append((start, together(-1, none)))
        else:
            found.append((start, together(stage, single.peak)))
            now[stage] = single.after
            found.append((end, together(-1, none)))
    found.append((reduced_s, together(-1, Moment(buffers=stepping_bytes))))
    steps = tuple((time, memory(moment).total) for time, moment in found)
    most = max(found, key=lambda step: step[1].total)
    return memory(most[1]), steps
