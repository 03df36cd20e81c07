"""A run's trace laid over the predicted timeline, as plain JSON values for the page and the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autopar.errors import InputError

_AGAIN = "record one with `with trainer.trace(PATH):` or `autopar verify ... --trace PATH`"
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]
WAITS = ("WAIT_F", "WAIT_B")
_SHOWN = {"F": "forward of a micro-batch", "B": "backward of a micro-batch", "I": "backward of inputs",
          "W": "backward of weights", "optimizer": "optimizer"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Arguments(_Record):
    kind: str
    stage: Annotated[int, Field(ge=0)]
    micro_batch: Annotated[int, Field(ge=-1)]
    step: Annotated[int, Field(ge=0)]


class _Event(_Record):
    pid: Annotated[int, Field(ge=0)]
    ts: _Seconds
    dur: _Seconds
    args: _Arguments


class _Header(_Record):
    format: Literal["autopar-trace"]
    version: Literal[1]
    model: str
    num_ranks: _Count
    num_stages: _Count
    num_micro_batches: _Count
    global_batch: _Count
    dtype: str
    device: str
    optimizer: str
    step_starts_s: tuple[_Seconds, ...]
    step_times_s: Annotated[tuple[_Seconds, ...], Field(min_length=1)]


class Trace(_Record):
    """A recorded run."""

    header: _Header
    events: tuple[_Event, ...]


def load_trace(path: Path) -> Trace:
    """The trace that a run wrote; InputError, in one line, for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a trace, or cut off; {_AGAIN}") from None
    header = data.get("otherData") if isinstance(data, dict) else None
    if not isinstance(header, dict) or header.get("format") != "autopar-trace":
        raise InputError(f"{path}: not the trace of a run (`simulate --trace` writes a prediction's); {_AGAIN}")
    if header.get("version") != 1:
        raise InputError(f"{path}: a trace of version {header.get('version')!r}, this autopar reads 1")
    try:
        spans = [event for event in data["traceEvents"] if event["ph"] == "X"]
        trace = Trace.model_validate({"header": header, "events": spans})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: not a whole trace ({where}: {first['msg']}); {_AGAIN}") from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: its traceEvents are no list of events; {_AGAIN}") from None
    ranks, steps = trace.header.num_ranks, len(trace.header.step_times_s)
    if len(trace.header.step_starts_s) != steps or any(e.pid >= ranks or e.args.step >= steps for e in trace.events):
        raise InputError(f"{path}: its events are of ranks or steps that it does not have; {_AGAIN}")
    return trace


def live(picture: Mapping[str, Any], trace: Trace, *, name: str) -> dict[str, Any]:
    """The run beside the prediction of a plan's picture.

    `rows` go in pairs: what was predicted for the devices of a pipeline rank, and what the one of them that worked
    longest did, in the step of median length (the first one, in which memory is still being allocated, is left out
    where there are others). InputError where the run was of another plan.
    """
    _check(picture, trace, name)
    times = trace.header.step_times_s
    candidates = range(1, len(times)) if len(times) > 1 else range(1)
    step = sorted(candidates, key=lambda i: times[i])[(len(candidates) - 1) // 2]
    start_s = trace.header.step_starts_s[step]
    timeline = picture["timeline"]
    kinds: list[str] = list(timeline["kinds"])
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for row in timeline["rows"]:
        ranks = _numbers(row["ranks"])
        own = {rank: [e for e in trace.events if e.pid == rank and e.args.step == step] for rank in ranks}
        busy = {rank: sum(e.dur for e in events if e.args.kind not in WAITS) / 1e6 for rank, events in own.items()}
        shown = max(ranks, key=lambda rank: (busy[rank], -rank))
        events = []
        for event in own[shown]:
            if event.args.kind not in kinds:
                kinds.append(event.args.kind)
            begin = max(0.0, event.ts / 1e6 - start_s)
            events.append([kinds.index(event.args.kind), event.args.stage, event.args.micro_batch, begin,
                           begin + event.dur / 1e6])
        rows += [
            {**_row(row, f"stage {row['stage']}", "predicted"), "events": row["events"],
             "end_s": timeline["step_time_s"]},
            {**_row(row, f"rank {shown}", "measured"), "events": events, "end_s": times[step]},
        ]
        table += _differences(row, timeline["kinds"], [e for events in own.values() for e in events], busy)
    table.append({"stage": None, "what": "the whole step", "predicted_s": timeline["step_time_s"],
                  "measured_s": times[step]})
    return {
        "name": name, "device": trace.header.device, "optimizer": trace.header.optimizer, "step": step,
        "step_times_s": list(times), "measured_s": times[step], "predicted_s": timeline["step_time_s"],
        "table": table, "notes": _notes(picture, trace),
        "timeline": {"step_time_s": max(times[step], timeline["step_time_s"]), "kinds": kinds, "rows": rows},
    }


def _check(picture: Mapping[str, Any], trace: Trace, name: str) -> None:
    header, settings = trace.header, picture["settings"]
    for what, run, planned in (
        ("model", header.model, picture["model"]), ("ranks", header.num_ranks, settings["devices"]),
        ("stages", header.num_stages, len(picture["stages"])),
        ("micro-batches", header.num_micro_batches, settings["num_micro_batches"]),
        ("global batch", header.global_batch, settings["global_batch"]),
    ):
        if run != planned:
            raise InputError(f"{name}: the run was of another plan: its {what}: {run}, the plan's: {planned}")


def _notes(picture: Mapping[str, Any], trace: Trace) -> list[str]:
    found = ["a measured forward or backward contains the collectives that run inside it; those of the prediction that "
             "go on beside it are drawn below it, and counted in \"all work\""]
    if trace.header.dtype != picture["settings"]["dtype"]:
        found.append(f"the run computed in {trace.header.dtype}, the prediction is for {picture['settings']['dtype']}")
    if trace.header.optimizer.lower() != picture["settings"]["optimizer"]:
        found.append(f"the run's optimizer was {trace.header.optimizer}, the prediction is for "
                     f"{picture['settings']['optimizer']}")
    types = {kind for row in picture["timeline"]["rows"] for kind in row["types"]}
    if trace.header.device == "cpu" and types != {"CPU"}:
        found.append(f"the run was on CPU processes, the prediction is for {', '.join(sorted(types))}: compare their "
                     "order, not their times")
    return found


def _row(row: Mapping[str, Any], label: str, words: str) -> dict[str, Any]:
    return {"stage": row["stage"], "num_devices": row["num_devices"], "label": label, "words": words}


def _differences(
    row: Mapping[str, Any], kinds: Sequence[str], events: Sequence[_Event], busy: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Predicted and measured seconds of each kind of action of one pipeline rank's devices, medians over actions."""
    found = []
    for kind, words in _SHOWN.items():
        predicted = [event[4] - event[3] for event in row["events"] if kinds[event[0]] == kind]
        measured = [event.dur / 1e6 for event in events if event.args.kind == kind]
        if predicted or measured:
            found.append({
                "stage": row["stage"], "what": words,
                "predicted_s": median(predicted) if predicted else None,
                "measured_s": median(measured) if measured else None,
            })
    return [*found, {"stage": row["stage"], "what": "all work of a step", "predicted_s": row["busy_s"],
                     "measured_s": max(busy.values())}]


def _numbers(ranges: str) -> list[int]:
    """The numbers of "0-3,8"."""
    found: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
