"""The Timeline: what a simulated step takes on every device, as an immutable value with a file form."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from autopar.cost_models.memory import RESERVE_SHARE
from autopar.errors import InputError

GIB = 2**30
VERSION = 2

MAX_DRAWN = 20_000  # events of a step that a picture of it has


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where the step time of the critical device goes; the parts sum to it. Hidden communication is left out."""

    compute: float
    tp_comm: float
    dp_comm: float
    pp_comm: float
    bubble: float
    optimizer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBytes:
    """The parts of one device's peak; they sum to it."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def reserved(self) -> float:
        """What the caching allocator has taken from the device at the peak: `total` is what is allocated of it."""
        return self.total + RESERVE_SHARE * (self.activations + self.buffers)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTimeline:
    """Devices that are alike: of one pipeline rank and one type, with as many rows. One of them stands for all.

    `memory_steps`: bytes that it holds, as (time_s, bytes from then on); `memory` says of what the peak is made.
    """

    stage: int  # pipeline rank; its first stage
    ranks: tuple[int, ...]
    types: tuple[str, ...]  # parallel to ranks
    memory: MemoryBytes
    start_s: float  # of the first action
    end_s: float  # of the optimizer step
    busy_s: float  # computing, and waiting for its own stage's communication
    memory_steps: tuple[tuple[float, float], ...] = ()


# Kinds of events that happen beside the computation: on the communication stream, and on the links between stages.
COLLECTIVES, MESSAGES = ("gather", "reduce"), ("SEND_F", "SEND_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionEvent:
    """One action of a group of devices.

    `kind`: F, B, I, W on the compute stream, as is "optimizer"; "gather" and "reduce" on the communication stream;
    SEND_F and SEND_B on the links to the next stage and to the one before. Without a micro-batch, it is -1.
    """

    group: int  # in Timeline.groups
    kind: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A simulated training step. `report()` gives the keys that `simulate --json` prints.

    `breakdown` and `bubble_fraction` are of the critical device, the one that works longest: `groups[critical]`.
    """

    step_time_s: float
    tokens_per_step: float
    num_devices: int
    model_flops: float  # of one step: three times the captured forward's, without recomputation
    peak_flops: float  # of all devices in the compute dtype
    bubble_fraction: float
    feasible: bool
    infeasible_reason: str | None
    breakdown: Breakdown
    groups: tuple[GroupTimeline, ...]
    events: tuple[ActionEvent, ...]
    notes: tuple[str, ...] = ()
    critical: int = 0

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens_per_step / self.step_time_s / self.num_devices

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's own FLOPs a second over the peak of all devices."""
        return self.model_flops / self.step_time_s / self.peak_flops

    @cached_property
    def peak_memory_bytes(self) -> float:
        return max(group.memory.total for group in self.groups)

    @cached_property
    def rank_peak_bytes(self) -> tuple[float, ...]:
        """What the fullest device of each pipeline rank holds at its peak."""
        fullest: dict[int, float] = {}
        for group in self.groups:
            fullest[group.stage] = max(fullest.get(group.stage, 0.0), group.memory.total)
        return tuple(fullest[rank] for rank in sorted(fullest))

    def report(self) -> dict[str, Any]:
        """Plain values for JSON, one entry in `devices` for each rank."""
        devices: list[dict[str, Any]] = []
        for group in self.groups:
            memory = {field.name: getattr(group.memory, field.name) / GIB for field in fields(MemoryBytes)}
            peak = group.memory.total / GIB
            devices += [
                {"rank": rank, "type": kind, "stage": group.stage, "peak_memory_gib": peak,
                 "reserved_memory_gib": group.memory.reserved / GIB, "memory_gib": memory}
                for rank, kind in zip(group.ranks, group.types, strict=True)
            ]
        devices.sort(key=lambda device: int(device["rank"]))
        return {
            "step_time_s": self.step_time_s,
            "tokens_per_s_per_device": self.tokens_per_s_per_device,
            "mfu": self.mfu,
            "bubble_fraction": self.bubble_fraction,
            "feasible": self.feasible,
            "infeasible_reason": self.infeasible_reason,
            "breakdown_s": asdict(self.breakdown),
            "critical_rank": self.groups[self.critical].ranks[0],
            "devices": devices,
            "notes": list(self.notes),
        }


def timeline_to_json(timeline: Timeline) -> str:
    """The timeline as versioned JSON."""
    return json.dumps({"format": "autopar-timeline", "version": VERSION, **asdict(timeline)})


def timeline_from_json(text: str) -> Timeline:
    """The timeline that `timeline_to_json` wrote; InputError for anything else."""
    try:
        data = json.loads(text)
        if data["format"] != "autopar-timeline" or data["version"] != VERSION:
            raise InputError(f"not a timeline of version {VERSION}: write it again with this version of autopar")
        del data["format"], data["version"]
        return Timeline(**{
            **data,
            "breakdown": Breakdown(**data["breakdown"]),
            "groups": tuple(
                GroupTimeline(**{
                    **group, "ranks": tuple(group["ranks"]), "types": tuple(group["types"]),
                    "memory": MemoryBytes(**group["memory"]),
                    "memory_steps": tuple((time, size) for time, size in group["memory_steps"]),
                })
                for group in data["groups"]
            ),
            "events": tuple(ActionEvent(**event) for event in data["events"]),
            "notes": tuple(data["notes"]),
        })
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"not a timeline file ({type(error).__name__}: {error})") from error


def drawn(num_groups: int, critical: int, num_actions: int, max_events: int | None) -> set[int]:
    """The groups whose events are kept: all, or where there are too many some in even steps, the critical one too.

    `num_actions`: forwards and backwards of all stages, each of which sends a message.
    """
    num_events = 2 * num_actions
    if max_events is None or num_events <= max_events:
        return set(range(num_groups))
    every = min(num_groups, -(-num_events // max_events))
    return {*range(0, num_groups, every), num_groups - 1, critical}
