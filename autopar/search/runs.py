"""The quickest stages over pools of devices, by one pass of a dynamic program for a limit of the step time.

Stages are placed from the last to the first. Those of one pool follow one another and take its devices in order, in
parts of a node or in whole nodes; pools come in any order. For stages that are placed let S be the first micro-batch's
time through them and back, and V the least step time less what comes before them. With x what a micro-batch takes on
the stage that is placed next, o = m x all m of them, and c and c' what a link takes (activations, gradients),

    S' = S + c + c' + x        V' = max(V + c + c' + x, S' + (m - 1) max(c, c'), o)

so that V of all layers bounds the step in whatever order stages do their work, as long as backwards are whole: the
first micro-batch comes to a stage through all stages before it, and the last goes back through them. After its last
backward a stage has e to do (reductions, the optimizer's step), while earlier stages go on. With f what a forward
takes, and E the least step time less the first micro-batch's way to the stages that are placed,

    E' = max(E + c + f, V' + e)

Before its first forward a stage has g to do (gathering its parameters), which it may do while it waits. After that all
takes as long as if the first micro-batch had come at once, so that with G the least step time however early that comes

    G' = max(G, g + E')

and the step of all stages takes max(E, G), where what the chain's first stage does before its first forward is in E.

Before its first backward a stage has no more micro-batches in flight than fit into its memory: after that it still has
all other backwards and the forwards of the rest to do. With r for these V' is also at least S' + r.

S, V, E and G are minimized apart, which keeps the bound true; stages that take longer than the limit by themselves, and
what has G above it, are left out, as is what has placed so few layers that the devices that are left cannot have all
others. The smaller the limit that still lets stages pass, the more is known: `least_limit` halves it. A stage's times
are the least of several ways to run it, each by itself; with the ways apart a pass takes longer and says more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.search.elimination import Table

GENEROUS = 1e-9  # relative; sums are rounded
PRECISE = 1e-3  # relative; what is less between limits is not halved


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPool:
    """Nodes that are alike: how many, and devices of each."""

    num_nodes: int
    node_size: int

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.node_size


@dataclass(frozen=True, slots=True, eq=False)
class StageTimes:
    """[stages behind, sort of range] for all ranges of layers, never above the truth; infinite where not allowed.

    `first_s`: one micro-batch, with what the chain's first stage does once a step; `own_s`: all micro-batches, with the
    same; `first_end_s` and `own_end_s`: these with what a stage does after its last backward; `later_s`: what it has to
    do after its first backward; `forward_s`: the forward of one micro-batch, with what the chain's first stage does
    before it; `start_s`: what any other stage does before its first forward, which may be while it waits; `alone_s`:
    all that the stage does in a step.
    """

    first_s: Table
    own_s: Table
    first_end_s: Table
    own_end_s: Table
    later_s: Table
    forward_s: Table
    start_s: Table
    alone_s: Table


class RunCosts(Protocol):
    """What the search asks of a problem. A group is a number of devices of one pool."""

    num_layers: int
    max_stages: int
    num_micro_batches: int

    @property
    def groups(self) -> Sequence[tuple[int, int]]:
        """(pool, devices) of each."""
    @property
    def run_pools(self) -> Sequence[RunPool]: ...
    @property
    def ranges(self) -> NDArray[np.intp]:
        """[first, last]: which sort of range layers[first:last] is; where that is empty, one beyond the last sort."""
    def stage_times(self, group: int, limit_s: float) -> StageTimes:
        """Those of stages that take the limit or more may be infinite. The costs keep them."""
    def choices(self, group: int, limit_s: float) -> Sequence[StageTimes]:
        """The same of ways to run stages, apart: each way has one here that takes no more in any of these times."""
    def link_times(self, group: int, pool: int, same_node: bool) -> tuple[Table, Table]:
        """At each border: seconds of a micro-batch from a group to the next, of that pool, and of its gradients back.
        """


@dataclass(frozen=True, slots=True)
class RunStage:
    """layers[first:last] on devices[start:start + size] of the group's pool."""

    first: int
    last: int
    group: int
    start: int
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Of each set of whole pools, as bits, the least bound below the limit and the stages that have it.

    `others`: of all pools the stages of least bound for each number of stages and pool that comes first, with their
    bounds, the least first.
    """

    limit_s: float
    bounds_s: dict[int, float]
    stages: dict[int, tuple[RunStage, ...]]
    others: tuple[tuple[float, tuple[RunStage, ...]], ...] = ()


Key = tuple[int, int, int]  # pools that are used, as bits; the last of them; how many of its devices are used
START: Key = (0, -1, 0)


@dataclass(slots=True)
class _State:
    """By stages placed and first layer: S, V, E, G, the end of the stage placed last and how it came (`steps`)."""

    through_s: Table
    least_s: Table
    done_s: Table
    whole_s: Table
    end: NDArray[np.int16]
    via: NDArray[np.int16]
    steps: list[tuple[int, Key]] = field(default_factory=list)


class Runs:
    """The search over one problem; keeps its tables."""

    def __init__(self, costs: RunCosts) -> None:
        self.costs, self._pools = costs, tuple(costs.run_pools)
        self._of_pool = [[g for g, (own, _) in enumerate(costs.groups) if own == pool]
                         for pool in range(len(self._pools))]
        self._lengths = np.zeros(int(costs.ranges.max()) + 1, dtype=np.intp)  # of each sort of range
        first, last = np.triu_indices(len(costs.ranges), 1)
        self._lengths[costs.ranges[first, last]] = last - first
        self._links: dict[tuple[int, int, bool], tuple[Table, Table, Table]] = {}
        self.num_passes = 0

    @property
    def all_pools(self) -> int:
        return (1 << len(self._pools)) - 1

    def least_limit(
        self, lower_s: float, upper_s: float, rounds: int = 6,
        met: Callable[[tuple[RunStage, ...]], None] | None = None,
    ) -> float:
        """A step time that no stages of all pools are under, between what is known and a limit that lets some pass.

        Ways to run a stage are apart here. After the upper limit, just above what is known comes first: stages that
        really take it pass below any limit. `met` gets the stages of least bound below each limit that lets some pass.
        """
        choices = [self.costs.choices(group, upper_s) for group in range(len(self.costs.groups))]
        for done in range(rounds):
            if upper_s - lower_s <= PRECISE * upper_s:
                break
            middle = (upper_s, lower_s + PRECISE / 2 * upper_s, (lower_s + upper_s) / 2)[min(done, 2)]
            passed = self.passed(middle, partly=False, choices=choices)
            if self.all_pools not in passed.bounds_s:
                lower_s = middle
            else:
                upper_s = middle
                lower_s = max(lower_s, min(passed.bounds_s[self.all_pools], middle))
                if met is not None:
                    met(passed.stages[self.all_pools])
        return lower_s

    def passed(
        self, limit_s: float, *, partly: bool = True, choices: Sequence[Sequence[StageTimes]] | None = None
    ) -> Passed:
        """The stages of least bound below the limit; `partly`: read those of fewer pools too."""
        self.num_passes += 1
        n, most = self.costs.num_layers, self.costs.max_stages
        nothing = np.full((most + 1, n + 1), np.inf)
        nothing[0, n] = 0.0
        none = np.full((most + 1, n + 1), -1, dtype=np.int16)
        states: dict[Key, _State] = {START: _State(nothing, nothing, nothing, nothing, none, none)}
        groups = range(len(self.costs.groups))
        choices = choices or [[self.costs.stage_times(group, limit_s)] for group in groups]
        tables = [[own for times in each for own in _within(times, limit_s)] for each in choices]
        longest = [max((self._longest(own[0]) for own in each), default=0) for each in tables]
        reach = self._reach(longest, partly=partly)
        for mask in range(1, self.all_pools + 1):
            for pool in range(len(self._pools)):
                if mask >> pool & 1:
                    self._run(states, tables, longest, reach, mask, pool, limit_s)
        bounds: dict[int, float] = {}
        stages: dict[int, tuple[RunStage, ...]] = {}
        for mask in range(1, self.all_pools + 1) if partly else (self.all_pools,):
            best: tuple[float, Key, int] | None = None
            for pool, own in enumerate(self._pools):
                state = states.get((mask, pool, own.num_devices))
                if state is not None:
                    values = np.maximum(state.done_s[:, 0], state.whole_s[:, 0])
                    level = int(np.argmin(values))
                    value = float(values[level])
                    if value < limit_s and (best is None or value < best[0]):
                        best = value, (mask, pool, own.num_devices), level
            if best is not None:
                bounds[mask] = best[0] * (1 - GENEROUS)
                stages[mask] = self._read(states, *best[1:])
        return Passed(
            limit_s=limit_s, bounds_s=bounds, stages=stages, others=self._others(states, limit_s) if partly else (),
        )

    def _others(
        self, states: dict[Key, _State], limit_s: float
    ) -> tuple[tuple[float, tuple[RunStage, ...]], ...]:
        found: list[tuple[float, int, Key]] = []
        for pool, own in enumerate(self._pools):
            key = (self.all_pools, pool, own.num_devices)
            if key in states:
                values = np.maximum(states[key].done_s[:, 0], states[key].whole_s[:, 0])
                found += [(float(value), level, key) for level, value in enumerate(values) if value < limit_s]
        return tuple((bound * (1 - GENEROUS), self._read(states, key, level)) for bound, level, key in sorted(found))

    def _reach(self, longest: Sequence[int], *, partly: bool) -> dict[Key, Table]:
        """By what is placed, and how many stages may follow: the most layers that the devices left can have.

        `longest`: of each group the most layers of a stage. `partly`: other pools may be left unused.
        """
        most = self.costs.max_stages
        rest: list[list[Table]] = []
        for pool, own in enumerate(self._pools):
            found = [np.full(most + 1, -np.inf) for _ in range(own.num_devices + 1)]
            found[-1][:] = 0.0
            for start in reversed(range(own.num_devices)):
                for group in self._of_pool[pool]:
                    size = self.costs.groups[group][1]
                    if longest[group] and start + size <= own.num_devices and _lies_well(start, size, own.node_size):
                        np.maximum(found[start][1:], longest[group] + found[start + size][:-1], out=found[start][1:])
            rest.append(found)
        others = [np.zeros(most + 1)]  # by the pools that are left
        for left in range(1, self.all_pools + 1):
            pool = left.bit_length() - 1
            before = others[left ^ (1 << pool)]
            both = _most_together(rest[pool][0], before)
            others.append(np.maximum(both, before) if partly else both)
        return {
            (mask, pool, used): _most_together(rest[pool][used], others[self.all_pools ^ mask])
            for mask in range(1, self.all_pools + 1) for pool, own in enumerate(self._pools) if mask >> pool & 1
            for used in range(own.num_devices + 1) if rest[pool][used].max() >= 0
        }

    def _run(
        self, states: dict[Key, _State], tables: Sequence[Sequence[Table]], longest: Sequence[int],
        reach: dict[Key, Table], mask: int, pool: int, limit_s: float,
    ) -> None:
        """Fills the states of the pool as the first in the chain of those in the mask."""
        own, before = self._pools[pool], mask ^ (1 << pool)
        starts = [START] if not before else [
            (before, last, self._pools[last].num_devices) for last in range(len(self._pools)) if before >> last & 1
        ]
        for used in range(1, own.num_devices + 1):
            made: _State | None = None
            if (mask, pool, used) not in reach:
                continue
            most_left = np.maximum(reach[mask, pool, used][::-1], -1)  # by stages placed
            for group in self._of_pool[pool]:
                size = self.costs.groups[group][1]
                start = used - size
                if start < 0 or not _lies_well(start, size, own.node_size):
                    continue
                for key in starts if start == 0 else [(mask, pool, start)]:
                    behind = states.get(key)
                    if behind is not None:
                        same_node = key[1] == pool and start % own.node_size != 0
                        for table in tables[group]:
                            made = self._extend(
                                made, behind, key, group, table, longest[group], most_left, same_node, limit_s
                            )
            if made is not None:
                states[mask, pool, used] = made

    def _extend(
        self, made: _State | None, behind: _State, key: Key, group: int, times: Table, longest: int,
        most_left: Table, same_node: bool, limit_s: float,
    ) -> _State | None:
        """Puts a stage on a group before what a state holds."""
        levels, columns = _finite(behind.done_s[:-1])
        if levels.start == levels.stop:
            return made
        left = most_left[levels.start + 1 : levels.stop + 1]
        rows = slice(max(0, columns.start - longest), int(min(columns.stop - 1, left.max() + 1)))
        if rows.start >= rows.stop:
            return made
        first, own, first_end, own_end, later, forward, start = times[:, levels, self.costs.ranges[rows, columns]]
        through, least, done, whole = (
            own[levels, columns] for own in (behind.through_s, behind.least_s, behind.done_s, behind.whole_s)
        )
        if key[1] >= 0:
            there, once, every = (own[columns] for own in self._link(group, key[1], same_node))
            through, done = through + once, done + there
            least = np.maximum(least + once, through + every)
        before = np.maximum(least[:, None, :], through[:, None, :] + later)
        total = np.maximum(before + first, own)
        ended = np.maximum(np.maximum(before + first_end, own_end), done[:, None, :] + forward)
        ended = np.maximum(ended, total)
        whole = np.maximum(ended + start, whole[:, None, :])
        out = (whole > limit_s) | (np.arange(rows.start, rows.stop)[:, None] > left[:, None, None])
        ended[out] = np.inf
        end = np.argmin(ended, axis=2)
        value = np.take_along_axis(ended, end[:, :, None], axis=2)[:, :, 0]
        if not np.isfinite(value).any():
            return made
        whole, sums, total = (
            np.where(out, np.inf, own).min(axis=2) for own in (whole, through[:, None, :] + first, total)
        )
        if made is None:
            shape = behind.through_s.shape
            made = _State(np.full(shape, np.inf), np.full(shape, np.inf), np.full(shape, np.inf),
                          np.full(shape, np.inf), np.full(shape, -1, dtype=np.int16),
                          np.full(shape, -1, dtype=np.int16))
        at = slice(levels.start + 1, levels.stop + 1), rows
        better = value < made.done_s[at]
        made.done_s[at] = np.where(better, value, made.done_s[at])
        made.end[at] = np.where(better, end + columns.start, made.end[at])
        made.via[at] = np.where(better, len(made.steps), made.via[at])
        made.least_s[at] = np.minimum(made.least_s[at], total)
        made.whole_s[at] = np.minimum(made.whole_s[at], whole)
        made.through_s[at] = np.minimum(made.through_s[at], sums)
        made.steps.append((group, key))
        return made

    def _longest(self, times: Table) -> int:
        """The most layers of a range that is allowed at any level."""
        return int(self._lengths[np.isfinite(times).any(axis=0)].max(initial=0))

    def _link(self, group: int, pool: int, same_node: bool) -> tuple[Table, Table, Table]:
        """At each border: seconds of the first micro-batch there, there and back, and what the others add."""
        key = group, pool, same_node
        if key not in self._links:
            forward, backward = self.costs.link_times(group, pool, same_node)
            self._links[key] = (
                forward, forward + backward, (self.costs.num_micro_batches - 1) * np.maximum(forward, backward)
            )
        return self._links[key]

    def _read(self, states: dict[Key, _State], key: Key, level: int) -> tuple[RunStage, ...]:
        """The stages of a state from layer 0 on, first to last."""
        found, at = [], 0
        while level:
            state = states[key]
            group, behind = state.steps[int(state.via[level, at])]
            last = int(state.end[level, at])
            pool, size = self.costs.groups[group]
            # Counted from the end of the pool, so that the first stage has its first devices.
            start = self._pools[pool].num_devices - key[2]
            found.append(RunStage(at, last, group, start, min(level, self.costs.num_micro_batches)))
            assert behind[1] != pool or behind[2] == key[2] - size
            at, level, key = last, level - 1, behind
        return tuple(found)


def _within(times: StageTimes, limit_s: float) -> list[Table]:
    """[time, stages behind, sort] as in `StageTimes` but for the last; none where the limit allows no stage.

    Infinite for stages that take longer, and where there is no range.
    """
    first, *others, alone = (getattr(times, own.name) for own in fields(StageTimes))
    first = np.where(alone > limit_s, np.inf, first)
    if not np.isfinite(first).any():
        return []
    return [np.pad(np.stack([first, *others]), ((0, 0), (0, 0), (0, 1)), constant_values=np.inf)]


def _most_together(one: Table, other: Table) -> Table:
    """By stages in all, the most layers of both, whose stages may be parted in any way."""
    return np.array([(one[: k + 1] + other[k::-1]).max() for k in range(len(one))])


def _finite(table: Table) -> tuple[slice, slice]:
    """The rows and the columns between which all finite entries are."""
    finite = np.isfinite(table)
    rows, columns = (np.flatnonzero(finite.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _lies_well(start: int, size: int, node_size: int) -> bool:
    """Whether a group that takes the devices from `start` on is a part of one node, or whole nodes."""
    if size <= node_size:
        return start % node_size + size <= node_size
    return start % node_size == 0 and size % node_size == 0

