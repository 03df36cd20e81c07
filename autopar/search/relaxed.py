"""What a block costs at least on several axes, op by op and strategy by strategy, without a table of all pairs.

The choice is that of `intra_op`, with two relaxations. A conversion costs what the cheapest way from state to state,
one axis at a time, does: least costs of a tensor's placements then follow from one another axis by axis on the grid of
all placements. And a parameter's cost is shared out to its consumers. Costs are moved between ops and tensors without
changing that of any choice (as in `pruning`), which raises the sum of all minima, the lower bound. A tensor stands for
one conversion a wanted placement, exactly, where few ops read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.graph.model_graph import BlockClass, Op
from autopar.search.block_problem import boundary_placement, hidden_shapes, may_rest, parameter_s
from autopar.search.elimination import Table
from autopar.sharding.joint import JointOptions, Placement, replicated
from autopar.sharding.reshard import conversion
from autopar.sharding.route import SUMS, summed_at_once, sums
from autopar.sharding.state import Kind, R, State
from autopar.simulate.class_costs import RUNS_AS_IT_IS, ClassCosts

Ints = NDArray[np.intp]
_Index = tuple[Any, ...]
_Cache = dict[object, tuple[list[Table], list[tuple[_Index, _Index, Table]]]]
_APART = 1e-10  # of the lower bound, shared by all ops; far above what rounding adds
MOST_SHARING = 3  # consumers whose conversions are shared exactly; more are taken in groups, each with its part


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


class _Grid:
    """All placements of one tensor, and what moving between them costs."""

    def __init__(self, costs: ClassCosts, name: str, labels: Sequence[Sequence[State]], blocked: Sequence[bool],
                 is_param: bool, cache: _Cache) -> None:
        self.labels = [tuple(dict.fromkeys((*own, R))) for own in labels]
        self.shape = tuple(len(own) for own in self.labels)
        self.size = int(np.prod(self.shape))
        self.place = [{state: i for i, state in enumerate(own)} for own in self.labels]
        whole = costs.whole(name)
        key = (whole.size_bytes, whole.element_bytes, whole.requires_grad, tuple(self.labels), is_param)
        if key not in cache:
            cache[key] = (
                [self._moves(costs, name, axis, is_param=is_param) for axis in range(len(self.shape))],
                [] if is_param or not summed_at_once(whole.numel) else list(self._sums(costs, name)),
            )
        self.moves, self.sums = cache[key]
        self.backwards = [np.ascontiguousarray(own.swapaxes(0, 2)) for own in self.moves]
        self.unmade: NDArray[np.bool_] | None = None  # what is never made of another placement
        if any(blocked):
            unmade = np.zeros(self.shape, dtype=np.bool_)
            for axis, own in enumerate(self.labels):
                if blocked[axis]:
                    unmade |= _along([state.kind is Kind.SHARDED for state in own], axis, len(self.shape))
            self.unmade = unmade.reshape(-1)

    def _moves(self, costs: ClassCosts, name: str, axis: int, *, is_param: bool) -> Table:
        """Seconds of changing one axis, by (from, the axes before it, to, the axes after it).

        An axis whose dim an axis before it changes has to give up its shard first.
        """
        own, trains = self.labels[axis], costs.whole(name).requires_grad
        share: Table = np.ones(1)
        for other, labels in enumerate(self.labels):
            parts = np.array([1 / costs.sizes[other] if s.kind is Kind.SHARDED else 1.0 for s in labels])
            share = np.multiply.outer(share, np.ones(1) if other == axis else parts).reshape(-1)
        shares, where = np.unique(share, return_inverse=True)
        before = int(np.prod(self.shape[:axis], dtype=np.intp))
        inner = self.shape[axis + 1 :]
        holding: dict[int, NDArray[np.bool_]] = {}  # by dim, whether an axis after this one splits it
        for dim in {state.dim for state in own if state.kind is Kind.SHARDED}:
            held = np.zeros(inner, dtype=np.bool_)
            for i, labels in enumerate(self.labels[axis + 1 :]):
                held |= _along([s.kind is Kind.SHARDED and s.dim == dim for s in labels], i, len(inner))
            holding[dim] = held.reshape(-1)
        result = np.full((before, len(own), len(own), share.size // before), np.inf)
        for i, src in enumerate(own):
            for j, dst in enumerate(own):
                if i == j:
                    result[:, i, j] = 0.0
                    continue
                step = conversion(src, dst, trains)
                if step is None:
                    continue
                times = [costs.step_time(name, step, axis=axis, share=float(part)) for part in shares]
                seconds = np.array([time.forward_s + time.backward_s for time in times])
                if is_param:
                    seconds = np.where(seconds > 0, np.inf, 0.0)
                result[:, i, j] = seconds[where].reshape(before, -1)
                for state in (src, dst):
                    if state.kind is Kind.SHARDED:
                        result[:, i, j, holding[state.dim]] = np.inf
        return np.ascontiguousarray(result.swapaxes(0, 1).reshape(len(own), before, len(own), -1))

    def _sums(self, costs: ClassCosts, name: str) -> Iterator[tuple[_Index, _Index, Table]]:
        """Sums over several axes at once, which cost less than one after the other: where from, where to, seconds."""
        trains, num_axes = costs.whole(name).requires_grad, len(self.shape)
        for src, dst in SUMS:
            able = [axis for axis, own in enumerate(self.labels) if src in own and dst in own]
            made = conversion(src, dst, trains)
            if made is None or made.is_free:
                continue
            for axes in (some for size in range(2, len(able) + 1) for some in combinations(able, size)):
                def at(state: State, axes: tuple[int, ...] = axes) -> _Index:
                    return ..., *(self.place[i][state] if i in axes else slice(None) for i in range(num_axes))

                share: Table = np.ones(1)
                for other, labels in enumerate(self.labels):
                    if other not in axes:
                        parts = [1 / costs.sizes[other] if s.kind is Kind.SHARDED else 1.0 for s in labels]
                        share = np.multiply.outer(share, np.array(parts))
                shares, where = np.unique(share, return_inverse=True)
                seconds = [sum(
                    time.forward_s + time.backward_s
                    for axis, part, step in sums(made, axes, float(held), costs.sizes)
                    for time in [costs.step_time(name, step, axis=axis, share=part)]
                ) for held in shares]
                yield at(src), at(dst), np.array(seconds)[where].reshape(share.shape[1:])

    def code(self, place: Placement) -> int | None:
        if any(state not in own for state, own in zip(place, self.place, strict=True)):
            return None
        return int(np.ravel_multi_index([own[state] for state, own in zip(place, self.place, strict=True)], self.shape))

    def spread(self, values: Table, *, backwards: bool, weight: float = 1.0) -> Table:
        """For each placement the least of values (rows of the last dim) at another and of the way there (or back)."""
        moves = self.backwards if backwards else self.moves
        found = np.ascontiguousarray(values / weight)
        if self.unmade is not None and backwards:
            found[..., self.unmade] = np.inf
        ways = [axis for axis, size in enumerate(self.shape) if size > 1] + [-1] * bool(self.sums)
        unchanged = 0
        for way in cycle(ways):
            after = self._along_axis(found, moves[way]) if way >= 0 else self._at_once(found, backwards=backwards)
            unchanged = unchanged + 1 if np.array_equal(after, found) else 0
            found = after
            if unchanged == len(ways):
                break
        found *= weight
        if self.unmade is not None:
            if backwards:
                return np.minimum(found, values)
            found[..., self.unmade] = values[..., self.unmade]
        return found

    def _along_axis(self, values: Table, cost: Table) -> Table:
        """The least at each placement where one axis may change once."""
        size, before, _, after = cost.shape
        seen = values.reshape(-1, before, size, after).transpose(2, 0, 1, 3)
        least: Table = (seen[:, :, :, None] + cost[:, None]).min(axis=0)  # over the first dim numpy is quick
        return least.reshape(values.shape)

    def _at_once(self, values: Table, *, backwards: bool) -> Table:
        """The least at each placement where there may be sums over several axes."""
        found = values.copy()
        grid = found.reshape(-1, *self.shape)
        for src, dst, cost in self.sums:
            start, end = (dst, src) if backwards else (src, dst)
            np.minimum(grid[end], grid[start] + cost, out=grid[end])
        return found


class _Tensor:
    """The conversions of a tensor between the op that makes it and some of its consumers."""

    def __init__(self, name: str, weight: float, producer: _Slot | None, start: Placement | None,
                 consumers: Sequence[_Slot], end: Placement | None) -> None:
        self.name, self.weight, self.producer, self.start = name, weight, producer, start
        self.consumers, self.end = list(consumers), end
        self.slots = [*([producer] if producer else []), *consumers]
        self.first, self.last = min(s.op for s in self.slots), max(s.op for s in self.slots)
        self.grid: _Grid

    def regrid(self, ids: Sequence[Ints], costs: ClassCosts, blocked: Sequence[bool], cache: _Cache) -> None:
        """The grid of the placements that are left."""
        labels: list[list[State]] = [[] for _ in costs.sizes]
        for slot in self.slots:
            for axis, own in enumerate(labels):
                own += [slot.states[i] for i in np.unique(ids[slot.op][:, axis])]
        for place in (self.start, self.end):
            for axis, state in enumerate(place or ()):
                labels[axis].append(state)
        ordered = [sorted(set(own), key=str) for own in labels]
        self.grid = _Grid(costs, self.name, ordered, blocked, False, cache)
        for slot in self.slots:
            slot.codes = _codes(slot.states, ids[slot.op], self.grid)
            slot.order = np.argsort(slot.codes, kind="stable")
            ranked = slot.codes[slot.order]
            slot.starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
            slot.grid = None

    def _of(self, slot: _Slot) -> Table:
        """The least cost moved here of a strategy with each placement."""
        if slot.grid is None:
            slot.grid = np.full(self.grid.size, np.inf)
            slot.grid[slot.codes[slot.order[slot.starts]]] = np.minimum.reduceat(slot.moved[slot.order], slot.starts)
        return slot.grid

    def fix(self, slot: _Slot, row: int) -> None:
        """Until its grid is made anew, an op has but one strategy here."""
        slot.grid = np.full(self.grid.size, np.inf)
        slot.grid[slot.codes[row]] = slot.moved[row]

    def _fixed(self, place: Placement) -> Table:
        values = np.full(self.grid.size, np.inf)
        code = self.grid.code(place)
        assert code is not None, "the grid has the fixed placements"
        values[code] = 0.0
        return values

    def least(self, slot: _Slot) -> Table:
        """Of each strategy of an op the least that the tensor costs, less what was moved to the op's own slot."""
        ends = [] if self.end is None else [self._fixed(self.end)]
        if slot is self.producer:
            grids = [*(self._of(own) for own in self.consumers), *ends]
            return self._apart(grids)[-1][slot.codes]
        own = next(i for i, other in enumerate(self.consumers) if other is slot)
        others = [*(self._of(other) for i, other in enumerate(self.consumers) if i != own), *ends]
        made = self._fixed(self.start) if self.producer is None and self.start else self._of(self.slots[0])
        apart = self._apart(others)  # of each set of the others, as bits
        full = (1 << len(others)) - 1
        started = np.stack([made + apart[full & ~together] for together in range(full + 1)])
        arrived = self.grid.spread(started, backwards=False, weight=self.weight)
        for together in range(full + 1):
            for i, grid in enumerate(others):
                if together >> i & 1:
                    arrived[together] += grid
        least: Table = arrived.min(axis=0)
        return least[slot.codes]

    def _apart(self, grids: Sequence[Table]) -> list[Table]:
        """For each set of consumers what they cost with their conversions, those to one placement paid once."""
        together = [sum((g for i, g in enumerate(grids) if bits >> i & 1), np.zeros(self.grid.size))
                    for bits in range(1, 1 << len(grids))]
        best = [np.zeros(self.grid.size)]
        if not together:
            return best
        spread = self.grid.spread(np.stack(together), backwards=True, weight=self.weight)
        for bits in range(1, 1 << len(grids)):
            lowest, found = bits & -bits, spread[bits - 1]
            part = (bits - 1) & bits  # the proper parts that have the first consumer
            while part:
                if part & lowest:
                    found = np.minimum(found, spread[part - 1] + best[bits & ~part])
                part = (part - 1) & bits
            best.append(found)
        return best


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
        self._cache: _Cache = {}
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
        grid = _Grid(costs, name, labels, (), True, {})
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
        """Each strategy's seconds; strategies that leave the same local shapes take equally long."""
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
        special = np.zeros(len(options), dtype=np.bool_)
        divides = np.array([bool(own.factor) for own in options.strategies])
        differs = np.array([
            own.lowering not in RUNS_AS_IT_IS or any(state.length for state in (*own.inputs, *own.outputs))
            for own in options.strategies
        ])
        for axis, size in enumerate(sizes):
            parts *= np.where(divides[ids[:, axis]], size, 1)
            special |= differs[ids[:, axis]]
        columns += [parts, np.where(special, np.arange(len(options)), -1)]
        _, first, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
        seconds = []
        for row in first:
            own, comm = self.costs.op_time(op, options[int(row)]), self.costs.lowering_comm(op, options[int(row)])
            seconds.append(own.forward_s + own.backward_s + comm.forward_s + comm.backward_s)
        return np.array(seconds)[inverse.reshape(-1)]

    def sweep(self) -> None:
        """Costs are moved towards the last op and back; raises `lower_bound`.

        Alike axes make many choices equally good. The first sweep tells them apart by costs far below all others, so
        that those which are likely go together; the bound is without them.
        """
        for forwards in (True, False):
            for op in range(len(self.ids)) if forwards else range(len(self.ids) - 1, -1, -1):
                self._visit(op, forwards=forwards)
        found = self.constant + sum(float(own.min()) for own in self.unary) - self._added
        if not self._added and 0 < found < math.inf:
            self._added = _APART * found
            chance, most = np.random.default_rng(0), self._added / len(self.unary)
            self.unary = [own + most * chance.random(len(own)) for own in self.unary]
        self.lower_bound = max(self.lower_bound, found)

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
            for slot in tensor.slots:
                slot.grid = None
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
                    stale[id(tensor)] = tensor
            slacks.append(slack)
        for tensor in stale.values():
            self._regrid(tensor)
        return slacks


def _along(values: Sequence[bool], axis: int, rank: int) -> NDArray[np.bool_]:
    return np.array(values, dtype=np.bool_).reshape([-1 if i == axis else 1 for i in range(rank)])


def _codes(states: Sequence[State], ids: Ints, grid: _Grid) -> Ints:
    """The number on the grid of each row's placement."""
    result = np.zeros(len(ids), dtype=np.intp)
    for axis, (place, size) in enumerate(zip(grid.place, grid.shape, strict=True)):
        result = result * size + np.array([place.get(state, 0) for state in states], dtype=np.intp)[ids[:, axis]]
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
