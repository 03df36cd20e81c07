"""What the blocks of a chain cost and hold on one device; blocks that are alike share an entry."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import ModelGraph
from autopar.search.balance import range_maxima, range_sums
from autopar.search.elimination import Table
from autopar.search.variants import Level, Options


@dataclass(frozen=True, kw_only=True, eq=False)
class Sorts:
    """Which blocks are alike: of one class, holding the same of their parameters, and not at an end of the chain.

    Entry `sort[i]` is block i's, and `counts` how many blocks an entry has. Where entries are `in_order`, one a block,
    sums are over all ranges of blocks; else they are over the whole chain.
    """

    sort: NDArray[np.intp]
    counts: Table
    classes: tuple[str, ...]  # of each entry
    is_layer: tuple[bool, ...]
    held: tuple[tuple[bool, ...], ...]  # which of its parameters no earlier block that may be in its stage holds too
    first_outside: int | None  # the entry of the first block that is no layer
    in_order: bool = False

    @property
    def ends(self) -> list[int]:
        """The entries of the chain's first and last block."""
        return [int(self.sort[0]), int(self.sort[-1])]

    @cached_property
    def one_each(self) -> Sorts:
        """The same with an entry for each block."""
        if self.in_order:
            return self
        outside = None if self.first_outside is None else int(np.flatnonzero(self.sort == self.first_outside)[0])
        return Sorts(
            sort=np.arange(len(self.sort)), counts=np.ones(len(self.sort)), first_outside=outside, in_order=True,
            classes=tuple(self.classes[i] for i in self.sort), is_layer=tuple(self.is_layer[i] for i in self.sort),
            held=tuple(self.held[i] for i in self.sort),
        )

    @staticmethod
    def of(graph: ModelGraph, layer: NDArray[np.bool_], *, ends_apart: bool) -> Sorts:
        """The sorts of a graph's blocks. `ends_apart`: the first and the last block are in different stages."""
        last = len(graph.blocks) - 1
        outside = None if layer.all() else int(np.argmin(layer))
        holder: dict[str, int] = {}
        entries: dict[tuple[object, ...], int] = {}
        sort: list[int] = []
        for index, block in enumerate(graph.blocks):
            held = tuple(
                name not in holder or (ends_apart and index == last and holder[name] == 0) for name in block.params
            )
            holder.update(dict.fromkeys(block.params, index))
            special = index in (0, last, outside)
            key = (block.cls, bool(layer[index]), held, index if special else -1)
            sort.append(entries.setdefault(key, len(entries)))
        firsts = [sort.index(entry) for entry in range(len(entries))]
        return Sorts(
            sort=np.array(sort), counts=np.bincount(sort).astype(np.float64),
            classes=tuple(graph.blocks[i].cls for i in firsts), is_layer=tuple(bool(layer[i]) for i in firsts),
            held=tuple(key[2] for key in entries),  # type: ignore[misc]
            first_outside=None if outside is None else sort[outside],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTable:
    """The entries of a chain's blocks for one device of one kind at one size of micro-batch."""

    sorts: Sorts
    forward_s: Table
    backward_s: Table
    saved_bytes: Table
    boundary_bytes: Table
    transient_bytes: Table
    buffer_bytes: Table
    numel: Table  # local parameters; one that an earlier block may hold in the same stage counts there alone
    kinds: tuple[Options, ...]  # of layers
    kind: NDArray[np.intp]  # of each entry, -1 where it is no layer
    levels: tuple[Level, ...]

    @cached_property
    def one_each(self) -> BlockTable:
        """The same with an entry for each block."""
        sort = self.sorts.sort
        spread = {
            item.name: value[sort] for item in fields(self)
            if isinstance(value := getattr(self, item.name), np.ndarray)
        }
        return replace(self, sorts=self.sorts.one_each, **spread)

    def sums(self, each: Table) -> Table:
        """table[i, j]: the sum over blocks i to j; [0, 1] is the whole chain where entries are not in order."""
        return range_sums(each) if self.sorts.in_order else _whole(float(each @ self.sorts.counts))

    def maxima(self, each: Table) -> Table:
        """The same for the largest, of what is at least 0."""
        return range_maxima(each) if self.sorts.in_order else _whole(float(each.max()))

    def running(self, each: Table) -> Table:
        """The sums up to each block, or up to none and of all."""
        if self.sorts.in_order:
            return np.concatenate([[0.0], np.cumsum(each)])
        return np.array([0.0, each @ self.sorts.counts])

    @cached_property
    def beside_layers(self) -> tuple[Table, Table, Table]:
        """For all ranges: bytes held by blocks that are no layers, the most beside them, and the stage's own input."""
        is_layer = self.kind >= 0
        rest = self.sums(np.where(is_layer, 0.0, self.saved_bytes))
        beside = self.maxima(np.where(is_layer, 0.0, self.transient_bytes))
        entry = self.maxima(np.where(is_layer, self.boundary_bytes, 0.0))
        entry[0] = np.where(np.isfinite(entry[0]), 0.0, entry[0])
        return rest, beside, entry

    @cached_property
    def all_kept(self) -> tuple[Table, Table]:
        """For all ranges: bytes that a micro-batch holds and the most beside them, where all activations are kept."""
        return self.sums(self.saved_bytes), self.maxima(self.transient_bytes)

    @cached_property
    def least_held(self) -> Table:
        """The fewest bytes that each layer can hold of a micro-batch."""
        fewest = [min(option.held_bytes for option in options) for options in self.kinds]
        return np.array([fewest[kind] if kind >= 0 else np.inf for kind in self.kind])

    @cached_property
    def most_added(self) -> tuple[Table, Table]:
        """The most seconds that a variant adds to each block's forward, and to its backward."""
        forward = [max(option.forward_s for option in options) for options in self.kinds]
        backward = [max(option.backward_s for option in options) for options in self.kinds]
        return (
            np.array([forward[kind] if kind >= 0 else 0.0 for kind in self.kind]),
            np.array([backward[kind] if kind >= 0 else 0.0 for kind in self.kind]),
        )

    @cached_property
    def numbers(self) -> list[NDArray[np.intp]]:
        """For each kind, how many of its layers each range of blocks has."""
        if not self.sorts.in_order:
            found = [int(self.sorts.counts[self.kind == kind].sum()) for kind in range(len(self.kinds))]
            return [np.array([[0, number], [0, 0]]) for number in found]
        running = [np.concatenate([[0], np.cumsum(self.kind == kind)]) for kind in range(len(self.kinds))]
        return [np.maximum(0, counts[None, :] - counts[:, None]) for counts in running]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """By entry, on a stage of one kind and with all activations kept: times not above the simulator's.

    A second that recomputation or offload adds to a micro-batch adds at least `hidden_share` of it to `forward_s` or
    `backward_s`, and all of it to the plain ones, which count only the slow-down by hidden communication. `once_s`, of
    a step, holds where nothing is added, `once_beside_s` whatever is.
    """

    forward_s: Table
    backward_s: Table
    plain_forward_s: Table
    plain_backward_s: Table
    hidden_share: float
    once_s: Table
    once_beside_s: Table
    blocks: BlockTable

    def one_each(self) -> StageTable:
        """The same with an entry for each block."""
        sort = self.blocks.sorts.sort
        return StageTable(
            forward_s=self.forward_s[sort], backward_s=self.backward_s[sort],
            plain_forward_s=self.plain_forward_s[sort], plain_backward_s=self.plain_backward_s[sort],
            hidden_share=self.hidden_share, once_s=self.once_s[sort], once_beside_s=self.once_beside_s[sort],
            blocks=self.blocks.one_each,
        )


def _whole(value: float) -> Table:
    return np.array([[np.inf, value], [np.inf, np.inf]])
