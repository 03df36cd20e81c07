"""A run of the drawn plan, made up from its prediction."""

from typing import Any

from drawn_page import Drawn

from autopar.plan.file import load_plan
from autopar.runtime.recording import Span, trace_json

SLOWER = 3.0
KINDS = ("F", "B", "I", "W", "optimizer")


def slower_run(drawn: Drawn) -> dict[str, Any]:
    """A trace of two steps in which everything takes three times as long as predicted, in the first step six times."""
    plan, timeline = load_plan(drawn.plan), drawn.picture["timeline"]
    kinds, spans = timeline["kinds"], []
    rank_row = {rank: row for row, stage in zip(timeline["rows"], plan.stages, strict=True) for rank in stage.devices}
    for rank in range(plan.num_devices):
        own = []
        for step, factor in ((0, 2 * SLOWER), (1, SLOWER)):
            own += [
                Span(step=step, kind=kinds[kind], stage=stage, micro_batch=batch, begin_s=start * factor,
                     end_s=end * factor)
                for kind, stage, batch, start, end in rank_row[rank]["events"] if kinds[kind] in KINDS
            ]
        spans.append(own)
    return trace_json(spans, plan, "cuda", "AdamW")
