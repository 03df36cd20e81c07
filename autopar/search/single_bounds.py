"""What stages hold in steps of one micro-batch, by sort of range of blocks: as `simulate/single_backward.py` says.

A backward frees activations as it makes gradients. Of its moments these are looked at: those of blocks behind the last
layer, of the last layer, of the first, of blocks before it, and the step's end. In a range of layers that are alike,
those that hold least first, no other one holds more; in others one may, so that all of this are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost_models.memory import StaticBytes, backward_bytes, unit_buffer_bytes
from autopar.search.block_table import BlockTable
from autopar.search.candidates import Candidate
from autopar.search.elimination import Table
from autopar.search.variants import Level, Weights, least_added


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SingleTables:
    """By sort of range, in bytes; what layers hold and need beside comes on top where it is said.

    `behind`: the most that a block behind the last layer needs, beside what all layers hold. `last`: at the last
    layer's moment, beside what all layers hold and the larger of their need and `last_making`. `first`: at the first
    layer's, beside what that layer holds and the larger of that need and `first_making`; `first_kept`: with what it
    holds if it keeps everything. `fixed`: the most of what is left, whatever layers do. -inf: there is no such moment.
    """

    behind: Table
    last: Table
    last_making: Table
    first: Table
    first_kept: Table
    first_making: Table
    fixed: Table

    @staticmethod
    def of(c: Candidate, blocks: BlockTable, dtype: str, param_dtype: str, per_numel: StaticBytes, step: Table
           ) -> SingleTables:
        """The tables of a candidate's blocks. `per_numel`: bytes at rest; `step`: what the optimizer needs beside."""
        sorts = blocks.sorts
        is_layer = blocks.kind >= 0
        sizes = [
            backward_bytes(
                zero=c.zero, num_shards=c.num_shards, num_copies=c.dp * c.cp, dtype=dtype, param_dtype=param_dtype,
                is_layer=layer,
            ) for layer in (True, False)
        ]

        def of_blocks(name: str) -> Table:
            each: Table = np.where(is_layer, getattr(sizes[0], name), getattr(sizes[1], name))
            return each * blocks.numel

        copy = of_blocks("copy")
        kept = np.where(is_layer, sizes[0].is_kept, sizes[1].is_kept)
        at_rest = sorts.sums(per_numel.total * blocks.numel + blocks.buffer_bytes) + sorts.maxima(
            np.where(is_layer, unit_buffer_bytes(1.0, zero=c.zero, dtype=dtype) * blocks.numel, 0.0)
        )
        always = at_rest + sorts.sums(np.where(kept, copy, 0.0))
        held = np.where(is_layer, 0.0, blocks.saved_bytes) + np.where(kept, 0.0, copy)
        ends = at_rest + np.maximum(sorts.sums(of_blocks("reducing")), sorts.sums(of_blocks("whole")) + step)
        at = _Moments(
            sorts.sort, is_layer, held, of_blocks("made"), of_blocks("making"), blocks.transient_bytes,
            *np.nonzero(sorts.ranges < len(sorts.counts)),
        )

        def least(of_range: Table) -> Table:
            found = np.full(len(sorts.counts), np.inf)
            np.minimum.at(found, sorts.ranges[at.start, at.end], of_range)
            return found

        making, saved = of_blocks("making")[sorts.sort], blocks.saved_bytes[sorts.sort]
        first = np.where(at.has_layer, at.base(at.first), -np.inf)
        return SingleTables(
            behind=always + least(at.most(at.last + 1, at.end)),
            last=always + least(np.where(at.has_layer, at.base(at.last), -np.inf)),
            last_making=least(making[at.last]), first=always + least(first),
            first_kept=always + least(first + saved[at.first]), first_making=least(making[at.first]),
            fixed=np.maximum(ends, always + least(at.most(at.start, np.where(at.has_layer, at.first, 0)))),
        )

    def all_kept(self, blocks: BlockTable) -> Table:
        """Bytes at the peak where layers keep all activations."""
        is_layer = blocks.kind >= 0
        held = blocks.sorts.sums(np.where(is_layer, blocks.saved_bytes, 0.0))
        beside = blocks.sorts.maxima(np.where(is_layer, blocks.transient_bytes, 0.0))
        return self._peak(held, beside, self.first_kept)

    def least(self, blocks: BlockTable) -> Table:
        """Bytes at the peak with the variants that need least."""
        least, entry = self.all_kept(blocks), blocks.beside_layers[2]
        for level in blocks.levels:
            held, fewest = np.zeros(len(entry)), np.full(len(entry), np.inf)
            for number, options in zip(blocks.numbers, level.allowed, strict=True):
                own = min((option.held_bytes for option in options), default=np.inf)
                held = held + np.where(number > 0, number * own if options else np.inf, 0.0)
                fewest = np.where(number > 0, np.minimum(fewest, own), fewest)
            first = self.first + np.where(np.isfinite(fewest), fewest, 0.0)
            need = self._peak(held, np.full(len(entry), level.extra_bytes), first)
            least = np.minimum(least, need + (entry if level.offload else 0.0))
        return least

    def _peak(self, held: Table, beside: Table, first: Table) -> Table:
        peak: Table = np.maximum.reduce([
            self.fixed, self.behind + held, self.last + held + np.maximum(beside, self.last_making),
            first + np.maximum(beside, self.first_making),
        ])
        return peak

    def added(
        self, blocks: BlockTable, open_: NDArray[np.bool_], limit_bytes: float, weights: Weights
    ) -> Table:
        """Of the open ranges the least seconds that variants add so that they fit; infinite where they cannot."""
        behind, last, last_making, first, first_making, fixed = (
            table[open_] for table in (
                self.behind, self.last, self.last_making, self.first, self.first_making, self.fixed
            )
        )
        entry = blocks.beside_layers[2][open_]
        numbers = [number[open_] for number in blocks.numbers]
        found = np.full(len(entry), np.inf)
        can = np.isfinite(last)
        last, first = np.where(can, last, 0.0), np.where(can, first, 0.0)
        for level in blocks.levels:
            left = limit_bytes - (entry if level.offload else 0.0)
            held = left - np.maximum(last + np.maximum(level.extra_bytes, last_making), behind)
            fits = can & (fixed <= left) & (
                first + _fewest(level, numbers) + np.maximum(level.extra_bytes, first_making) <= left
            )
            own = least_added(level, numbers, np.where(fits, held, -np.inf), weights)
            found = np.minimum(found, np.where(fits, own, np.inf))
        return found


