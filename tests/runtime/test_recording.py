"""What a rank records of its steps: every action once, waiting told apart from work, and a trace of all ranks."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import runtime_models
import torch
from staged_plans import Layout, staged_plan
from test_parity import graph_of

from autopar.runtime.local import LocalPool
from autopar.runtime.parity import TRACED_STEPS, compare
from autopar.runtime.recording import Recorder


def test_a_span_that_waits_first_counts_from_the_end_of_the_wait() -> None:
    recorder = Recorder(torch.device("cpu"))
    recorder.begin_step()
    with recorder.span("B", 1, 0):
        with recorder.span("WAIT_B", 1, 0):
            time.sleep(0.002)
        time.sleep(0.001)
    wait, work = recorder.spans()
    assert (wait.kind, work.kind, work.stage, work.micro_batch, work.step) == ("WAIT_B", "B", 1, 0, 0)
    assert wait.begin_s + 0.002 <= wait.end_s == work.begin_s <= work.end_s - 0.001


def test_steps_count_from_their_own_start() -> None:
    recorder = Recorder(torch.device("cpu"))
    for _ in range(2):
        recorder.begin_step()
        with recorder.span("F", 0, 0):
            time.sleep(0.001)
    first, second = recorder.spans()
    assert (first.step, second.step) == (0, 1)
    assert second.begin_s < first.end_s


@pytest.mark.processes
def test_all_ranks_actions_are_in_the_trace(pool: LocalPool, tmp_path: Path) -> None:
    """Two stages, four micro-batches: each forward and backward once a step, and the numbers are still right."""
    path = tmp_path / "run.json"
    plan = staged_plan(graph_of("gpt2", "float64"), [Layout(blocks=2), Layout(blocks=2)], num_micro_batches=4)
    assert compare(runtime_models.gpt2, plan, pool=pool, trace=path).passed
    trace = json.loads(path.read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found = Counter((e["pid"], e["args"]["kind"], e["args"]["stage"], e["args"]["micro_batch"]) for e in spans)
    for rank in (0, 1):
        for batch in range(4):
            for kind in ("F", "B"):
                assert found[rank, kind, rank, batch] == TRACED_STEPS
        waits = found[rank, "WAIT_F" if rank else "WAIT_B", rank, 0]
        assert (waits, found[rank, "optimizer", rank, -1]) == (TRACED_STEPS, TRACED_STEPS)
    header = trace["otherData"]
    assert (header["num_ranks"], header["num_stages"], len(header["step_times_s"])) == (2, 2, TRACED_STEPS)
    ends = [max(e["ts"] + e["dur"] for e in spans if e["args"]["step"] == step) for step in range(TRACED_STEPS)]
    starts = [start * 1e6 for start in header["step_starts_s"]]
    assert all(end <= start + 1e-3 for end, start in zip(ends, starts[1:], strict=False))
