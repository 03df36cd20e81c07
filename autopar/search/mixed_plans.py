"""Stages with settings of their own as plans, and those that differ from such stages by one change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.plan.plan import Plan, Recompute, Stage
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate
from autopar.search.mixed_costs import MixedCosts, Setting

SETTINGS_TRIED = 3  # of a stage, when a plan is improved


@dataclass(frozen=True, slots=True)
class Part:
    """A stage: blocks[first:last] under a setting on these ranks."""

    first: int
    last: int
    setting: Setting
    ranks: tuple[int, ...]
    group: int


def mixed_plan(engine: Engine, costs: MixedCosts, parts: Sequence[Part], *, deeper: int = 0) -> Plan:
    """The parts as a plan whose layers recompute or offload so that they fit, where that is enough.

    `deeper`: how many more micro-batches are to fit on each stage than 1F1B has in flight.
    """
    first = parts[0].setting.candidate
    # The plan's own shardings are those of the first stage that has inner axes; other stages hold theirs.
    lead = next((part.setting.candidate for part in parts if part.setting.candidate.mesh.inner), first)
    base = engine.plan_of(replace(lead, micro_batch=first.micro_batch), (0, len(engine.graph.blocks)))
    stages = []
    for part in parts:
        c = part.setting.candidate
        alike = not c.mesh.inner or _sharding_key(c) == _sharding_key(lead)
        stages.append(Stage(
            first=part.first, last=part.last, devices=part.ranks, mesh=c.mesh, zero=c.zero, recompute=Recompute.NONE,
            rows=() if c.micro_batch == first.micro_batch else (c.micro_batch,) * c.dp,
            shardings=() if alike else engine.chooser.shardings(
                c.tp, first.micro_batch, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights,
                cp=c.cp,
            ),
        ))
    plan = replace(
        base, stages=tuple(stages), num_micro_batches=costs.num_micro_batches,
        sequence_parallel=any(part.setting.candidate.sequence_parallel for part in parts),
    )
    fitted = []
    for index, part in enumerate(parts):
        options = engine.options(part.setting.candidate, part.setting.kind, plan, index, deeper=deeper)
        stage = plan.stages[index]
        fitted.append(stage if options is None else stage.with_variants([option.variant for option in options]))
    return replace(plan, stages=tuple(fitted))


def _sharding_key(c: Candidate) -> tuple[int, int, bool, bool]:
    return c.cp, c.tp, c.sequence_parallel, c.split_weights


def neighbours(costs: MixedCosts, parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    """Every change of one stage's setting, and of one border by a block."""
    for index in range(len(parts) - 1):
        here, there = parts[index], parts[index + 1]
        for border in (here.last - 1, here.last + 1):
            if here.first < border < there.last:
                moved = (replace(here, last=border), replace(there, first=border))
                yield (*parts[:index], *moved, *parts[index + 2 :])
    for index, part in enumerate(parts):
        in_flight = min(len(parts) - index, costs.num_micro_batches)
        for setting in costs.best_settings(part.group, in_flight, part.first, part.last)[:SETTINGS_TRIED]:
            if setting != part.setting:
                yield (*parts[:index], replace(part, setting=setting), *parts[index + 1 :])