def _fewest(level: Level, numbers: list[NDArray[np.intp]]) -> Table:
    """What a layer of the range holds at least at a level."""
    found = np.full(numbers[0].shape, np.inf) if numbers else np.zeros(0)
    for number, options in zip(numbers, level.allowed, strict=True):
        own = min((option.held_bytes for option in options), default=np.inf)
        found = np.where(number > 0, np.minimum(found, own), found)
    return found


class _Moments:
    """The moments of a backward over blocks[start:end], for many ranges at once. Tables run over the chain's blocks.

    `held` is what each block frees, without the activations of layers, `made` what it leaves. `first` and `last` are a
    range's first and last layer, where it has any.
    """

    def __init__(
        self, sort: NDArray[np.intp], is_layer: NDArray[np.bool_], held: Table, made: Table, making: Table,
        beside: Table, start: NDArray[np.intp], end: NDArray[np.intp],
    ) -> None:
        self._held = np.concatenate([[0.0], np.cumsum(held[sort])])
        self._made = np.concatenate([[0.0], np.cumsum(made[sort])])
        self._need = np.maximum(making, beside)[sort]
        self.start, self.end = start, end
        places, own = np.arange(len(sort)), is_layer[sort]
        before = np.maximum.accumulate(np.where(own, places, -1))
        after = np.minimum.accumulate(np.where(own, places, len(sort))[::-1])[::-1]
        self.has_layer = before[end - 1] >= start
        self.last = np.where(self.has_layer, before[end - 1], start - 1)
        self.first = np.where(self.has_layer, after[start], start)

    def base(self, at: NDArray[np.intp]) -> Table:
        """Bytes in the moment of the block at this place, without what it needs beside."""
        return np.asarray(
            self._held[at + 1] - self._held[self.start] + self._made[self.end] - self._made[at + 1]
        )

    def most(self, first: NDArray[np.intp], end: NDArray[np.intp]) -> Table:
        """The most of the moments of blocks[first:end]; -inf where there are none."""
        found = np.full(len(first), -np.inf)
        for step in range(int((end - first).max(initial=0))):
            at = np.minimum(first + step, len(self._need) - 1)
            found = np.where(first + step < end, np.maximum(found, self.base(at) + self._need[at]), found)
        return found
