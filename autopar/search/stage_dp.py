"""find_stages: layers to stages to groups of devices, the least step time over tables of costs, with its proof.

For a bound on the bottleneck, a dynamic program over (layers left, nodes as they are left, stages behind) finds the
least sum of stage and link times whose every load stays below the bound: exact, for whatever is chosen before, the rest
costs the same. The bottlenecks that loads can have are then searched in halves, each solve going on from the loads that
it met: between a and b, no plan is under (least sum below b) + a. What is left of these intervals is the lower bound.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InfeasibleError
from autopar.search.elimination import Table
from autopar.search.objective import Objective, Score
from autopar.search.placement import Home, Placement, Profile, concrete_nodes, placements, whole_profile
from autopar.search.tables import Pool, Ranges, StageTables
from autopar.search.variants import Option

ROUNDING = 1e-12
Progress = Callable[[int, float | None, float], None]  # solves so far, best step time, lower bound


class StageCosts(Protocol):
    """What the search asks of a problem: `StageTables` is one, the planner's own costs are another."""

    @property
    def pools(self) -> tuple[Pool, ...]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_micro_batches(self) -> int: ...
    @property
    def max_stages(self) -> int | None: ...
    @property
    def num_strategies(self) -> int: ...
    def counts(self, strategy: int) -> tuple[int, ...]:
        """How many devices of each pool the strategy takes."""
    def ranges(self, strategy: int, in_flight: int) -> Ranges:
        """Times over all ranges of layers where so many micro-batches are in flight."""
    def sends_s(self, one: int, other: int, same_node: bool) -> tuple[Table, Table]:
        """At each border: seconds from a stage under `one` to the next under `other`, and back."""
    def border(self, strategy: int) -> int:
        """The same for strategies that send and receive alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundStage:
    """layers[first:last] under a strategy on these nodes, as (pool, index of node in it, devices)."""

    first: int
    last: int
    strategy: int
    in_flight: int
    time_s: float
    nodes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundStages:
    """The best stages and what was proved. `complete`: the search ended before its limits."""

    stages: tuple[FoundStage, ...]
    step_time_s: float
    score: Score
    lower_bound: float  # of the score's first part: no plan is below it
    idle: tuple[int, ...]  # devices of each pool that no stage uses
    num_solves: int
    complete: bool
    problem: int = 0  # which of several tables

    @property
    def gap(self) -> float:
        return self.score[0] / self.lower_bound - 1 if self.lower_bound > 0 else math.inf


State = tuple[Profile, Home | None, int]  # nodes as they are left; where the stage behind lies; its kind of border


@dataclass(slots=True)
class _Row:
    """Of one state, by the first layer that is placed: least sum, the load it has, and what was chosen."""

    total: Table
    load: Table
    end: NDArray[np.int32]
    via: NDArray[np.int32]  # index into `steps`
    steps: list[tuple[int, Placement, State]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Final:
    """All layers on some devices: the least sum below a bound, and the largest load that it has."""

    total: float
    load: float
    level: int
    state: State


class _Problem:
    """A problem's tables of times and loads, made once."""

    def __init__(self, costs: StageCosts) -> None:
        self.costs = costs
        self.prices = [pool.price_per_hour for pool in costs.pools]
        self.all = tuple(pool.num_devices for pool in costs.pools)
        self.counts = [costs.counts(s) for s in range(costs.num_strategies)]
        self.most_stages = min(costs.num_layers, sum(self.all), costs.max_stages or costs.num_layers)
        self._ranges: dict[tuple[int, int], tuple[Table, Table]] = {}
        self._sends: dict[tuple[int, int, bool], tuple[Table, Table]] = {}

    def ranges(self, strategy: int, level: int) -> tuple[Table, Table]:
        """(times, loads) over ranges for the stage that `level` stages follow."""
        in_flight = min(level + 1, self.costs.num_micro_batches)
        key = strategy, in_flight
        if key not in self._ranges:
            found = self.costs.ranges(strategy, in_flight)
            self._ranges[key] = found.time_s, found.load_s
        return self._ranges[key]

    def sends(self, one: int, border: int, same_node: bool) -> tuple[Table, Table]:
        """(sums, loads) at each border between a stage under strategy `one` and one with a kind of border."""
        key = self.costs.border(one), border, same_node
        if key not in self._sends:
            forward, backward = self.costs.sends_s(one, self._of_border[border], same_node)
            self._sends[key] = (
                forward + backward, (self.costs.num_micro_batches - 1) * np.maximum(forward, backward)
            )
        return self._sends[key]

    @cached_property
    def _of_border(self) -> dict[int, int]:
        return {self.costs.border(s): s for s in reversed(range(self.costs.num_strategies))}

    @cached_property
    def loads(self) -> Table:
        """Every load that any stage or link can have, ascending."""
        found = [np.zeros(1)]
        levels = min(self.most_stages, self.costs.num_micro_batches)
        for strategy in range(self.costs.num_strategies):
            for level in range(levels):
                loads = self.ranges(strategy, level)[1]
                found.append(np.unique(loads[np.isfinite(loads)]))
        borders = list(self._of_border.items())
        if self.most_stages > 1:
            for _, one in borders:
                for border, _ in borders:
                    found += [np.unique(self.sends(one, border, same)[1][1:-1]) for same in (False, True)]
        return np.unique(np.concatenate(found))

    def used(self, state: State) -> tuple[int, ...]:
        return tuple(
            total - sum(free for _, free in nodes) for total, nodes in zip(self.all, state[0], strict=True)
        )

    def solve(self, bound: float) -> tuple[dict[tuple[int, ...], _Final], list[dict[State, _Row]]]:
        """For each way to use devices the least sum with all loads at most `bound`; and the tables to read it from."""
        costs, n = self.costs, self.costs.num_layers
        start: State = (whole_profile([pool.nodes for pool in costs.pools]), None, -1)
        nothing = np.full(n + 1, np.inf)
        nothing[n] = 0.0
        empty = np.zeros(n + 1, dtype=np.int32)
        levels = [{start: _Row(nothing, np.zeros(n + 1), empty, empty)}]
        finals: dict[tuple[int, ...], _Final] = {}
        masked: dict[tuple[int, int], Table] = {}
        for level in range(self.most_stages):
            rows: dict[State, _Row] = {}
            for state, row in levels[level].items():
                for strategy in range(costs.num_strategies):
                    key = strategy, min(level, costs.num_micro_batches - 1)
                    times, loads = self.ranges(strategy, level)
                    if key not in masked:
                        masked[key] = np.where(loads <= bound, times, np.inf)
                    for placed in placements(state[0], self.counts[strategy], state[1]):
                        self._extend(rows, state, row, strategy, placed, masked[key], loads, bound)
            levels.append(rows)
            for state, row in rows.items():
                total = float(row.total[0])
                used = self.used(state)
                if math.isfinite(total):
                    best = finals.get(used)
                    load = float(row.load[0])
                    if best is None or (total, load) < (best.total, best.load):
                        finals[used] = _Final(total, load, level + 1, state)
        return finals, levels

    def _extend(
        self, rows: dict[State, _Row], state: State, row: _Row, strategy: int, placed: Placement, times: Table,
        loads: Table, bound: float,
    ) -> None:
        """Puts a stage under a strategy before what a row holds."""
        behind, behind_load = row.total, row.load
        if state[2] >= 0:
            sums, link_loads = self.sends(strategy, state[2], placed.same_node)
            behind = np.where(link_loads <= bound, behind + sums, np.inf)
            behind_load = np.maximum(behind_load, link_loads)
        total = times + behind[None, :]
        end = np.argmin(total, axis=1).astype(np.int32)
        at = np.arange(len(end))
        least = total[at, end]
        if not np.isfinite(least).any():
            return
        load = np.maximum(loads[at, end], behind_load[end])
        reached: State = (placed.profile, placed.home, self.costs.border(strategy))
        known = rows.get(reached)
        if known is None:
            rows[reached] = _Row(least, load, end, np.zeros_like(end), [(strategy, placed, state)])
            return
        better = (least < known.total) | ((least == known.total) & np.isfinite(least) & (load < known.load))
        if better.any():
            known.total = np.where(better, least, known.total)
            known.load = np.where(better, load, known.load)
            known.end = np.where(better, end, known.end)
            known.via = np.where(better, np.int32(len(known.steps)), known.via)
            known.steps.append((strategy, placed, state))

    def read(self, final: _Final, levels: list[dict[State, _Row]]) -> tuple[FoundStage, ...]:
        """The stages of a final, first to last."""
        state, at = final.state, 0
        found: list[tuple[int, int, int, Placement]] = []
        for level in range(final.level, 0, -1):
            row = levels[level][state]
            strategy, placed, behind = row.steps[int(row.via[at])]
            found.append((at, int(row.end[at]), strategy, placed))
            at, state = int(row.end[at]), behind
        order = [(tuple(p for p, n in enumerate(self.counts[s]) if n), placed) for _, _, s, placed in reversed(found)]
        nodes = concrete_nodes([pool.nodes for pool in self.costs.pools], order)[::-1]
        return tuple(
            FoundStage(
                first=first, last=last, strategy=strategy, nodes=own,
                in_flight=min(len(found) - i, self.costs.num_micro_batches),
                time_s=float(self.ranges(strategy, len(found) - i - 1)[0][first, last]),
            )
            for i, ((first, last, strategy, _), own) in enumerate(zip(found, nodes, strict=True))
        )


