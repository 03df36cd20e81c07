"""One tensor of the relaxed problem: what its conversions cost at least, beside the costs moved to it.

A conversion costs what the cheapest way from state to state, one axis at a time, does: least costs of a tensor's
placements then follow from one another axis by axis on the grid of all placements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_

import numpy as np
from numpy.typing import NDArray

from autopar.search.elimination import Table
from autopar.search.placement_grid import Cache, Grid
from autopar.sharding.joint import Placement
from autopar.sharding.state import State
from autopar.simulate.class_costs import ClassCosts

Ints = NDArray[np.intp]
FEW_PAIRS = 640  # of placements of a tensor: as many conversions between them are priced one by one


_Known = tuple[tuple[Table, ...], Table]


@dataclass(slots=True, eq=False)
class Slot:
    """One op at a tensor: the placement of the tensor under each of its strategies, and the costs moved here."""

    op: int
    states: list[State]  # of each of the numbered strategies of the op's options
    moved: Table
    codes: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    order: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    starts: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    grid: Table | None = None
    before: Table | None = None  # what was moved here when the last sweep began
    chosen: Table | None = None  # stands for `grid` while the op has but one strategy
    known: _Known | None = None  # what the tensor costs at least beside these grids of its other slots


class Tensor:
    """The conversions of a tensor between the op that makes it and some of its consumers."""

    def __init__(self, name: str, weight: float, producer: Slot | None, start: Placement | None,
                 consumers: Sequence[Slot], end: Placement | None) -> None:
        self.name, self.weight, self.producer, self.start = name, weight, producer, start
        self.consumers, self.end = list(consumers), end
        self.slots = [*([producer] if producer else []), *consumers]
        self.first, self.last = min(s.op for s in self.slots), max(s.op for s in self.slots)
        self.grid: Grid
        self._pairs: tuple[Ints, Ints, Table] | None = None
        self._known: dict[int, _Known] = {}  # of sets of consumers, as bits: `_spread` of the sum of their grids
        self._ends: list[Table] = []
        self._starts: list[Table] = []

    def regrid(self, ids: Sequence[Ints], costs: ClassCosts, blocked: Sequence[bool], cache: Cache) -> None:
        """The grid of the placements that are left."""
        labels: list[list[State]] = [[] for _ in costs.sizes]
        for slot in self.slots:
            for axis, own in enumerate(labels):
                own += [slot.states[i] for i in np.unique(ids[slot.op][:, axis])]
        for place in (self.start, self.end):
            for axis, state in enumerate(place or ()):
                labels[axis].append(state)
        ordered = [sorted(set(own), key=str) for own in labels]
        self.grid = Grid(costs, self.name, ordered, blocked, False, cache)
        for slot in self.slots:
            slot.codes = codes_of(slot.states, ids[slot.op], self.grid)
            slot.order = np.argsort(slot.codes, kind="stable")
            ranked = slot.codes[slot.order]
            slot.starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
            slot.grid = slot.known = None
        self._known = {}
        self._ends = [] if self.end is None else [self._fixed(self.end)]
        self._starts = [] if self.start is None or self.producer is not None else [self._fixed(self.start)]
        self._pairs = self._priced(ids, costs)

    def _priced(self, ids: Sequence[Ints], costs: ClassCosts) -> tuple[Ints, Ints, Table] | None:
        """Numbers of placements to start from, those to end at, and what the conversions cost, where pairs are few."""
        makes = [] if self.producer is None else [self.producer]
        fewest = max((len(slot.starts) for slot in self.consumers), default=1)
        if fewest * sum((len(slot.starts) for slot in makes), self.start is not None) > FEW_PAIRS:
            return None
        src = self._placements(makes, self.start, ids)
        dst = self._placements(self.consumers, self.end, ids)
        if len(src) * len(dst) > FEW_PAIRS:
            return None
        seconds = np.full((len(src), len(dst)), np.inf)
        for i, (at, before) in enumerate(src.items()):
            for j, (to, after) in enumerate(dst.items()):
                if at == to:
                    seconds[i, j] = 0.0
                elif self.grid.unmade is None or not self.grid.unmade[to]:
                    time = costs.conversion_time(self.name, before, after)
                    if time is not None:
                        seconds[i, j] = time.forward_s + time.backward_s
        return np.array([*src]), np.array([*dst]), seconds * self.weight

    def _placements(
        self, slots: Sequence[Slot], fixed: Placement | None, ids: Sequence[Ints]
    ) -> dict[int, Placement]:
        """The placements under the strategies of some ops, and a fixed one, by number."""
        found: dict[int, Placement] = {}
        for slot in slots:
            for row in slot.order[slot.starts]:
                found[int(slot.codes[row])] = tuple(slot.states[i] for i in ids[slot.op][row])
        code = None if fixed is None else self.grid.code(fixed)
        if fixed is not None and code is not None:
            found[code] = fixed
        return found

    def _spread(self, values: Table, *, backwards: bool) -> Table:
        """For each placement the least of values (in rows) at another and of the conversion from it (or to it)."""
        if self._pairs is None:
            return self.grid.spread(values, backwards=backwards, weight=self.weight)
        src, dst, seconds = self._pairs
        found = np.full(values.shape, np.inf)
        if backwards:
            found[:, src] = (values[:, None, dst] + seconds).min(axis=2)
        else:
            found[:, dst] = (values[:, src, None] + seconds).min(axis=1)
        return found

    def _of(self, slot: Slot) -> Table:
        """The least cost moved here of a strategy with each placement."""
        if slot.chosen is not None:
            return slot.chosen
        if slot.grid is None:
            slot.grid = np.full(self.grid.size, np.inf)
            slot.grid[slot.codes[slot.order[slot.starts]]] = np.minimum.reduceat(slot.moved[slot.order], slot.starts)
        return slot.grid

    def fix(self, slot: Slot, row: int) -> None:
        """Until it is `free` again, an op has but one strategy here."""
        slot.chosen = np.full(self.grid.size, np.inf)
        slot.chosen[slot.codes[row]] = slot.moved[row]

    def free(self) -> None:
        """All ops have all strategies that are left."""
        for slot in self.slots:
            slot.chosen = None

    def _fixed(self, place: Placement) -> Table:
        values = np.full(self.grid.size, np.inf)
        code = self.grid.code(place)
        assert code is not None, "the grid has the fixed placements"
        values[code] = 0.0
        return values

    def least(self, slot: Slot) -> Table:
        """Of each strategy of an op the least that the tensor costs, less what was moved to the op's own slot."""
        beside = tuple(self._of(other) for other in self.slots if other is not slot)
        if slot.known is None or not all(map(is_, slot.known[0], beside)):
            slot.known = beside, self._least(slot)
        return slot.known[1]

    def _least(self, slot: Slot) -> Table:
        every = dict(enumerate([*(self._of(own) for own in self.consumers), *self._ends]))
        if slot is self.producer:
            return self._apart(every)[-1][slot.codes]
        own = next(i for i, other in enumerate(self.consumers) if other is slot)
        others = {i: grid for i, grid in every.items() if i != own}
        made = self._starts[0] if self._starts else self._of(self.slots[0])
        apart = self._apart(others)  # of each set of the others, as bits
        full = (1 << len(others)) - 1
        started = np.stack([made + apart[full & ~together] for together in range(full + 1)])
        arrived = self._spread(started, backwards=False)
        for together in range(full + 1):
            for i, grid in enumerate(others.values()):
                if together >> i & 1:
                    arrived[together] += grid
        least: Table = arrived.min(axis=0)
        return least[slot.codes]

    def _apart(self, grids: Mapping[int, Table]) -> list[Table]:
        """For each set of consumers what they cost with their conversions, those to one placement paid once."""
        numbers, own = list(grids), list(grids.values())
        spread = self._together(numbers, own)
        best = [np.zeros(self.grid.size)]
        for bits in range(1, 1 << len(own)):
            lowest, found = bits & -bits, spread[bits - 1]
            part = (bits - 1) & bits  # the proper parts that have the first consumer
            while part:
                if part & lowest:
                    found = np.minimum(found, spread[part - 1] + best[bits & ~part])
                part = (part - 1) & bits
            best.append(found)
        return best

    def _together(self, numbers: Sequence[int], grids: Sequence[Table]) -> list[Table]:
        """For each set of consumers, as bits of 1 and more, what they cost with one conversion for all of them."""
        made: list[tuple[int, tuple[Table, ...]]] = []
        for bits in range(1, 1 << len(grids)):
            some = [i for i in range(len(grids)) if bits >> i & 1]
            made.append((sum(1 << numbers[i] for i in some), tuple(grids[i] for i in some)))
        stale = [
            (key, own) for key, own in made
            if key not in self._known or not all(map(is_, self._known[key][0], own))
        ]
        if stale:
            found = self._spread(np.stack([np.sum(own, axis=0) for _, own in stale]), backwards=True)
            for (key, own), row in zip(stale, found, strict=True):
                self._known[key] = own, row
        return [self._known[key][1] for key, _ in made]


def codes_of(states: Sequence[State], ids: Ints, grid: Grid) -> Ints:
    """The number on the grid of each row's placement."""
    result = np.zeros(len(ids), dtype=np.intp)
    distinct: dict[State, int] = {}
    kept = np.array([distinct.setdefault(state, len(distinct)) for state in states], dtype=np.intp)
    for axis, (place, size) in enumerate(zip(grid.place, grid.shape, strict=True)):
        numbers = np.array([place.get(state, 0) for state in distinct], dtype=np.intp)
        result = result * size + numbers[kept[ids[:, axis]]]
    return result
