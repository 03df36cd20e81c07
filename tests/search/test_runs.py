"""The search for stages over pools: equal to trying all of them where links are free, never above it elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
import pytest

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
        self.layers = draw.uniform(0.5, 2.0, (len(self.groups), self.num_layers)) / [[s] for _, s in self.groups]
        self.once = draw.uniform(0.0, 0.5, (len(self.groups), self.num_layers))
        self.room = draw.integers(2, 9, len(self.groups))  # layers times micro-batches in flight

    def stage_times(self, group: int, limit_s: float) -> StageTimes:
        levels = [self._times(group, min(level + 1, self.num_micro_batches)) for level in range(self.max_stages)]
        return StageTimes(*(np.stack(own) for own in zip(*levels, strict=True)))

    def _times(self, group: int, in_flight: int) -> list[Table]:
        n, m = self.num_layers, self.num_micro_batches
        tables = [np.full((n + 1, n + 1), np.inf) for _ in fields(StageTimes)]
        for i in range(n):
            for j in range(i + 1, n + 1):
                if (j - i) * in_flight <= self.room[group]:
                    time, once = float(self.layers[group, i:j].sum()), float(self.once[group, i:j].sum())
                    end, later = once * self.end_share, self.later_share * (m - 1) * time
                    begins, before = (once, once - end) if i == 0 else (0.0, 0.0)
                    ends = once if i == 0 else end
                    found = (time + begins, m * time + begins, time + ends, m * time + ends, later, time / 3 + before,
                             m * time + once)
                    for table, value in zip(tables, found, strict=True):
                        table[i, j] = value
        return tables

    def link_times(self, group: int, pool: int, same_node: bool) -> tuple[Table, Table]:
        inner = np.full(self.num_layers + 1, self.link_s * (1 + pool) / (2 if same_node else 1))
        return inner, inner / 2


def bound_of(toy: RunCosts, stages: tuple[RunStage, ...]) -> float:
    """S, V and E of stages, first to last, in one."""
    through = least = done = 0.0
    m = toy.num_micro_batches
    behind: RunStage | None = None
    longest = 0.0
    for level, stage in enumerate(reversed(stages)):
        times = toy.stage_times(stage.group, math.inf)
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
        span = level, stage.first, stage.last
        least = max(least, through + float(times.later_s[span]))
        through += float(times.first_s[span])
        done = max(
            done + float(times.forward_s[span]), least + float(times.first_end_s[span]), float(times.own_end_s[span])
        )
        least = max(least + float(times.first_s[span]), float(times.own_s[span]))
        longest = max(longest, float(times.alone_s[span]))
        behind = stage
    return max(done, longest)


def every_plan(toy: RunCosts) -> list[tuple[RunStage, ...]]:
    """All stages on all devices, pools in any order, groups within nodes or of whole nodes."""
    found = []
    for order in permutations(range(len(toy.run_pools))):
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
