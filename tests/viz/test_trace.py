"""The Chrome trace shows every event of the timeline at its time, on its rank's row."""

import json

import pytest

from autopar.simulate.timeline import ActionEvent, Breakdown, GroupTimeline, MemoryBytes, Timeline
from autopar.viz.trace import chrome_trace


def make_timeline() -> Timeline:
    memory = MemoryBytes(parameters=2**30, gradients=0, optimizer=0, activations=0, buffers=0)
    groups = tuple(GroupTimeline(stage=i, ranks=(2 * i, 2 * i + 1), types=("CPU", "CPU"), memory=memory, start_s=0,
                                 end_s=4, busy_s=2,
                                 memory_steps=((0, 2**29), (0.5, 2**30))) for i in range(2))
    spans = [(0, "gather", -1, 0, 0.5), (0, "F", 0, 0.5, 1.0), (0, "SEND_F", 0, 0.9, 1.0),
             (1, "F", 0, 1.0, 1.5), (1, "B", 0, 1.5, 2.5),
             (0, "B", 0, 2.5, 3.5), (0, "reduce", -1, 3.5, 3.75), (0, "optimizer", -1, 3.75, 4.0)]
    return Timeline(
        step_time_s=4.0, tokens_per_step=8, num_devices=4, model_flops=1, peak_flops=1, bubble_fraction=0.1,
        feasible=True, infeasible_reason=None, groups=groups,
        breakdown=Breakdown(compute=2, tp_comm=0, dp_comm=0.75, pp_comm=0, bubble=1, optimizer=0.25),
        events=tuple(ActionEvent(group=group, kind=kind, stage=group, micro_batch=batch, start_s=start, end_s=end)
                     for group, kind, batch, start, end in spans),
    )


def test_events_are_where_and_when_they_happen() -> None:
    trace = json.loads(json.dumps(chrome_trace(make_timeline())))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["pid"], event["name"], event["ts"], event["dur"]) for event in spans] == [
        (0, "gather parameters", 0.0, 5e5), (0, "forward 0", 5e5, 5e5),
        (0, "send activations 0", 9e5, pytest.approx(1e5)), (1, "forward 0", 1e6, 5e5),
        (1, "backward 0", 1.5e6, 1e6), (0, "backward 0", 2.5e6, 1e6), (0, "reduce gradients", 3.5e6, 2.5e5),
        (0, "optimizer", 3.75e6, 2.5e5),
    ]
    assert {event["tid"] for event in spans if event["cat"] == "communication"} == {1, 2}
    named = [(event["pid"], event["tid"], event["args"]["name"]) for event in trace["traceEvents"]
             if event["name"] == "thread_name"]
    assert (0, 2, "send activations of stage 0") in named


def test_memory_is_a_counter() -> None:
    counters = [event for event in chrome_trace(make_timeline())["traceEvents"] if event["ph"] == "C"]
    assert [(event["pid"], event["ts"], event["args"]) for event in counters] == [
        (0, 0, {"GiB": 0.5}), (0, 5e5, {"GiB": 1.0}), (1, 0, {"GiB": 0.5}), (1, 5e5, {"GiB": 1.0}),
    ]


def test_ranks_are_named_with_what_they_hold() -> None:
    names = [event["args"]["name"] for event in chrome_trace(make_timeline())["traceEvents"]
             if event["name"] == "process_name"]
    assert names == ["stage 0: 2 ranks from 0, 1.0 GiB, busy 50%", "stage 1: 2 ranks from 2, 1.0 GiB, busy 50%"]
