"""All placements of a tensor on several axes, and the least that going from one to another costs.

A placement changes one axis at a time, or several by one sum. What changing an axis costs depends on the kinds of its
two states, whatever dim a shard splits, and on the share of the tensor that the other axes leave: shards of one dim are
looked at together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.search.elimination import Table
from autopar.sharding.joint import Placement
from autopar.sharding.reshard import Conversion, conversion
from autopar.sharding.route import SUMS, summed_at_once, sums
from autopar.sharding.state import Kind, R, State
from autopar.simulate.class_costs import ClassCosts

_Index = tuple[Any, ...]
_KINDS = (Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL)


@dataclass(frozen=True, slots=True)
class _Axis:
    """What changing one axis costs.

    `groups`: the states of the axis in groups, [first, last): shards of one dim cost the same. `number`: each state's
    group. `seconds`: from group to group at each placement of the other axes; infinite where an axis after it splits
    the dim that would change.
    """

    groups: tuple[tuple[int, int], ...]
    number: NDArray[np.intp]
    seconds: Table
    back: Table  # the same from the group that is reached


_Made = tuple[list[_Axis], list[tuple[_Index, _Index, Table]]]
Cache = dict[object, _Made]


class Grid:
    """All placements of one tensor, numbered along `labels`, and what moving between them costs.

    `blocked`: of each axis whether the tensor is never made to be split by it. Grids of equal tensors share what is in
    `cache`.
    """

    def __init__(self, costs: ClassCosts, name: str, labels: Sequence[Sequence[State]], blocked: Sequence[bool],
                 is_param: bool, cache: Cache) -> None:
        self.labels = [tuple(sorted({*own, R}, key=_rank)) for own in labels]
        self.shape = tuple(len(own) for own in self.labels)
        self.size = int(np.prod(self.shape))
        self.place = [{state: i for i, state in enumerate(own)} for own in self.labels]
        whole = costs.whole(name)
        key = (whole.size_bytes, whole.element_bytes, whole.requires_grad, tuple(self.labels), is_param)
        if key not in cache:
            cache[key] = (
                [self._axis(costs, name, axis, is_param=is_param) for axis in range(len(self.shape))],
                [] if is_param or not summed_at_once(whole.numel) else list(self._sums(costs, name)),
            )
        self._axes, self._at_once = cache[key]
        self._ways = self._order()
        self._turned = [_to_front(axis + 1, len(self.shape) + 1) for axis in range(len(self.shape))]
        self.unmade: NDArray[np.bool_] | None = None  # what is never made of another placement
        if any(blocked):
            unmade = np.zeros(self.shape, dtype=np.bool_)
            for axis, own in enumerate(self.labels):
                if blocked[axis]:
                    unmade |= _along([state.kind is Kind.SHARDED for state in own], axis, len(self.shape))
            self.unmade = unmade.reshape(-1)

    def code(self, place: Placement) -> int | None:
        """The number of a placement; None where the grid has none such."""
        if any(state not in own for state, own in zip(place, self.place, strict=True)):
            return None
        return int(np.ravel_multi_index([own[state] for state, own in zip(place, self.place, strict=True)], self.shape))

    def spread(self, values: Table, *, backwards: bool, weight: float = 1.0) -> Table:
        """For each placement the least of values (rows of the last dim) at another and of the way there (or back)."""
        found = np.ascontiguousarray(values / weight)
        if self.unmade is not None and backwards:
            found[..., self.unmade] = np.inf
        found = self._closed(found.reshape(-1, self.size), backwards=backwards).reshape(values.shape)
        found *= weight
        if self.unmade is not None:
            if backwards:
                return np.minimum(found, values)
            found[..., self.unmade] = values[..., self.unmade]
        return found

    def _order(self) -> list[int]:
        """Axes in the order in which ways mostly change them, -1 for sums over several.

        An axis after another gives up a dim first and takes one last.
        """
        ways = [axis for axis, size in enumerate(self.shape) if size > 1]
        once = [-1] * bool(self._at_once)
        return [*ways[::-1], *once, *ways[1:-1]] if len(ways) > 1 else [*ways, *once]

    def _closed(self, values: Table, *, backwards: bool) -> Table:
        """The least over all ways, where nothing is unmade."""
        distinct, unchanged = len(set(self._ways)), set[int]()
        grid = values.reshape(-1, *self.shape)
        while len(unchanged) < distinct:
            for way in self._ways:
                if way in unchanged:
                    continue
                after = self._along_axis(grid, way, backwards=backwards) if way >= 0 else (
                    self._summed(grid, backwards=backwards))
                if after is not None:
                    grid = after
                    unchanged.clear()
                    if way < 0:
                        continue
                unchanged.add(way)  # changing an axis twice costs no less than once
                if len(unchanged) == distinct:
                    break
        return np.ascontiguousarray(grid).reshape(values.shape)

    def _along_axis(self, grid: Table, axis: int, *, backwards: bool) -> Table | None:
        """The least at each placement where one axis may change once; None where that changes nothing."""
        own = self._axes[axis]
        there, back = self._turned[axis]
        leading = grid.transpose(there)
        seen = leading.reshape(len(leading), len(grid), -1)
        least = seen
        if len(own.groups) < len(seen):
            least = np.empty((len(own.groups), *seen.shape[1:]))
            for i, (first, last) in enumerate(own.groups):
                least[i] = seen[first]
                for other in range(first + 1, last):
                    np.minimum(least[i], seen[other], out=least[i])
        cost = own.back if backwards else own.seconds
        after: Table = np.minimum.reduce(least[:, None] + cost[:, :, None], axis=0)
        if len(own.groups) < len(seen):
            after = after.take(own.number, axis=0)
        if not (after < seen).any():
            return None
        np.minimum(after, seen, out=after)
        return after.reshape(leading.shape).transpose(back)

    def _summed(self, grid: Table, *, backwards: bool) -> Table | None:
        """The least at each placement where there may be sums over several axes; None where that changes nothing."""
        found, changed = grid.copy(), False
        for src, dst, cost in self._at_once:
            start, end = (dst, src) if backwards else (src, dst)
            made, known = found[start] + cost, found[end]
            if (made < known).any():
                np.minimum(known, made, out=known)
                changed = True
        return found if changed else None

    def _axis(self, costs: ClassCosts, name: str, axis: int, *, is_param: bool) -> _Axis:
        """What changing one axis costs.

        An axis whose dim an axis after it splits has to wait until that has given up its shard.
        """
        own, trains = self.labels[axis], costs.whole(name).requires_grad
        others = [labels for i, labels in enumerate(self.labels) if i != axis]
        sizes = [size for i, size in enumerate(costs.sizes) if i != axis]
        shares, where = np.unique(_shares(others, sizes), return_inverse=True)
        known: dict[Conversion | None, Table] = {None: np.full(len(where), np.inf)}

        def seconds(src: State, dst: State) -> Table:
            made = conversion(src, dst, trains)
            if made is not None and made not in known:
                times = [costs.step_time(name, made, axis=axis, share=float(part)) for part in shares]
                found = np.array([time.forward_s + time.backward_s for time in times])
                known[made] = (np.where(found > 0, np.inf, 0.0) if is_param else found)[where.reshape(-1)]
            return known[made]

        groups = tuple(_groups(own))
        number = np.repeat(np.arange(len(groups)), [last - first for first, last in groups])
        cost = np.stack([
            np.stack([seconds(own[first], own[other if other != first else last - 1]) for other, _ in groups])
            for first, last in groups
        ])
        inner = self.labels[axis + 1 :]
        before = int(np.prod(self.shape[:axis], dtype=np.intp))
        for i, (first, _) in enumerate(groups):
            state = own[first]
            if state.kind is Kind.SHARDED:
                splits = np.zeros([len(labels) for labels in inner], dtype=np.bool_)
                for j, labels in enumerate(inner):
                    splits |= _along([s.kind is Kind.SHARDED and s.dim == state.dim for s in labels], j, len(inner))
                held = np.where(np.tile(splits.reshape(-1), before), np.inf, 0.0)
                cost[i] += held
                cost[:, i] += held
        for middle in range(len(groups)):
            np.minimum(cost, cost[:, middle, None] + cost[middle], out=cost)
        return _Axis(groups, number, cost, np.ascontiguousarray(cost.swapaxes(0, 1)))

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

                others = [i for i in range(num_axes) if i not in axes]
                share = _shares([self.labels[i] for i in others], [costs.sizes[i] for i in others])
                shares, where = np.unique(share, return_inverse=True)
                seconds = [sum(
                    time.forward_s + time.backward_s
                    for axis, part, step in sums(made, axes, float(held), costs.sizes)
                    for time in [costs.step_time(name, step, axis=axis, share=part)]
                ) for held in shares]
                yield at(src), at(dst), np.array(seconds)[where].reshape([self.shape[i] for i in others])


def _to_front(axis: int, num_axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The orders of a table's axes that put one to the front, and back."""
    rest = [other for other in range(num_axes) if other != axis]
    return (axis, *rest), (*range(1, axis + 1), 0, *range(axis + 1, num_axes))


