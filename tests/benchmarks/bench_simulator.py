"""How fast the simulator executes schedules, and how near the closed form is.

Run: python tests/benchmarks/bench_simulator.py
The first table: events (computations and messages) a second, best of some runs. The second: 200 random pipelines of
each schedule, whose stages and links differ by up to a factor of two.
"""

from __future__ import annotations

import random
import time

from rich.console import Console
from rich.table import Table

from autopar.plan.plan import Schedule
from autopar.simulate.closed_form import closed_form_s
from autopar.simulate.events import StageTimes, execute
from autopar.simulate.schedules import schedule_actions

STAGE = StageTimes(
    forward_s=1.0, backward_s=2.0, input_backward_s=1.0, weight_backward_s=1.0, send_forward_s=0.1,
    send_backward_s=0.1,
)


def speed(ranks: int, micro_batches: int, runs: int = 5) -> Table:
    title = f"{ranks} ranks, {micro_batches} micro-batches"
    table = Table("schedule", "chunks", "events", "best s", "events/s", title=title)
    for name in Schedule:
        chunks = 4 if name is Schedule.INTERLEAVED else 1
        lists = schedule_actions(name, ranks, micro_batches, chunks)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            run = execute(lists, [STAGE] * (ranks * chunks))
            times.append(time.perf_counter() - start)
        events = sum(map(len, run.lists)) + sum(map(len, run.sent))
        table.add_row(str(name), str(chunks), str(events), f"{min(times):.3f}", f"{events / min(times):,.0f}")
    return table


def closeness(number: int = 200) -> Table:
    table = Table("schedule", "exact", "mean below", "most below", title="closed form against execution")
    draw = random.Random(0)
    for name in Schedule:
        chunks = 2 if name is Schedule.INTERLEAVED else 1
        below = []
        for _ in range(number):
            p = draw.randint(2, 8)
            m = p * draw.randint(1, 8)
            stages = [
                StageTimes(
                    forward_s=draw.uniform(1, 2), backward_s=draw.uniform(2, 4), input_backward_s=draw.uniform(1, 2),
                    weight_backward_s=draw.uniform(1, 2), send_forward_s=draw.uniform(0, 0.5),
                    send_backward_s=draw.uniform(0, 0.5),
                ) for _ in range(p * chunks)
            ]
            exact = execute(schedule_actions(name, p, m, chunks), stages).end_s
            below.append(1 - closed_form_s(name, stages, m, num_chunks=chunks) / exact)
        same = sum(gap < 1e-9 for gap in below)
        table.add_row(str(name), f"{same} of {number}", f"{sum(below) / number:.2%}", f"{max(below):.1%}")
    return table


if __name__ == "__main__":
    console = Console()
    console.print(speed(16, 1024))
    console.print(closeness())
