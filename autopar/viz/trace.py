"""A Timeline as a Chrome trace: a row for each pipeline rank, to open in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from typing import Any

from autopar.simulate.timeline import ActionEvent, GroupTimeline, Timeline

NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights",
         "gather": "gather parameters", "reduce": "reduce gradients", "optimizer": "optimizer"}
COMMUNICATION = ("gather", "reduce")
# Names of the trace viewers' own palette, so that forwards, backwards and communication differ at a glance.
COLOURS = {"F": "thread_state_running", "B": "rail_response", "I": "rail_response", "W": "rail_animation",
           "gather": "thread_state_iowait", "reduce": "thread_state_iowait", "optimizer": "good"}
COMPUTE_ROW, COMMUNICATION_ROW = 0, 1


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace's JSON object: times in microseconds; what a rank holds and how busy it is stands in its name."""
    events: list[dict[str, Any]] = []
    for group in timeline.groups:
        events += _names(group, timeline.step_time_s)
    events += [_span(event) for event in timeline.events]
    return {
        "traceEvents": events, "displayTimeUnit": "ms",
        "otherData": {"step_time_s": timeline.step_time_s, "num_devices": timeline.num_devices,
                      "feasible": timeline.feasible, "notes": list(timeline.notes)},
    }


def _names(group: GroupTimeline, step_time_s: float) -> list[dict[str, Any]]:
    ranks = f"rank {group.ranks[0]}" if len(group.ranks) == 1 else f"{len(group.ranks)} ranks from {group.ranks[0]}"
    title = f"stage {group.stage}: {ranks}, {group.memory.total / 2**30:.1f} GiB, busy {group.busy_s / step_time_s:.0%}"
    rows = {COMPUTE_ROW: "compute", COMMUNICATION_ROW: "communication"}
    return [
        {"ph": "M", "name": "process_name", "pid": group.stage, "args": {"name": title}},
        {"ph": "M", "name": "process_sort_index", "pid": group.stage, "args": {"sort_index": group.stage}},
        *({"ph": "M", "name": "thread_name", "pid": group.stage, "tid": row, "args": {"name": name}}
          for row, name in rows.items()),
    ]


def _span(event: ActionEvent) -> dict[str, Any]:
    communication = event.kind in COMMUNICATION
    arguments: dict[str, Any] = {"stage": event.stage}
    name = NAMES[event.kind]
    if event.micro_batch >= 0:
        arguments["micro_batch"] = event.micro_batch
        name = f"{name} {event.micro_batch}"
    return {
        "ph": "X", "name": name, "cat": "communication" if communication else "compute", "pid": event.group,
        "tid": COMMUNICATION_ROW if communication else COMPUTE_ROW, "ts": event.start_s * 1e6,
        "dur": (event.end_s - event.start_s) * 1e6, "cname": COLOURS[event.kind], "args": arguments,
    }