@dataclass(slots=True)
class _Best:
    """The best so far, and the intervals that are open: (score that none in it can beat, tie, problem, loads i..j)."""

    stages: tuple[FoundStage, ...] = ()
    step_time_s: float = math.inf
    score: Score = (math.inf, math.inf)
    problem: int = -1
    used: tuple[int, ...] = ()
    solves: int = 0
    heap: list[tuple[float, int, int, int, int]] = field(default_factory=list)
    cut: float = math.inf  # the least lower bound of what was left unsearched


def find_stages(
    *costs: StageCosts, objective: Objective | None = None, deadline: float | None = None,
    max_solves: int | None = None, progress: Progress | None = None,
) -> FoundStages:
    """The best stages over all the problems given (one for each size of micro-batch), proved as far as limits allow.

    `deadline` is of time.monotonic(). An interrupt ends the search as the deadline does where stages were found before.
    InfeasibleError where nothing fits, naming what is closest; the same input gives the same stages.
    """
    objective = objective or Objective()
    problems = [_Problem(own) for own in costs]
    best = _Best()
    for index, problem in enumerate(problems):
        heapq.heappush(best.heap, (0.0, 0, index, 0, len(problem.loads)))
    complete = True
    try:
        while best.heap and not _settled(best.heap[0][0], best.score[0]):
            late = deadline is not None and time.monotonic() > deadline
            if (late or (max_solves is not None and best.solves >= max_solves)) and best.stages:
                complete = False
                break
            lower = best.heap[0][0]
            best.cut = lower  # while it is in hand
            _, _, index, first, last = heapq.heappop(best.heap)
            _search(problems[index], index, first, last, best, objective)
            best.cut = math.inf
            if progress is not None:
                progress(best.solves, best.step_time_s if best.stages else None, lower)
    except KeyboardInterrupt:
        if not best.stages:
            raise
        complete = False
    if not best.stages:
        raise InfeasibleError(_nothing(objective))
    left = min([best.cut, *(entry[0] for entry in best.heap)])
    whole = problems[best.problem].all
    return FoundStages(
        stages=best.stages, step_time_s=best.step_time_s, score=best.score, lower_bound=min(best.score[0], left),
        idle=tuple(total - used for total, used in zip(whole, best.used, strict=True)), num_solves=best.solves,
        complete=complete, problem=best.problem,
    )