def _rank(state: State) -> tuple[int, int, int, int]:
    """Sorts shards of one dim, those that are padded apart, behind all other states."""
    return (_KINDS.index(state.kind) if state.kind in _KINDS else len(_KINDS)), state.dim, state.length, state.outer


def _groups(own: Sequence[State]) -> Iterator[tuple[int, int]]:
    """Shards of one dim together, all other states alone."""
    first = 0
    while first < len(own):
        last = first + 1
        if own[first].kind is Kind.SHARDED and not own[first].length:
            while last < len(own) and (own[last].dim, own[last].length) == (own[first].dim, 0):
                last += 1
        yield first, last
        first = last


def _shares(labels: Sequence[Sequence[State]], sizes: Sequence[int]) -> Table:
    """What axes in these states leave of a tensor, for all of their placements."""
    share: Table = np.ones(1)
    for own, size in zip(labels, sizes, strict=True):
        parts = [1 / size if state.kind is Kind.SHARDED else 1.0 for state in own]
        share = np.multiply.outer(share, np.array(parts)).reshape(-1)
    return share


def _along(values: Sequence[bool], axis: int, rank: int) -> NDArray[np.bool_]:
    return np.array(values, dtype=np.bool_).reshape([-1 if i == axis else 1 for i in range(rank)])
