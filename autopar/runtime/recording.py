"""What a rank does in its steps and when, and all ranks' records as one Chrome trace."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.files import write_text
from autopar.plan.plan import Plan

FORMAT, VERSION = "autopar-trace", 1
# What is recorded beside the kinds of actions: waiting for tensors of other stages, the optimizer, what sums gradients
# after the last backward.
WAIT_FORWARD, WAIT_BACKWARD, OPTIMIZER, REDUCE = "WAIT_F", "WAIT_B", "optimizer", "reduce"
_NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights",
          WAIT_FORWARD: "wait for activations", WAIT_BACKWARD: "wait for gradients", REDUCE: "reduce gradients"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From `begin_s` to `end_s` after the start of step number `step`; without a micro-batch, it is -1."""

    step: int
    kind: str
    stage: int
    micro_batch: int
    begin_s: float
    end_s: float


class _Open:
    """A span that has not ended."""

    def __init__(self, begin: Any) -> None:
        self.begin = begin


class Recorder:
    """Records this rank's spans. On CUDA they are timed on the device, by events in the current stream.

    Every step starts at a barrier of all ranks, from which its times are counted: ranks may have clocks of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step = -1
        self._start: Any = None
        self._taken: list[tuple[str, int, int, Any, Any]] = []
        self._open: list[_Open] = []
        self._spans: list[Span] = []

    def begin_step(self) -> None:
        """A new step, on all ranks at once."""
        self._settle()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        self.step += 1
        self._start = self._now()

    @contextmanager
    def span(self, kind: str, stage: int, micro_batch: int = -1) -> Iterator[None]:
        """Records the block. A span that begins with others inside (it waits first) counts from their end."""
        opened = _Open(self._now())
        self._open.append(opened)
        yield
        self._open.pop()
        end = self._now()
        if self._open:
            self._open[-1].begin = end
        self._taken.append((kind, stage, micro_batch, opened.begin, end))

    def spans(self) -> tuple[Span, ...]:
        """All spans so far, in the order of their ends."""
        self._settle()
        return tuple(self._spans)

    def _settle(self) -> None:
        """Turn the step's events into seconds."""
        if self._taken and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for kind, stage, micro_batch, begin, end in self._taken:
            self._spans.append(Span(step=self.step, kind=kind, stage=stage, micro_batch=micro_batch,
                                    begin_s=self._since_start(begin), end_s=self._since_start(end)))
        self._taken.clear()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _since_start(self, at: Any) -> float:
        if self.device.type != "cuda":
            return float(at - self._start)
        return float(self._start.elapsed_time(at)) / 1e3


def write_trace(recorder: Recorder, plan: Plan, path: str | Path, *, optimizer: str) -> None:
    """Rank 0 writes the spans of all ranks, which must all call it, as one Chrome trace."""
    own = recorder.spans()
    found: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_text(path, json.dumps(trace_json(found, plan, recorder.device.type, optimizer)))


def trace_json(spans: Sequence[Sequence[Span]], plan: Plan, device_type: str, optimizer: str) -> dict[str, Any]:
    """The Chrome trace of each rank's spans, steps one after the other; times in microseconds."""
    num_steps = 1 + max((span.step for own in spans for span in own), default=-1)
    lengths = [max((s.end_s for own in spans for s in own if s.step == step), default=0.0) for step in range(num_steps)]
    starts = [sum(lengths[:step]) for step in range(num_steps)]
    stage_of = {rank: i for i, stage in reversed(tuple(enumerate(plan.stages))) for rank in stage.devices}
    events: list[dict[str, Any]] = []
    for rank, own in enumerate(spans):
        events.append({"ph": "M", "name": "process_name", "pid": rank,
                       "args": {"name": f"rank {rank}, stage {stage_of.get(rank, '-')}"}})
        for s in own:
            name = _NAMES.get(s.kind, s.kind) + (f" {s.micro_batch}" if s.micro_batch >= 0 else "")
            waits = s.kind in (WAIT_FORWARD, WAIT_BACKWARD)
            events.append({
                "ph": "X", "name": name, "cat": "wait" if waits else "compute", "pid": rank, "tid": 0,
                "ts": (starts[s.step] + s.begin_s) * 1e6, "dur": (s.end_s - s.begin_s) * 1e6,
                "args": {"kind": s.kind, "stage": s.stage, "micro_batch": s.micro_batch, "step": s.step},
            })
    return {
        "traceEvents": events, "displayTimeUnit": "ms",
        "otherData": {
            "format": FORMAT, "version": VERSION, "model": plan.model_name, "num_ranks": len(spans),
            "num_stages": plan.num_stages, "num_micro_batches": plan.num_micro_batches,
            "global_batch": plan.global_batch, "dtype": plan.dtype, "device": device_type,
            "optimizer": optimizer,
            "step_starts_s": starts, "step_times_s": lengths,
        },
    }