def _settled(lower: float, score: float) -> bool:
    return math.isfinite(score) and lower >= score * (1 - ROUNDING)


def _search(problem: _Problem, index: int, first: int, last: int, best: _Best, objective: Objective) -> None:
    """Solves below loads[last] and parts what is left of the bottlenecks loads[first:last]."""
    if first >= last:
        return
    loads = problem.loads
    finals, levels = problem.solve(float(loads[last - 1]))
    best.solves += 1
    for used in sorted(finals):
        final = finals[used]
        step = final.total + final.load
        score = objective.score(step, used, problem.prices)
        if math.isfinite(score[0]) and score < best.score:
            best.score, best.step_time_s, best.used, best.problem = score, step, used, index
            best.stages = problem.read(final, levels)
    if not finals:
        return

    def lower(at: int) -> float:
        return min(
            objective.score(final.total + float(loads[at]), used, problem.prices)[0] for used, final in finals.items()
        )

    # Bottlenecks from a final's own load on are settled for its devices: nothing there is below its sum and load.
    open_ = [
        final.load for used, final in finals.items()
        if not _settled(objective.score(final.total + float(loads[first]), used, problem.prices)[0], best.score[0])
    ]
    if not open_:
        return
    end = int(np.searchsorted(loads, max(open_)))
    if end <= first:
        return
    middle = (first + end) // 2
    for a, b in ((first, middle), (middle, end)):
        bound = lower(a) if a < b else math.inf
        if math.isfinite(bound) and not _settled(bound, best.score[0]):
            heapq.heappush(best.heap, (bound, b - a, index, a, b))


def _nothing(objective: Objective) -> str:
    if objective.max_step_time_s is not None:
        return (
            f"no stages fit into memory with a step of at most {objective.max_step_time_s:g} s; allow more time, more "
            "devices or options that hold less"
        )
    return "no stages fit into memory; give more devices, smaller micro-batches or options that hold less"


def chosen_options(tables: StageTables, stage: FoundStage) -> tuple[Option, ...]:
    """The option of each layer of a found stage."""
    found = tables.options(stage.strategy, stage.in_flight, stage.first, stage.last)
    assert found is not None, "the stage was found with options that fit"
    return found
