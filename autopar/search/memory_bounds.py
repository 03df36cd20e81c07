"""What stages hold in memory, by sort of range of blocks: what is left for activations, and what layers then add.

Every figure is at most what the simulator counts for the range, so that what does not fit here fits nowhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.memory import (
    StaticBytes,
    backward_bytes,
    reduction_bytes,
    static_bytes,
    step_temporary_bytes,
)
from autopar.search.block_table import BlockTable
from autopar.search.candidates import Candidate, PlanRequest
from autopar.search.elimination import Table
from autopar.search.single_bounds import SingleTables
from autopar.search.stage_kinds import StageKind
from autopar.search.variants import Weights, least_added, least_of_parts

Number = TypeVar("Number", np.float64, np.intp)
Room = tuple[Table, NDArray[np.bool_]]  # bytes left for activations, and whether all of them can be kept
GENEROUS = 1e-9  # relative; sums over ranges are rounded


class MemoryBounds:
    """Bytes of the stages of candidates of one request; `num_layers`: those of the whole chain."""

    def __init__(self, request: PlanRequest, num_layers: int) -> None:
        self._request, self._num_layers = request, num_layers
        self._statics: dict[tuple[int, int, bool], tuple[float, float, float, float]] = {}
        self._last_static: tuple[Candidate, BlockTable, tuple[Table, Table]] | None = None
        self._last_single: tuple[Candidate, BlockTable, SingleTables] | None = None

    def all_kept(self, c: Candidate, in_flight: NDArray[np.intp], blocks: BlockTable) -> Table:
        """By sort of range: bytes at the peak where all activations are kept."""
        if c.num_micro_batches == 1:
            single = self._single(c, blocks).all_kept(blocks)
            return np.broadcast_to(single, np.broadcast_shapes(in_flight.shape, single.shape))
        static, step = self._static_tables(c, blocks)
        held, beside = blocks.all_kept
        activations = np.maximum(in_flight * held + beside, self._with_reduction(c, blocks, held))
        return np.asarray(static + np.maximum(activations, step))

    def least(self, c: Candidate, in_flight: int, blocks: BlockTable) -> Table:
        """By sort of range: bytes at the peak with the variants that need least."""
        if c.num_micro_batches == 1:
            return self._single(c, blocks).least(blocks)
        static, step = self._static_tables(c, blocks)
        rest, beside, entry = blocks.beside_layers
        numbers = blocks.numbers
        least = np.maximum(
            in_flight * blocks.all_kept[0] + blocks.all_kept[1], self._with_reduction(c, blocks, blocks.all_kept[0])
        )
        for level in blocks.levels:
            held = rest + (entry if level.offload else 0.0)
            for number, options in zip(numbers, level.allowed, strict=True):
                fewest = min((option.held_bytes for option in options), default=np.inf)
                held = held + np.where(number > 0, number * fewest if options else np.inf, 0.0)
            need = in_flight * held + np.maximum(beside, level.extra_bytes)
            least = np.minimum(least, np.maximum(need, self._with_reduction(c, blocks, held)))
        return np.asarray(static + np.maximum(least, step))

    def room(self, c: Candidate, kind: StageKind, in_flight: NDArray[np.intp], blocks: BlockTable) -> Room:
        """For all ranges: bytes that are left for activations, and whether all of them can be kept.

        In steps of one micro-batch all memory is left: what else there is goes as activations come.
        """
        if c.num_micro_batches == 1:
            keeps_all = self.all_kept(c, in_flight, blocks) <= kind.memory_limit_bytes
            return np.full(keeps_all.shape, kind.memory_limit_bytes), keeps_all
        static, step = self._static_tables(c, blocks)
        left = np.where(static + step <= kind.memory_limit_bytes, kind.memory_limit_bytes - static, -np.inf)
        return left, self.all_kept(c, in_flight, blocks) <= kind.memory_limit_bytes

    def added(
        self, c: Candidate, in_flight: NDArray[np.intp], blocks: BlockTable, room: Room, weights: Weights,
        wanted: NDArray[np.bool_],
    ) -> Table:
        """For all ranges: the least seconds that variants add so that the range fits; infinite where it cannot.

        Also infinite where it adds any and is not wanted.
        """
        left, keeps_all = room
        added = np.where(keeps_all, 0.0, np.inf)
        open_ = ~keeps_all & np.isfinite(left) & wanted
        if not open_.any():
            return added
        if c.num_micro_batches == 1:
            limit = float(np.max(left)) * (1 + GENEROUS)
            added[open_] = self._single(c, blocks).added(blocks, open_.reshape(-1), limit, weights)
            return added

        def of_open(table: NDArray[Number]) -> NDArray[Number]:
            return np.broadcast_to(table, open_.shape)[open_]

        rest, beside, entry = (of_open(table) for table in blocks.beside_layers)
        in_flight, allowed = of_open(in_flight), of_open(left) * (1 + GENEROUS)
        beside = np.maximum(beside, allowed - in_flight * (allowed - of_open(self._reducing(c, blocks))))
        numbers = [of_open(number) for number in blocks.numbers]
        least = np.full(rest.shape, np.inf)
        for level in blocks.levels:
            held = (allowed - np.maximum(beside, level.extra_bytes)) / in_flight - rest
            least = np.minimum(least, least_added(level, numbers, held - entry if level.offload else held, weights))
        added[open_] = least
        return added

    def added_by_depth(self, c: Candidate, kind: StageKind, depths: NDArray[np.intp], blocks: BlockTable) -> Table:
        """[depth, sort of range]: seconds that variants add at least to a backward with so many in flight.

        Infinite where they do not fit. For steps of several micro-batches.
        """
        static, step = self._static_tables(c, blocks)
        left = np.where(static + step <= kind.memory_limit_bytes, kind.memory_limit_bytes - static, -np.inf)
        beside = min((option.extra_bytes for options in blocks.kinds for option in options), default=0.0)
        rest, of_rest, _ = blocks.beside_layers
        has_layers = np.sum(blocks.numbers, axis=0) > 0
        beside_least = np.maximum(of_rest, np.where(has_layers, beside, 0.0))
        budget = (left * (1 + GENEROUS) - beside_least) / depths[:, None] - rest
        return least_of_parts(blocks.kinds, blocks.numbers, budget, (0.0, 1.0))

    def _single(self, c: Candidate, blocks: BlockTable) -> SingleTables:
        last = self._last_single
        if last is None or last[1] is not blocks or last[0] != c:
            at_rest = replace(self._bytes(c, 1, 0, 0), gradients=0.0, buffers=0.0)
            if c.zero < 3:  # the compute copies go as the backward comes by
                copy = backward_bytes(
                    zero=c.zero, num_shards=c.num_shards, num_copies=1, dtype=self._request.dtype,
                    param_dtype=self._request.param_dtype, is_layer=True,
                ).copy
                at_rest = replace(at_rest, parameters=at_rest.parameters - copy)
            tables = SingleTables.of(
                c, blocks, self._request.dtype, self._request.param_dtype, at_rest, self._static_tables(c, blocks)[1]
            )
            self._last_single = last = c, blocks, tables
        return last[2]

    def _static_tables(self, c: Candidate, blocks: BlockTable) -> tuple[Table, Table]:
        """For all ranges: bytes whatever is in flight, and those of the optimizer's step."""
        last = self._last_static
        if last is None or last[1] is not blocks or last[0] != c:
            self._last_static = last = c, blocks, self._make_static(c, blocks)
        return last[2]

    def _make_static(self, c: Candidate, blocks: BlockTable) -> tuple[Table, Table]:
        per_numel, per_unit, per_root, per_step = self._static(c)
        in_layers = np.where(blocks.kind >= 0, blocks.numel, 0.0)
        outside = blocks.numel - in_layers
        static = blocks.sorts.sums(per_numel * blocks.numel + per_root * outside + blocks.buffer_bytes)
        static += blocks.sorts.maxima(per_unit * in_layers)
        if c.offload_optimizer:
            return static, np.maximum(blocks.sorts.maxima(per_step * in_layers), blocks.sorts.sums(per_step * outside))
        return static, blocks.sorts.sums(per_step * blocks.numel)

    def _with_reduction(self, c: Candidate, blocks: BlockTable, held: Table) -> Table:
        """What the reduction needs with a micro-batch's activations; nothing where none is made in the end."""
        reducing = self._reducing(c, blocks)
        return np.where(reducing > 0, held + reducing, 0.0)

    def _reducing(self, c: Candidate, blocks: BlockTable) -> Table:
        """For all ranges: bytes beside one micro-batch's activations while the first gradients are reduced."""
        per_unit = reduction_bytes(1.0, zero=c.zero, num_shards=c.num_shards)
        return blocks.sorts.maxima(np.where(blocks.kind >= 0, per_unit * blocks.numel, 0.0))

    def _static(self, c: Candidate) -> tuple[float, float, float, float]:
        """Bytes a parameter: of any, of the largest layer's, of those outside layers, and in the optimizer's step."""
        key = c.zero, c.num_shards, c.offload_optimizer
        if key not in self._statics:
            self._statics[key] = self._make_bytes(c)
        return self._statics[key]

    def _make_bytes(self, c: Candidate) -> tuple[float, float, float, float]:
        def total(numel: float, unit: float, root: float) -> float:
            return self._bytes(c, numel, unit, root).total

        step = step_temporary_bytes(
            zero=c.zero, num_shards=c.num_shards,
            optimizer=self._request.optimizer if c.offload_optimizer else None,
        )
        return total(1, 0, 0), total(0, 1, 0), total(0, 0, 1), step

    def _bytes(self, c: Candidate, numel: float, unit: float, root: float) -> StaticBytes:
        """What the device holds of so many parameters."""
        found = static_bytes(
            numel, zero=c.zero, num_shards=c.num_shards, dtype=self._request.dtype,
            param_dtype=self._request.param_dtype, optimizer=self._request.optimizer, unit_numel=unit,
            root_numel=root,
        )
        return replace(found, optimizer=0.0) if c.offload_optimizer else found

    def layers_fit(
        self, c: Candidate, kinds: tuple[StageKind, ...], blocks: dict[StageKind, BlockTable], *, kept: bool = False
    ) -> bool:
        """Whether the stages have room for all layers, each taken as the leanest of them; a necessary condition.

        `kept`: with all their activations.
        """
        if not self._num_layers:
            return True
        per_numel = self._static(c)[0]
        in_flight = np.minimum(c.pp - np.arange(c.pp), c.num_micro_batches)
        room = 0.0
        for kind, table in blocks.items():
            held = in_flight[[other is kind for other in kinds]]
            own = table.kind >= 0
            numel, least = table.numel[own], (table.saved_bytes if kept else table.least_held)[own]
            smallest = (per_numel * numel[:, None] + least[:, None] * held[None, :]).min(axis=0)
            beside = float(table.transient_bytes[own].min())
            if c.num_micro_batches == 1:  # at the backward's start there are no gradients, at its end nothing else
                every = self._bytes(c, 1, 0, 0)
                starts = (every.total - every.gradients) * numel + least
                smallest = np.full(held.shape, starts.min())
                beside = 0.0
            if smallest.min() <= 0:
                return True
            room += float(np.maximum(0.0, np.floor((kind.memory_limit_bytes - beside) / smallest)).sum())
        return room >= self._num_layers
