"""Stages of unlike meshes that feed one another, against one process: numbers, and the bytes over each boundary.

    python tests/benchmarks/bench_unlike_stages.py

2x2 devices feed 1x2, which feed 3x1 (data x tensor axis): nine gloo processes. Each micro-batch of GPT-2 is split and
joined at the boundaries, with equal and with unequal shares of rows, under several schedules. The bytes are those that
the ranks' programs send; the least is what the receiving ranks need, each element once.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import runtime_models
from staged_plans import Layout, staged_plan

from autopar.plan.plan import Mesh, Plan, Schedule
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, compare
from autopar.runtime.regions import crossings

BYTES = 8  # of a float64
WIDE, NARROW, FLAT = Mesh(dp_replicate=2, tp=2), Mesh(tp=2), Mesh(dp_replicate=3)
LAYOUTS = {
    "equal shares": [Layout(blocks=2, mesh=WIDE), Layout(blocks=1, mesh=NARROW), Layout(blocks=1, mesh=FLAT)],
    "unequal shares": [
        Layout(blocks=2, mesh=WIDE, rows=(4, 2)), Layout(blocks=1, mesh=NARROW),
        Layout(blocks=1, mesh=FLAT, rows=(1, 3, 2))],
    "sequence parallel, sharded": [
        Layout(blocks=2, mesh=Mesh(dp_shard=2, tp=2), zero=2, sequence_parallel=True),
        Layout(blocks=1, mesh=NARROW, sequence_parallel=True), Layout(blocks=1, mesh=Mesh(dp_shard=3), zero=3)],
}
SCHEDULES = (Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.ZERO_BUBBLE)


def sent_bytes(plan: Plan, graph: object, boundary: int) -> tuple[int, int]:
    """What a micro-batch's activations take over a boundary, and the least that they could."""
    one, two = plan.stages[boundary : boundary + 2]
    sent = sum(
        math.prod(piece.shape) * BYTES for rank in one.devices
        for crossing in crossings(graph, plan, boundary, rank) for piece in crossing.activations  # type: ignore[arg-type]
    )
    least = sum(
        math.prod(crossing.shape) * BYTES for rank in two.devices
        for crossing in crossings(graph, plan, boundary, rank) if crossing.activations  # type: ignore[arg-type]
    )
    return sent, least


def main() -> None:
    warnings.simplefilter("ignore")
    captured = capture_for(runtime_models.gpt2, "float64")
    failed = False
    print(f"{'2x2 -> 1x2 -> 3x1':<28} {'schedule':<8} {'loss':>8} {'gradient':>9}  bytes sent (least) a boundary")
    with LocalPool(9) as pool:
        for name, layouts in LAYOUTS.items():
            for schedule in SCHEDULES:
                plan = staged_plan(
                    captured.graph, layouts, global_batch=24, num_micro_batches=4, schedule=schedule)
                report = compare(runtime_models.gpt2, plan, steps=3, pool=pool, captured=captured)
                failed |= not report.passed
                over = [sent_bytes(plan, captured.graph, boundary) for boundary in (0, 1)]
                failed |= any(sent != least for sent, least in over)
                words = ", ".join(f"{sent} ({least})" for sent, least in over)
                print(f"{name:<28} {schedule:<8} {report.loss_error:8.1e} {report.worst[1]:9.1e}  {words}", flush=True)
    print("failed" if failed else "all equal to one process, with the fewest bytes")
    sys.exit(failed)


if __name__ == "__main__":
    main()
