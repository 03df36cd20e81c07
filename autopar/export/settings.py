"""A plan as the settings of another training system, with what those settings cannot say."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import InputError
from autopar.plan.plan import Mesh, Plan, Recompute, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`text` is what the other system reads; each line of `not_expressed` is a part of the plan that it leaves out."""

    target: str
    text: str
    not_expressed: tuple[str, ...]


def num_chunks(plan: Plan) -> int:
    """Virtual stages on each pipeline rank; 1 where stages are not interleaved."""
    return 1 + max(stage.virtual for stage in plan.stages)


def one_mesh(plan: Plan, target: str) -> tuple[Mesh, int]:
    """The mesh and the ZeRO level that all stages share; InputError where they differ, for `target` has one of each."""
    first = plan.stages[0]
    for number, stage in enumerate(plan.stages):
        if (stage.mesh, stage.zero) != (first.mesh, first.zero):
            raise InputError(
                f"stage {number} has another mesh or ZeRO level than stage 0, which {target} cannot run: "
                "ask autopar for a plan with equal stages, or run this one with autopar itself"
            )
    return first.mesh, first.zero


def even_layers(plan: Plan) -> bool:
    """Whether every stage has the same number of layers."""
    return len({last - first for first, last in (plan.layers(stage) for stage in plan.stages)}) == 1


def common_gaps(plan: Plan) -> list[str]:
    """What no other system's settings can say of this plan."""
    gaps = []
    if plan.shardings:
        gaps.append("how tensor parallelism splits each operator: the target uses its own fixed column/row scheme")
    if len({main_recompute(plan, stage) for stage in plan.stages}) > 1:
        gaps.append("stages that recompute differently: the first stage's choice is written for all")
    if any(stage.num_offloaded for stage in plan.stages):
        gaps.append("activations in host memory")
    if any(stage.offload_optimizer for stage in plan.stages):
        gaps.append("optimizer state in host memory")
    return gaps


def main_recompute(plan: Plan, stage: Stage) -> Recompute:
    """What most layers of a stage recompute; among equals what recomputes more."""
    counts = stage.recompute_layers(plan.num_layers(stage)) if stage.variants else {str(stage.recompute): 1}
    return max(reversed(Recompute), key=lambda word: counts.get(str(word), 0))
