"""What a block costs at least on several axes, op by op and strategy by strategy, without a table of all pairs.

The choice is that of `intra_op`, with two relaxations. A conversion costs what the cheapest way from state to state,
one axis at a time, does: least costs of a tensor's placements then follow from one another axis by axis on the grid of
all placements. And a parameter's cost is shared out to its consumers. Costs are moved between ops and tensors without
changing that of any choice (as in `pruning`), which raises the sum of all minima, the lower bound. A tensor stands for
one conversion a wanted placement, exactly, where few ops read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import BlockClass, Op
from autopar.search.block_problem import boundary_placement, hidden_shapes, may_rest, parameter_s
from autopar.search.elimination import Table
from autopar.search.placement_grid import Cache, Grid
from autopar.sharding.joint import JointOptions, Placement, replicated
from autopar.sharding.state import Kind, R, State
from autopar.simulate.class_costs import RUNS_AS_IT_IS, ClassCosts

Ints = NDArray[np.intp]
MOMENTUM = 0.9  # of what a sweep has moved, how much is moved again before the next
_APART = 1e-10  # of the lower bound, shared by all ops; far above what rounding adds
FEW_PAIRS = 640  # of placements of a tensor: as many conversions between them are priced one by one
MOST_SHARING = 4  # consumers whose conversions are shared exactly; more are taken in groups, each with its part


_Known = tuple[tuple[Table, ...], Table]


@dataclass(slots=True, eq=False)
class _Slot:
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


class _Tensor:
    """The conversions of a tensor between the op that makes it and some of its consumers."""

    def __init__(self, name: str, weight: float, producer: _Slot | None, start: Placement | None,
                 consumers: Sequence[_Slot], end: Placement | None) -> None:
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
            slot.codes = _codes(slot.states, ids[slot.op], self.grid)
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
        self, slots: Sequence[_Slot], fixed: Placement | None, ids: Sequence[Ints]
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

    def _of(self, slot: _Slot) -> Table:
        """The least cost moved here of a strategy with each placement."""
        if slot.chosen is not None:
            return slot.chosen
        if slot.grid is None:
            slot.grid = np.full(self.grid.size, np.inf)
            slot.grid[slot.codes[slot.order[slot.starts]]] = np.minimum.reduceat(slot.moved[slot.order], slot.starts)
        return slot.grid

    def fix(self, slot: _Slot, row: int) -> None:
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

    def least(self, slot: _Slot) -> Table:
        """Of each strategy of an op the least that the tensor costs, less what was moved to the op's own slot."""
        beside = tuple(self._of(other) for other in self.slots if other is not slot)
        if slot.known is None or not all(map(is_, slot.known[0], beside)):
            slot.known = beside, self._least(slot)
        return slot.known[1]

    def _least(self, slot: _Slot) -> Table:
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


