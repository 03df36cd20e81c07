"""The search for stages over pools: equal to trying all of them where links are free, never above it elsewhere.

The same where a stage may be run in several ways, whose times are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from autopar.search.elimination import Table
from autopar.search.runs import RunCosts, RunPool, Runs, RunStage, StageTimes


@dataclass
class Toy:
    """Layers whose times on each group are drawn at random; some ranges do not fit with many micro-batches in flight.
    """

    seed: int
    link_s: float = 0.0
    end_share: float = 0.0  # of what a stage does once a step, after its last backward
    later_share: float = 0.0  # of the micro-batches but for the first, after its backward
    num_ways: int = 1  # to run a stage

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        self.num_layers, self.num_micro_batches = int(draw.integers(2, 6)), int(draw.integers(1, 5))
        self.max_stages = int(draw.integers(2, 5))
        self.run_pools = tuple(
            RunPool(num_nodes=int(draw.integers(1, 3)), node_size=int(draw.integers(1, 3)))
            for _ in range(int(draw.integers(1, 4)))
        )
        self.groups = [
            (pool, size) for pool, own in enumerate(self.run_pools) for size in range(1, own.num_devices + 1)
            if size <= own.node_size or size % own.node_size == 0
        ]
        size = len(self.groups), self.num_ways, self.num_layers
        self.layers = draw.uniform(0.5, 2.0, size) / np.array([s for _, s in self.groups])[:, None, None]
        self.once = draw.uniform(0.0, 0.5 if self.num_ways == 1 else 2.0, size)
        self.room = draw.integers(2, 9, size[:2])  # layers times micro-batches in flight

    def stage_times(self, group: int, limit_s: float) -> StageTimes:
        ways = self.choices(group, limit_s)
        every = ([getattr(own, name.name) for own in ways] for name in fields(StageTimes))
        return StageTimes(*map(np.minimum.reduce, every))

    def choices(self, group: int, limit_s: float) -> tuple[StageTimes, ...]:
        return tuple(self._way(group, way) for way in range(self.num_ways))

    def _way(self, group: int, way: int) -> StageTimes:
        levels = [self._times(group, way, min(level + 1, self.num_micro_batches)) for level in range(self.max_stages)]
        pairs = np.triu_indices(self.num_layers + 1, 1)
        return StageTimes(*(np.stack([table[pairs] for table in own]) for own in zip(*levels, strict=True)))

    @property
    def ranges(self) -> NDArray[np.intp]:
        first, last = np.triu_indices(self.num_layers + 1, 1)
        found = np.full((self.num_layers + 1, self.num_layers + 1), len(first))
        found[first, last] = np.arange(len(first))
        return found

    def _times(self, group: int, way: int, in_flight: int) -> list[Table]:
        n, m = self.num_layers, self.num_micro_batches
        tables = [np.full((n + 1, n + 1), np.inf) for _ in fields(StageTimes)]
        for i in range(n):
            for j in range(i + 1, n + 1):
                if (j - i) * in_flight <= self.room[group, way]:
                    time, once = float(self.layers[group, way, i:j].sum()), float(self.once[group, way, i:j].sum())
                    end, later = once * self.end_share, self.later_share * (m - 1) * time
                    begins, before = (once, once - end) if i == 0 else (0.0, 0.0)
                    ends = once if i == 0 else end
                    found = (time + begins, m * time + begins, time + ends, m * time + ends, later, time / 3 + before,
                             once - end if i else 0.0, m * time + once)
                    for table, value in zip(tables, found, strict=True):
                        table[i, j] = value
        return tables

    def link_times(self, group: int, pool: int, same_node: bool) -> tuple[Table, Table]:
        inner = np.full(self.num_layers + 1, self.link_s * (1 + pool) / (2 if same_node else 1))
        return inner, inner / 2


def bound_of(toy: RunCosts, stages: tuple[RunStage, ...], ways: Sequence[StageTimes] | None = None) -> float:
    """S, V, E and G of stages, first to last, in one; `ways`: the times of each stage's group, as it is run."""
    through = least = done = 0.0
    m = toy.num_micro_batches
    behind: RunStage | None = None
    longest = 0.0
    for level, stage in enumerate(reversed(stages)):
        times = ways[len(stages) - 1 - level] if ways else toy.stage_times(stage.group, math.inf)
        pool, size = toy.groups[stage.group]
        if behind is not None:
            node = toy.run_pools[pool].node_size
            same_node = toy.groups[behind.group][0] == pool and (stage.start + size) % node != 0
            links = toy.link_times(stage.group, toy.groups[behind.group][0], same_node)
            there, back = (float(table[stage.last]) for table in links)
            done += there
            through, least = through + there + back, max(
                least + there + back, through + there + back + (m - 1) * max(there, back)
            )
        span = level, int(toy.ranges[stage.first, stage.last])
        least = max(least, through + float(times.later_s[span]))
        through += float(times.first_s[span])
        done = max(
            done + float(times.forward_s[span]), least + float(times.first_end_s[span]), float(times.own_end_s[span])
        )
        longest = max(longest, done + float(times.start_s[span]))
        least = max(least + float(times.first_s[span]), float(times.own_s[span]))
        longest = max(longest, float(times.alone_s[span]))
        behind = stage
    return max(done, longest)


def least_of_ways(toy: Toy) -> float:
    """The least bound of all stages that are run in any ways."""
    choices = [toy.choices(group, math.inf) for group in range(len(toy.groups))]
    return min((
        bound_of(toy, stages, ways) for stages in every_plan(toy)
        for ways in product(*(choices[stage.group] for stage in stages))
    ), default=math.inf)


