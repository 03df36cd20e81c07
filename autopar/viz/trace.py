"""A Timeline as a Chrome trace: rows for each kind of device, to open in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from typing import Any

from autopar.simulate.timeline import COLLECTIVES, MESSAGES, ActionEvent, GroupTimeline, Timeline

NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights",
         "gather": "gather parameters", "reduce": "reduce gradients", "optimizer": "optimizer",
         "SEND_F": "send activations", "SEND_B": "send gradients"}
# Names of the trace viewers' own palette, so that forwards, backwards and communication differ at a glance.
COLOURS = {"F": "thread_state_running", "B": "rail_response", "I": "rail_response", "W": "rail_animation",
           "gather": "thread_state_iowait", "reduce": "thread_state_iowait", "optimizer": "good",
           "SEND_F": "thread_state_runnable", "SEND_B": "thread_state_runnable"}
COMPUTE_ROW, COMMUNICATION_ROW, FIRST_LINK_ROW = 0, 1, 2


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace's JSON object: times in microseconds; each group of like devices is a process.

    It has a row of computations, one of collectives, one for each link that leaves it, and a counter of the bytes that
    a device holds. What it holds at most and how busy it is stands in its name.
    """
    events: list[dict[str, Any]] = []
    rows = _link_rows(timeline)
    for index, group in enumerate(timeline.groups):
        events += _names(index, group, timeline.step_time_s, rows)
    events += [_span(event, rows) for event in timeline.events]
    for index, group in enumerate(timeline.groups):
        events += _memory(index, group)
    return {
        "traceEvents": events, "displayTimeUnit": "ms",
        "otherData": {"step_time_s": timeline.step_time_s, "num_devices": timeline.num_devices,
                      "feasible": timeline.feasible, "notes": list(timeline.notes),
                      "critical_group": timeline.critical},
    }


def _link_rows(timeline: Timeline) -> dict[tuple[int, str, int], int]:
    """The row of each link that carries messages, by group, direction and the stage that it leaves."""
    links = sorted({(e.group, e.kind, e.stage) for e in timeline.events if e.kind in MESSAGES})
    found: dict[tuple[int, str, int], int] = {}
    for group, kind, stage in links:
        before = sum(1 for other in found if other[0] == group)
        found[group, kind, stage] = FIRST_LINK_ROW + before
    return found


def _names(
    index: int, group: GroupTimeline, step_time_s: float, links: dict[tuple[int, str, int], int]
) -> list[dict[str, Any]]:
    ranks = f"rank {group.ranks[0]}" if len(group.ranks) == 1 else f"{len(group.ranks)} ranks from {group.ranks[0]}"
    title = f"stage {group.stage}: {ranks}, {group.memory.total / 2**30:.1f} GiB, busy {group.busy_s / step_time_s:.0%}"
    rows = {COMPUTE_ROW: "compute", COMMUNICATION_ROW: "communication"}
    rows |= {row: f"{NAMES[kind]} of stage {stage}" for (own, kind, stage), row in links.items() if own == index}
    return [
        {"ph": "M", "name": "process_name", "pid": index, "args": {"name": title}},
        {"ph": "M", "name": "process_sort_index", "pid": index, "args": {"sort_index": index}},
        *({"ph": "M", "name": "thread_name", "pid": index, "tid": row, "args": {"name": name}}
          for row, name in rows.items()),
    ]


def _span(event: ActionEvent, links: dict[tuple[int, str, int], int]) -> dict[str, Any]:
    if event.kind in MESSAGES:
        row = links[event.group, event.kind, event.stage]
    else:
        row = COMMUNICATION_ROW if event.kind in COLLECTIVES else COMPUTE_ROW
    arguments: dict[str, Any] = {"stage": event.stage}
    name = NAMES[event.kind]
    if event.micro_batch >= 0:
        arguments["micro_batch"] = event.micro_batch
        name = f"{name} {event.micro_batch}"
    return {
        "ph": "X", "name": name, "cat": "compute" if row == COMPUTE_ROW else "communication", "pid": event.group,
        "tid": row, "ts": event.start_s * 1e6, "dur": (event.end_s - event.start_s) * 1e6,
        "cname": COLOURS[event.kind], "args": arguments,
    }


def _memory(index: int, group: GroupTimeline) -> list[dict[str, Any]]:
    return [
        {"ph": "C", "name": "memory", "pid": index, "tid": 0, "ts": time * 1e6, "args": {"GiB": size / 2**30}}
        for time, size in group.memory_steps
    ]
