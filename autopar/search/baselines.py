"""The expert's plans under the same cost model: each the best of its family, with evenly dealt layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.plan.plan import Baseline
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate


@dataclass(frozen=True, slots=True)
class Family:
    """The candidates that an expert's recipe allows, and why there may be none."""

    name: str
    allows: Callable[[Candidate], bool]
    without: str


def _plain(c: Candidate) -> bool:
    return c.pp == 1 and c.tp == 1


def _megatron(c: Candidate) -> bool:
    return c.pp * c.tp > 1 and c.zero <= 1 and c.split_weights and 1 in (c.dp_replicate, c.dp_shard)


FAMILIES = (
    Family("ddp", lambda c: _plain(c) and c.zero == 0, "the batch does not divide over all devices"),
    Family("fsdp", lambda c: _plain(c) and c.zero == 3 and c.dp_replicate == 1,
           "needs several devices, and a batch that divides over all of them"),
    Family("hsdp", lambda c: _plain(c) and c.zero == 3 and c.dp_replicate > 1,
           "needs several nodes, and a batch that divides over all devices"),
    Family("megatron", _megatron,
           "no tensor or pipeline degree divides devices, layers and batch"),
    Family("even pipeline", lambda c: c.pp > 1 and c.tp == 1 and c.zero == 0,
           "no pipeline degree divides devices, layers and batch"),
)


def run_baselines(engine: Engine, candidates: Sequence[Candidate], deadline: float | None) -> tuple[Baseline, ...]:
    """The best of each family; `engine.best` is then the best of them."""
    found: list[Baseline] = []
    for family in FAMILIES:
        allowed = [candidate for candidate in candidates if family.allows(candidate)]
        if not allowed:
            why = (
                "the loss needs the batch in one part" if engine.chooser.needs_whole_batch
                else "not with the axes that --mesh fixes" if engine.request.mesh else family.without
            )
            found.append(Baseline(name=family.name, step_time_s=None, feasible=False, summary=why))
            continue
        outcome = engine.search(allowed, even=True, deadline=deadline)
        if outcome.best is None:
            why = "the search stopped before it was tried" if outcome.timed_out else "does not fit in memory"
            found.append(Baseline(name=family.name, step_time_s=None, feasible=False, summary=why))
            continue
        found.append(Baseline(
            name=family.name, step_time_s=outcome.best.step_time_s, feasible=True,
            summary=outcome.best.candidate.summary,
        ))
    return tuple(found)
