"""The Plan: which devices run which blocks, and how, as an immutable value.

Ranks inside a stage are laid out with tp fastest, then cp, dp_shard and dp_replicate:
`stage.devices[((replicate * dp_shard + shard) * cp + c) * tp + t]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from autopar.plan.coverage import Coverage
from autopar.sharding.rewrite import Rewrite
from autopar.sharding.strategy import ClassSharding

MOST_ROWS = 1 << 24  # of a global batch; what has more is a count of tokens, and would be planned for minutes


def is_layer(block: str) -> bool:
    """Whether the block of this name is a layer: not what comes before, between or after the layers."""
    return block not in ("prologue", "epilogue") and not block.startswith("glue")


class Recompute(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the activations of one layer get from its forward to its backward.

    `recompute` says what is kept: all of it, all but the attention core's, or the layer's inputs alone. `offload` sends
    what is kept to host memory and fetches it back for the backward.
    """

    recompute: Recompute = Recompute.NONE
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.recompute}, offloaded" if self.offload else str(self.recompute)


MIXED = "mixed"


class Schedule(StrEnum):
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of a stage's mesh axes.

    The data axes, `dp_replicate` and `dp_shard`, split rows and are run around the blocks; the inner axes, `cp` and
    then `tp`, split the ops of the blocks. `cp` leaves parameters whole: its ranks share dp_shard's shards. `ep` adds
    no ranks: it is the innermost part of the data axes, whose ranks have the experts of a mixture between them and
    send each other tokens; other parameters are as without it.
    """

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

    @property
    def inner(self) -> tuple[tuple[str, int], ...]:
        """Names and sizes of the axes that split the blocks' ops and have more than one rank, outermost first."""
        return tuple((name, size) for name, size in (("cp", self.cp), ("tp", self.tp)) if size > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """blocks[first:last] of the model on `devices` (ranks), laid out by `mesh`.

    `virtual` is the stage's chunk number under an interleaved schedule (0 elsewhere): with p pipeline groups, stage i
    runs on group i % p as its chunk i // p.

    `recompute` holds for all layers where `variants` is empty; else `variants` says in the order of the layers how many
    of them take which variant. The planner puts those that keep least on the device first: a micro-batch's forward
    fills the first layers first and its backward empties them last. `offload_optimizer` keeps the optimizer's state in
    host memory and streams it through the device in the optimizer's step.

    `rows` says how many rows of a micro-batch each data rank gets, where they are not `Plan.micro_batch` each; a stage
    passes its micro-batch on whole, so that the sum is the same for all stages. `shardings` holds the choices for the
    block classes on this stage's inner axes where they are not `Plan.shardings`; like those they are written for
    `Plan.micro_batch` rows.
    """

    first: int
    last: int
    devices: tuple[int, ...]
    mesh: Mesh
    zero: int
    recompute: Recompute
    virtual: int = 0
    variants: tuple[tuple[Variant, int], ...] = ()
    offload_optimizer: bool = False
    rows: tuple[int, ...] = ()
    shardings: tuple[ClassSharding, ...] = ()
    peak_memory_bytes: float | None = field(default=None, compare=False)  # simulated, of its fullest device
    memory_limit_bytes: float | None = field(default=None, compare=False)  # usable on its smallest device

    def layer_variants(self, num_layers: int) -> tuple[Variant, ...]:
        """The variant of each of the stage's layers, in order."""
        if not self.variants:
            return (Variant(recompute=self.recompute),) * num_layers
        found = tuple(variant for variant, count in self.variants for _ in range(count))
        assert len(found) == num_layers, "verify_plan checks that the counts add up"
        return found

    def recompute_layers(self, num_layers: int) -> dict[str, int]:
        """How many layers recompute what, by none, selective and full."""
        counts = {str(word): 0 for word in Recompute}
        for variant in self.layer_variants(num_layers):
            counts[str(variant.recompute)] += 1
        return counts

    @property
    def recompute_word(self) -> str:
        """What all layers recompute, or "mixed"."""
        words = {variant.recompute for variant, _ in self.variants} or {self.recompute}
        return MIXED if len(words) > 1 else str(words.pop())

    @property
    def num_offloaded(self) -> int:
        """How many layers keep their activations in host memory."""
        return sum(count for variant, count in self.variants if variant.offload)

    def with_variants(self, variants: Sequence[Variant]) -> Stage:
        """The stage with these variants of its layers, in order."""
        runs: list[tuple[Variant, int]] = []
        for variant in variants:
            if runs and runs[-1][0] == variant:
                runs[-1] = (variant, runs[-1][1] + 1)
            else:
                runs.append((variant, 1))
        if not runs or (len(runs) == 1 and not runs[0][0].offload):
            return replace(self, recompute=runs[0][0].recompute if runs else self.recompute, variants=())
        return replace(self, recompute=Recompute.NONE, variants=tuple(runs))


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
    """What the search proved: no plan of the searched space is faster than `lower_bound_s` in the cost model.

    `order_bound_s`: in whatever order the plan's own stages run their micro-batches, they take no less; None where
    nothing is said of it.
    """

    upper_bound_s: float
    lower_bound_s: float
    searched: str
    not_searched: tuple[str, ...] = ()
    search_seconds: float = field(default=0.0, compare=False)
    stopped_early: bool = False
    order_bound_s: float | None = None

    @property
    def gap(self) -> float:
        return self.upper_bound_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan. `micro_batch` is in rows of one data-parallel replica;
    global_batch = micro_batch * num_micro_batches * dp, but for stages that share out their `rows` otherwise.

    `actions` holds each pipeline rank's own list of actions, a line of CSV a rank (see autopar.plan.actions); it is
    empty where the lists are those of `schedule`.

    `shardings` holds the choice on each inner axis of each block class (and of the class of `graph.shared`, always
    replicated and left out); it is empty where no stage has an inner axis. `dtype` is the compute dtype; parameters
    rest in `param_dtype`. `blocks` names the model's chain, so that a plan can be shown without its model. `rewrites`
    change the ops of its block classes, one after the other: `shardings` are of the classes as they are then, while
    `model_fingerprint` is the captured model's.
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
    coverage: Coverage | None = None
    rewrites: tuple[Rewrite, ...] = ()
    actions: tuple[str, ...] = ()

    @cached_property
    def sharding(self) -> dict[str, ClassSharding]:
        """The choice on the tensor axis, by class."""
        return {choice.cls: choice for choice in self.shardings if choice.axis == "tp"}

    @cached_property
    def _by_axis(self) -> dict[tuple[str, str], ClassSharding]:
        return {(choice.axis, choice.cls): choice for choice in self.shardings}

    def class_shardings(self, cls: str, stage: Stage) -> tuple[ClassSharding, ...]:
        """The class's choice on each of the stage's inner axes, outermost first; KeyError where one is missing.

        It is written for `micro_batch` rows (`sharding/rows.py` takes it to others).
        """
        known = {(choice.axis, choice.cls): choice for choice in stage.shardings} or self._by_axis
        return tuple(known[name, cls] for name, _ in stage.mesh.inner)

    def rows_of(self, stage: Stage) -> tuple[int, ...]:
        """How many rows of a micro-batch each of the stage's data ranks gets."""
        return stage.rows or (self.micro_batch,) * stage.mesh.dp

    @property
    def micro_batch_rows(self) -> int:
        """The rows of one micro-batch over all data ranks of a stage."""
        return self.global_batch // self.num_micro_batches

    def num_layers(self, stage: Stage) -> int:
        """How many blocks of a stage are layers; where the plan names no blocks, as many as its counts say."""
        if not self.blocks:
            return sum(count for _, count in stage.variants)
        return sum(map(is_layer, self.blocks[stage.first : stage.last]))

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