class Relaxed:
    """The relaxed problem: lower bounds of strategies, and the strategies that are left."""

    def __init__(
        self, cls: BlockClass, options: Mapping[str, JointOptions], boundary: Placement, costs: ClassCosts, *,
        parameter_weight: float, whole_params: Sequence[bool],
    ) -> None:
        self.cls, self.costs = cls, costs
        self._boundary, self._weight, self._whole_params = boundary, parameter_weight, whole_params
        self._options = [options[op.name] for op in cls.ops]
        self.ids = [own.ids for own in self._options]
        self.rows = [np.arange(len(own)) for own in self._options]
        self.unary = [self._op_costs(op, own) for op, own in zip(cls.ops, self._options, strict=True)]
        stays_whole = [state == R for state in boundary]
        hidden = hidden_shapes(cls)
        self._blocked = {info.name: stays_whole for info in cls.tensors if info.shape in hidden}
        self._cache: Cache = {}
        self._tensors: list[_Tensor] = []
        self.constant = 0.0
        self._build()
        self._at: list[list[tuple[_Tensor, _Slot]]] = [[] for _ in cls.ops]
        for tensor in self._tensors:
            self._regrid(tensor)
            for slot in tensor.slots:
                self._at[slot.op].append((tensor, slot))
        self.lower_bound = -math.inf
        self._added = 0.0

    @property
    def count(self) -> int:
        """Strategies that are left, of all ops together."""
        return sum(map(len, self.ids))

    def _regrid(self, tensor: _Tensor) -> None:
        tensor.regrid(self.ids, self.costs, self._blocked.get(tensor.name, ()), self._cache)

    def _slot(self, op: int, operand: int, *, output: bool = False) -> _Slot:
        states = [(own.outputs if output else own.inputs)[operand] for own in self._options[op].strategies]
        return _Slot(op, states, np.zeros(len(self.ids[op])))

    def _build(self) -> None:
        """The factors of all tensors; a parameter's cost, and that of adding gradients up, goes to the ops."""
        cls, costs = self.cls, self.costs
        index = {op.name: i for i, op in enumerate(cls.ops)}
        readers: dict[str, list[_Slot]] = {}
        for at, op in enumerate(cls.ops):
            for name in dict.fromkeys(op.operands):
                readers.setdefault(name, []).append(self._slot(at, op.operands.index(name)))
        for info in cls.tensors:
            name, consumers = info.name, readers.get(info.name, [])
            if name in cls.params:
                self._store(name, consumers)
                continue
            crossing = boundary_placement(info, self._boundary, costs.sizes)
            end = crossing if name in cls.outputs else None
            made = cls.producer.get(name)
            if made is None:
                start = crossing if name in cls.inputs else replicated(len(costs.sizes))
                if consumers or end is not None:
                    self.constant += costs.fan_out_s(name, start)
                self._share(name, None, start, consumers, end)
                continue
            producer = self._slot(index[made.name], made.outputs.index(name), output=True)

            def fan_out_s(place: Placement, name: str = name) -> float:
                return costs.fan_out_s(name, place)

            self.unary[producer.op] += _by_kind(producer.states, self.ids[producer.op], fan_out_s)
            self._share(name, producer, None, consumers, end)

    def _share(
        self, name: str, producer: _Slot | None, start: Placement | None, consumers: Sequence[_Slot],
        end: Placement | None,
    ) -> None:
        """One factor where few share the conversions; else one a group of consumers, each with its part of them."""
        shares = len(consumers) + (end is not None)
        first = MOST_SHARING - (end is not None) if shares > MOST_SHARING else len(consumers)
        groups = [(consumers[:first], end)]
        groups += [(consumers[i : i + MOST_SHARING], None) for i in range(first, len(consumers), MOST_SHARING)]
        for some, leaves in groups:
            if not some and (producer is None or leaves is None):
                continue
            own = None if producer is None else _Slot(producer.op, producer.states, np.zeros_like(producer.moved))
            weight = (len(some) + (leaves is not None)) / shares
            self._tensors.append(_Tensor(name, weight, own, start, some, leaves))

    def _store(self, name: str, consumers: Sequence[_Slot]) -> None:
        """Each consumer bears its part of a parameter's cost, at the cheapest placement that it can be used from."""
        if not consumers:
            return
        info, costs = self.cls.tensor[name], self.costs
        num_axes = len(costs.sizes)
        labels = [
            sorted({slot.states[i] for slot in consumers for i in np.unique(self.ids[slot.op][:, axis])}, key=str)
            for axis in range(num_axes)
        ]
        grid = Grid(costs, name, labels, (), True, {})
        values = np.full(grid.size, np.inf)

        def seconds(place: Placement) -> float:
            return parameter_s(costs, name, place, self._weight)

        for slot in consumers:
            codes = _codes(slot.states, self.ids[slot.op], grid)
            wanted, first = np.unique(codes, return_index=True)
            found = _by_kind(slot.states, self.ids[slot.op][first], seconds)
            for code, row, price in zip(wanted, first, found, strict=True):
                place = tuple(slot.states[i] for i in self.ids[slot.op][row])
                if may_rest(info, place, self._whole_params, costs.sizes):
                    values[code] = price
        whole = replicated(num_axes)
        values[grid.code(whole)] = seconds(whole)
        spread = grid.spread(values[None], backwards=False)[0] / len(consumers)
        for slot in consumers:
            self.unary[slot.op] += spread[_codes(slot.states, self.ids[slot.op], grid)]

    def _op_costs(self, op: Op, options: JointOptions) -> Table:
        """Each strategy's seconds; those that leave the same local shapes by the same special programs take as long."""
        sizes, ids = self.costs.sizes, options.ids
        columns = []
        for place, name in enumerate((*op.operands, *op.outputs)):
            for dim in range(len(self.cls.tensor[name].shape) if name else 0):
                parts = np.ones(len(options), dtype=np.intp)
                splits = np.array([state.kind is Kind.SHARDED and state.dim == dim for state in (
                    (*own.inputs, *own.outputs)[place] for own in options.strategies)])
                for axis, size in enumerate(sizes):
                    parts *= np.where(splits[ids[:, axis]], size, 1)
                columns.append(parts)
        parts = np.ones(len(options), dtype=np.intp)
        divides = np.array([bool(own.factor) for own in options.strategies])
        differs = np.array([
            own.lowering not in RUNS_AS_IT_IS or any(state.length for state in (*own.inputs, *own.outputs))
            for own in options.strategies
        ])
        for axis, size in enumerate(sizes):
            parts *= np.where(divides[ids[:, axis]], size, 1)
            columns.append(np.where(differs[ids[:, axis]], ids[:, axis], -1))
        columns.append(parts)
        number = np.zeros(len(options), dtype=np.intp)
        for column in columns:
            _, number = np.unique(number * (column.max(initial=0) + 2) + column + 1, return_inverse=True)
        _, first, inverse = np.unique(number, return_index=True, return_inverse=True)
        seconds = []
        for row in first:
            own, comm = self.costs.op_time(op, options[int(row)]), self.costs.lowering_comm(op, options[int(row)])
            seconds.append(own.forward_s + own.backward_s + comm.forward_s + comm.backward_s)
        return np.array(seconds)[inverse.reshape(-1)]

    def sweep(self) -> None:
        """Costs are moved towards the last op and back; raises `lower_bound`.

        Alike axes make many choices equally good. The first sweep tells them apart by costs far below all others, so
        that those which are likely go together; the bound is without them. Later ones begin further in the direction in
        which the last went (as Nesterov's gradient steps do, 1983), but where that made the bound fall.
        """
        if self._added:
            self._go_on()
        for forwards in (True, False):
            for op in range(len(self.ids)) if forwards else range(len(self.ids) - 1, -1, -1):
                self._visit(op, forwards=forwards)
        found = self.constant + sum(float(own.min()) for own in self.unary) - self._added
        if not self._added and 0 < found < math.inf:
            self._added = _APART * found
            chance, most = np.random.default_rng(0), self._added / len(self.unary)
            self.unary = [own + most * chance.random(len(own)) for own in self.unary]
        if found < self.lower_bound:
            for tensor in self._tensors:
                for slot in tensor.slots:
                    slot.before = None
        self.lower_bound = max(self.lower_bound, found)

    def _go_on(self) -> None:
        """Moves again a part of what the last sweep has moved."""
        for op, here in enumerate(self._at):
            for _, slot in here:
                now, slot.grid = slot.moved, None
                if slot.before is not None:
                    step = np.zeros_like(now)
                    np.subtract(now, slot.before, out=step, where=np.isfinite(now) & np.isfinite(slot.before))
                    step *= MOMENTUM
                    slot.moved = now + step
                    self.unary[op] = self.unary[op] - step
                slot.before = now

    def _visit(self, op: int, *, forwards: bool) -> None:
        unary, ahead, behind = self.unary[op], [], 0
        for tensor, slot in self._at[op]:
            first, last = (tensor.first, tensor.last) if forwards else (tensor.last, tensor.first)
            if last != op:
                ahead.append(slot)
            if first != op or first == last:
                behind += 1
                least = tensor.least(slot)
                unary = unary + least + slot.moved
                slot.moved = np.where(np.isinf(least), np.inf, -np.where(np.isinf(least), 0.0, least))
                slot.grid = None
        if ahead:
            share = unary / max(len(ahead), behind)
            for slot in ahead:
                slot.moved = slot.moved + share
                slot.grid = None
            given = np.where(np.isinf(unary), 0.0, share * len(ahead))
            unary = unary - given
        self.unary[op] = unary

    def slack(self, op: int) -> Table:
        """How much more than the lower bound each strategy of an op costs at least."""
        own, least = self.unary[op].copy(), float(self.unary[op].min())
        for tensor, slot in self._at[op]:
            own += tensor.least(slot) + slot.moved
        return own - least

    def likely(self) -> list[int]:
        """A choice, one row an op: after a sweep, each op's best beside the ops before it as they were chosen."""
        chosen = []
        for op in range(len(self.ids)):
            row = int(np.argmin(self.slack(op)))
            chosen.append(int(self.rows[op][row]))
            for tensor, slot in self._at[op]:
                tensor.fix(slot, row)
        for tensor in self._tensors:
            tensor.free()
        return chosen

    def drop(self, upper_bound: float) -> list[Table]:
        """Drops what costs more than the upper bound; the slack of what is left."""
        room = upper_bound - self.lower_bound + 1e-9 * abs(upper_bound)
        slacks: list[Table] = []
        stale: dict[int, _Tensor] = {}
        every = [self.slack(op) for op in range(len(self.ids))]
        for op, slack in enumerate(every):
            stays = slack <= room
            if not stays.all() and stays.any():
                self.ids[op], self.rows[op] = self.ids[op][stays], self.rows[op][stays]
                self.unary[op], slack = self.unary[op][stays], slack[stays]
                for tensor, slot in self._at[op]:
                    slot.moved = slot.moved[stays]
                    slot.before = None if slot.before is None else slot.before[stays]
                    stale[id(tensor)] = tensor
            slacks.append(slack)
        for tensor in stale.values():
            self._regrid(tensor)
        return slacks


def _codes(states: Sequence[State], ids: Ints, grid: Grid) -> Ints:
    """The number on the grid of each row's placement."""
    result = np.zeros(len(ids), dtype=np.intp)
    distinct: dict[State, int] = {}
    kept = np.array([distinct.setdefault(state, len(distinct)) for state in states], dtype=np.intp)
    for axis, (place, size) in enumerate(zip(grid.place, grid.shape, strict=True)):
        numbers = np.array([place.get(state, 0) for state in distinct], dtype=np.intp)
        result = result * size + numbers[kept[ids[:, axis]]]
    return result


def _by_kind(states: Sequence[State], ids: Ints, seconds: Callable[[Placement], float]) -> Table:
    """Of each row the seconds of its placement, which depend on which axes split the tensor and not on how."""
    kinds: dict[object, int] = {}
    number = np.array([kinds.setdefault((s.kind, s.length and s), len(kinds)) for s in states], dtype=np.intp)
    keys = np.zeros(len(ids), dtype=np.intp)
    for axis in range(ids.shape[1]):
        keys = keys * len(kinds) + number[ids[:, axis]]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found = [seconds(tuple(states[i] for i in ids[row])) for row in first]
    return np.array(found, dtype=np.float64)[inverse.reshape(-1)]
