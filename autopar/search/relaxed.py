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

import numpy as np

from autopar.graph.model_graph import BlockClass, Op
from autopar.search.block_problem import boundary_placement, hidden_shapes, may_rest, parameter_s
from autopar.search.elimination import Table
from autopar.search.placement_grid import Cache, Grid
from autopar.search.relaxed_tensor import Ints, Slot, Tensor, codes_of
from autopar.sharding.joint import JointOptions, Placement, replicated
from autopar.sharding.state import Kind, R, State
from autopar.simulate.class_costs import RUNS_AS_IT_IS, ClassCosts

MOMENTUM = 0.9  # of what a sweep has moved, how much is moved again before the next
_APART = 1e-10  # of the lower bound, shared by all ops; far above what rounding adds
MOST_SHARING = 4  # consumers whose conversions are shared exactly; more are taken in groups, each with its part


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
        self._tensors: list[Tensor] = []
        self.constant = 0.0
        self._build()
        self._at: list[list[tuple[Tensor, Slot]]] = [[] for _ in cls.ops]
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

    def _regrid(self, tensor: Tensor) -> None:
        tensor.regrid(self.ids, self.costs, self._blocked.get(tensor.name, ()), self._cache)

    def _slot(self, op: int, operand: int, *, output: bool = False) -> Slot:
        states = [(own.outputs if output else own.inputs)[operand] for own in self._options[op].strategies]
        return Slot(op, states, np.zeros(len(self.ids[op])))

    def _build(self) -> None:
        """The factors of all tensors; a parameter's cost, and that of adding gradients up, goes to the ops."""
        cls, costs = self.cls, self.costs
        index = {op.name: i for i, op in enumerate(cls.ops)}
        readers: dict[str, list[Slot]] = {}
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
        self, name: str, producer: Slot | None, start: Placement | None, consumers: Sequence[Slot],
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
            own = None if producer is None else Slot(producer.op, producer.states, np.zeros_like(producer.moved))
            weight = (len(some) + (leaves is not None)) / shares
            self._tensors.append(Tensor(name, weight, own, start, some, leaves))

    def _store(self, name: str, consumers: Sequence[Slot]) -> None:
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
            codes = codes_of(slot.states, self.ids[slot.op], grid)
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
            self.unary[slot.op] += spread[codes_of(slot.states, self.ids[slot.op], grid)]

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
        stale: dict[int, Tensor] = {}
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