def every_plan(toy: RunCosts, mask: int = -1) -> list[tuple[RunStage, ...]]:
    """All stages on all devices, or those of some pools, in any order, groups within nodes or of whole nodes."""
    found = []
    for order in permutations(pool for pool in range(len(toy.run_pools)) if mask >> pool & 1):
        def grow(at: int, pool: int, used: int, made: tuple[tuple[int, int, int, int], ...],
                 order: tuple[int, ...] = order) -> None:
            if pool == len(order):
                if at == toy.num_layers:
                    found.append(tuple(
                        RunStage(first, last, group, start, min(len(made) - i, toy.num_micro_batches))
                        for i, (first, last, group, start) in enumerate(made)
                    ))
                return
            own = toy.run_pools[order[pool]]
            if used == own.num_devices:
                grow(at, pool + 1, 0, made)
                return
            for group, (of, size) in enumerate(toy.groups):
                fits = used % own.node_size + size <= own.node_size if size <= own.node_size else not (
                    used % own.node_size)
                if of == order[pool] and used + size <= own.num_devices and fits and len(made) < toy.max_stages:
                    for last in range(at + 1, toy.num_layers + 1):
                        grow(last, pool, used + size, (*made, (at, last, group, used)))
        grow(0, 0, 0, ())
    return found


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_trying_all_where_links_are_free(seed: int) -> None:
    toy = Toy(seed)
    runs = Runs(toy)
    least = min((bound_of(toy, stages) for stages in every_plan(toy)), default=math.inf)
    assert runs.all_pools == 2 ** len(toy.run_pools) - 1
    found = runs.passed(math.inf)
    if math.isinf(least):
        assert runs.all_pools not in found.bounds_s
        return
    stages = found.stages[runs.all_pools]
    assert stages in every_plan(toy)
    assert found.bounds_s[runs.all_pools] <= least * (1 + 1e-9) <= bound_of(toy, stages) * (1 + 1e-8)
    limit = runs.least_limit(0.0, least * 1.5, rounds=40)
    assert limit <= least * (1 + 1e-9)
    assert limit >= least * (1 - 5e-3)
    assert runs.all_pools not in runs.passed(least * (1 - 1e-6)).bounds_s


@pytest.mark.parametrize(("seed", "link_s", "end_share", "later_share"), [
    *((seed, 0.4, 0.0, 0.0) for seed in range(40, 60)), *((seed, 0.0, 1.0, 0.0) for seed in range(60, 80)),
    *((seed, 0.4, 0.7, 0.9) for seed in range(80, 100)),
])
def test_never_above_trying_all_with_links_and_ends(
    seed: int, link_s: float, end_share: float, later_share: float
) -> None:
    toy = Toy(seed, link_s=link_s, end_share=end_share, later_share=later_share)
    runs = Runs(toy)
    bounds = [bound_of(toy, stages) for stages in every_plan(toy)]
    found = runs.passed(math.inf)
    assert (runs.all_pools in found.bounds_s) == any(map(math.isfinite, bounds))
    if runs.all_pools in found.bounds_s:
        assert found.bounds_s[runs.all_pools] <= min(bounds)
        assert bound_of(toy, found.stages[runs.all_pools]) < math.inf


@pytest.mark.parametrize("seed", range(100, 120))
def test_ways_apart_are_equal_to_trying_all_where_links_are_free(seed: int) -> None:
    toy = Toy(seed, num_ways=2)
    runs = Runs(toy)
    least = least_of_ways(toy)
    if math.isinf(least):
        return
    choices = [toy.choices(group, math.inf) for group in range(len(toy.groups))]
    assert runs.all_pools not in runs.passed(least * (1 - 1e-6), choices=choices).bounds_s
    limit = runs.least_limit(0.0, least * 1.5, rounds=40)
    assert least * (1 - 5e-3) <= limit <= least * (1 + 1e-9)


def test_ways_apart_are_never_above_trying_all_and_say_more() -> None:
    more = 0
    for seed in range(130, 150):
        toy = Toy(seed, link_s=0.2, end_share=0.5, later_share=0.5, num_ways=2)
        runs = Runs(toy)
        least = least_of_ways(toy)
        choices = [toy.choices(group, math.inf) for group in range(len(toy.groups))]
        apart, together = (
            runs.passed(math.inf, choices=own).bounds_s.get(runs.all_pools, math.inf) for own in (choices, None)
        )
        assert math.isinf(least) == math.isinf(apart)
        assert together * (1 - 1e-9) <= apart <= least
        assert runs.least_limit(0.0, least * 1.5, rounds=40) <= least * (1 + 1e-9)
        apart, together = (
            runs.passed(least * 0.999, choices=own).bounds_s.get(runs.all_pools, math.inf) for own in (choices, None)
        )
        more += together < apart
    assert more > 1, more


@pytest.mark.parametrize("seed", range(160, 190))
def test_what_uses_some_pools_passes_where_its_bound_is_below_the_limit(seed: int) -> None:
    toy = Toy(seed)
    runs = Runs(toy)
    for mask in range(1, runs.all_pools + 1):
        least = min((bound_of(toy, stages) for stages in every_plan(toy, mask)), default=math.inf)
        if math.isfinite(least):
            assert mask not in runs.passed(least * (1 - 1e-6)).bounds_s
            found = runs.passed(least * (1 + 1e-6))
            assert found.bounds_s[mask] <= least * (1 + 1e-9)
            assert found.stages[mask] in every_plan(toy, mask)
