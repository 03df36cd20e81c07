"""The Plan: which devices run which blocks, and how, as an immutable value.

Ranks inside a stage are laid out with tp fastest, then dp_shard, then dp_replicate:
`stage.devices[(replicate * dp_shard + shard) * tp + t]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from autopar.sharding.strategy import ClassSharding


def is_layer(block: str) -> bool:
    """Whether the block of this name is a layer: not what comes before, between or after the layers."""
    return block not in ("prologue", "epilogue") and not block.startswith("glue")


class Recompute(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Schedule(StrEnum):
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of a stage's mesh axes. `cp` and `ep` are taken by `simulate` alone so far and are 1 in planned stages."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def size(self) -> int:
        return self.dp * self.tp * self.cp


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """blocks[first:last] of the model on `devices` (ranks), laid out by `mesh`.

    `virtual` is the stage's chunk number under an interleaved schedule (0 elsewhere): with p pipeline groups, stage i
    runs on group i % p as its chunk i // p.
    """

    first: int
    last: int
    devices: tuple[int, ...]
    mesh: Mesh
    zero: int
    recompute: Recompute
    virtual: int = 0
    peak_memory_bytes: float | None = field(default=None, compare=False)  # simulated, of its fullest device
    memory_limit_bytes: float | None = field(default=None, compare=False)  # usable on its smallest device


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """An expert's plan under the same cost model; `summary` says its settings.

    `step_time_s` is None where it fits no device's memory or needs what the cluster lacks, and `summary` says which.
    """

    name: str
    step_time_s: float | None
    feasible: bool
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the search proved: no plan of the searched space is faster than `lower_bound_s` in the cost model."""

    upper_bound_s: float
    lower_bound_s: float
    searched: str
    not_searched: tuple[str, ...] = ()
    search_seconds: float = field(default=0.0, compare=False)
    stopped_early: bool = False

    @property
    def gap(self) -> float:
        return self.upper_bound_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan. `micro_batch` is in rows of one data-parallel replica;
    global_batch = micro_batch * num_micro_batches * dp.

    `shardings` holds the tensor-axis choice of each block class (and of the class of `graph.shared`, always replicated
    and left out); it is empty where tp is 1 in every stage. `dtype` is the compute dtype; parameters rest in
    `param_dtype`. `blocks` names the model's chain, so that a plan can be shown without its model.
    """

    model_name: str
    model_fingerprint: str
    cluster_name: str
    cluster_fingerprint: str
    num_devices: int
    global_batch: int
    seq_len: int | None
    dtype: str
    param_dtype: str
    optimizer: str
    micro_batch: int
    num_micro_batches: int
    schedule: Schedule
    sequence_parallel: bool
    stages: tuple[Stage, ...]
    shardings: tuple[ClassSharding, ...] = ()
    compile: bool = False
    certificate: Certificate | None = None
    baselines: tuple[Baseline, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @cached_property
    def sharding(self) -> dict[str, ClassSharding]:
        return {choice.cls: choice for choice in self.shardings}

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def layers(self, stage: Stage) -> tuple[int, int]:
        """The layers of a stage as (first, last + 1), counted over layers alone: embedding and head are none."""
        return (sum(map(is_layer, self.blocks[: stage.first])), sum(map(is_layer, self.blocks[: stage.last])))

    def save(self, path: str | Path) -> None:
        """Write the plan file; see autopar.plan.file."""
        from autopar.plan.file import save_plan

        save_plan(self, path)

    def __str__(self) -> str:
        from autopar.plan.text import plan_text

        return plan_text(self)
