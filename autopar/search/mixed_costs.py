"""What groups of a cluster's devices cost as stages of a model, as the tables that `runs` searches.

Pools are the cluster's nodes of one kind and size. A group is a number of devices of one pool; on a range of blocks it
stands for the best of its settings (tensor axis, ZeRO level, sequence parallelism, and a context axis where rows are
too few), which may differ from stage to stage. No time here is above the simulator's under 1F1B (`bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from operator import and_

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cost_models.collectives import collective_time_s, send_recv_time_s
from autopar.cost_models.memory import GRADIENT_BYTES
from autopar.cost_models.op_kinds import element_bytes
from autopar.search.best_first import Engine
from autopar.search.block_table import StageTimes as BlockTimes
from autopar.search.candidates import Candidate, axis_variants, divisors, fewest_context_ranks
from autopar.search.elimination import Table
from autopar.search.runs import RunPool, StageTimes
from autopar.search.stage_kinds import StageKind
from autopar.sharding.reshard import Collective
from autopar.sharding.rewrite import Rewrite

MAX_STAGES = 8
FEW_NODES = 4  # of a pool, up to which parts of a node are groups too


@dataclass(frozen=True, slots=True)
class Setting:
    """How a group of devices may run a stage, and what its devices are."""

    candidate: Candidate
    kind: StageKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """What a group takes, and the useful settings with all that they take, by micro-batches in flight less one.

    Stages that take `limit_s` or more may be left out.
    """

    times: StageTimes
    useful: tuple[tuple[Setting, Table], ...]
    limit_s: float


class ClusterPools:
    """The pools of a cluster, and the ranks of their nodes."""

    def __init__(self, cluster: Cluster) -> None:
        kinds: dict[object, list[int]] = {}
        for index, node in enumerate(cluster.nodes):
            kinds.setdefault((node.device, node.link, node.network, node.num_devices), []).append(index)
        self.cluster = cluster
        self.nodes = tuple(tuple(own) for own in kinds.values())  # of each pool the indices in the cluster
        self.pools = tuple(
            RunPool(num_nodes=len(own), node_size=cluster.nodes[own[0]].num_devices) for own in self.nodes
        )
        first_rank = np.concatenate([[0], np.cumsum([node.num_devices for node in cluster.nodes])])
        self._first_rank = [int(rank) for rank in first_rank]

    def name(self, pool: int) -> str:
        """The pool as in a cluster's shorthand."""
        own = self.pools[pool]
        return f"{own.num_nodes}x{own.node_size}x{self.cluster.nodes[self.nodes[pool][0]].device.name}"

    def sizes(self, pool: int) -> list[int]:
        """The numbers of devices that a group of the pool may have: parts of a node, and whole nodes."""
        own = self.pools[pool]
        if own.num_nodes <= FEW_NODES:
            return [*divisors(own.node_size), *(own.node_size * count for count in range(2, own.num_nodes + 1))]
        counts = {2**power for power in range(own.num_nodes.bit_length())} | {own.num_nodes}
        return [own.node_size * count for count in sorted(counts)]

    def ranks(self, pool: int, start: int, size: int) -> tuple[int, ...]:
        """The ranks of the pool's devices from `start` on."""
        every = [
            rank for node in self.nodes[pool] for rank in range(self._first_rank[node], self._first_rank[node + 1])
        ]
        return tuple(every[start : start + size])


class MixedCosts:
    """The costs of all stages with `num_micro_batches` micro-batches and these rewrites of layers.

    `context`: stages may have context axes too.
    """

    def __init__(
        self, engine: Engine, pools: ClusterPools, num_micro_batches: int, rewrites: tuple[Rewrite, ...],
        *, context: bool = False,
    ) -> None:
        self.engine, self.cluster_pools, self.num_micro_batches = engine, pools, num_micro_batches
        self.rewrites, self._context = rewrites, context
        self.run_pools = pools.pools
        self.num_layers = len(engine.graph.blocks)
        self.max_stages = min(MAX_STAGES, self.num_layers)
        self._rows = engine.request.global_batch // num_micro_batches
        self.groups: list[tuple[int, int]] = []  # (pool, devices)
        self.settings: list[list[Setting]] = []
        for pool in range(len(pools.pools)):
            for size in pools.sizes(pool):
                found = self._settings(pool, size)
                if found:
                    self.groups.append((pool, size))
                    self.settings.append(found)
        self._made: dict[int, _Made] = {}

    def _settings(self, pool: int, size: int) -> list[Setting]:
        engine, found = self.engine, []
        ranks, node_size = self.cluster_pools.ranks(pool, 0, size), self.run_pools[pool].node_size
        for tp in divisors(min(size, node_size)):
            cp = fewest_context_ranks(self._rows, size // tp, tp, node_size, engine.request.micro_batch)
            if cp is None or (cp > 1 and not self._context):
                continue
            dp = size // tp // cp
            # The last that splits weights: with sequence parallelism where hidden states allow it.
            for sequence_parallel, split_weights in [own for own in axis_variants(engine.chooser, tp) if own[1]][-1:]:
                choice = engine.chooser.choose(
                    tp, sequence_parallel=sequence_parallel, split_weights=split_weights, cp=cp
                )
                if choice is None or choice.rewrites != self.rewrites:
                    continue
                for zero, replicate, shard in [(0, dp, 1)] + ([(z, 1, dp) for z in (1, 2, 3)] if dp * cp > 1 else []):
                    candidate = Candidate(
                        pp=2, tp=tp, cp=cp, dp_replicate=replicate, dp_shard=shard, zero=zero,
                        sequence_parallel=sequence_parallel, split_weights=split_weights, offload_optimizer=False,
                        micro_batch=self._rows // dp, num_micro_batches=self.num_micro_batches,
                    )
                    found.append(Setting(candidate, engine.layout.kind_of(candidate, ranks)))
        return found

    @property
    def num_context(self) -> int:
        """How many of the settings have a context axis."""
        return sum(own.candidate.cp > 1 for settings in self.settings for own in settings)

    def stage_times(self, group: int, limit_s: float) -> StageTimes:
        """By stages behind, times of all sorts of ranges, each the least of any setting.

        They may be infinite where a stage takes the limit. Settings that are nowhere the best even with all activations
        kept are left out.
        """
        if group not in self._made or self._made[group].limit_s < limit_s:
            self._made[group] = self._make(group, limit_s)
        return self._made[group].times

    def choices(self, group: int, limit_s: float) -> tuple[StageTimes, ...]:
        """The times of settings apart, without those of which others take no more at any time.

        They may be infinite where a stage takes the limit, or where another setting takes no more at any time.
        """
        made: list[StageTimes] = []
        for setting, _ in self._tables[group]:
            if _none_below(self.times_of(group, setting), made, limit_s).any():
                own = self.times_of(group, setting, limit_s)
                if (left := _none_below(own, made, limit_s)).any():
                    made.append(replace(own, first_s=np.where(left, own.first_s, np.inf)))
        return tuple(map(self._by_level, made))

    def _make(self, group: int, limit_s: float) -> _Made:
        least: StageTimes | None = None
        useful = []
        for setting, _ in self._tables[group]:
            if least is None or _is_less(self.times_of(group, setting), least, limit_s):
                own = self.times_of(group, setting, limit_s)
                least = own if least is None else StageTimes(*map(np.minimum, _values(least), _values(own)))
                useful.append((setting, own.alone_s))
        assert least is not None, "groups have settings"
        return _Made(times=self._by_level(least), useful=tuple(useful), limit_s=limit_s)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """The numbers of micro-batches that stages have in flight at least."""
        return tuple(range(1, min(self.max_stages, self.num_micro_batches) + 1))

    def _by_level(self, times: StageTimes) -> StageTimes:
        """The times by stages behind, from those by micro-batches in flight."""
        of_level = np.minimum(np.arange(self.max_stages), len(self._counts) - 1)
        return StageTimes(*(own[of_level] for own in _values(times)))

    def times_of(self, group: int, setting: Setting, limit_s: float | None = None) -> StageTimes:
        """The times of one setting by micro-batches in flight; rough ones, where there is no limit."""
        found = self.engine.bounds.ranges.stage_ranges(
            setting.candidate, setting.kind, self._counts, closer=limit_s is not None,
            limit_s=np.inf if limit_s is None else limit_s,
        )
        m, tied_s = self.num_micro_batches, self._tied_s(group, setting)
        shape = len(self._counts), len(found.once_beside_s)
        through, once = (np.broadcast_to(own, shape) for own in (found.through_s, found.once_s))
        start = np.maximum(found.start_beside_s, 0.0)
        end = np.where(self._first, once + tied_s, np.maximum(found.once_beside_s - found.start_beside_s, 0.0))
        own_once = np.where(self._first, once + tied_s, 0.0)
        fits = np.isfinite(through)
        return StageTimes(
            first_s=through + own_once, own_s=m * through + own_once, first_end_s=through + end,
            own_end_s=m * through + end, later_s=found.later_s, alone_s=m * through + once,
            forward_s=np.where(fits, found.forward_s + np.where(self._first, start, 0.0), np.inf),
            start_s=np.where(fits, np.where(self._first, 0.0, start), np.inf),
        )

    @cached_property
    def ranges(self) -> NDArray[np.intp]:
        """[first, last]: the sort of each range of blocks."""
        return self.engine.bounds.ranges.ranges

    @cached_property
    def _first(self) -> NDArray[np.bool_]:
        """Of each sort of range whether it begins the chain: no other has its first block."""
        found = np.zeros(int(self.ranges.max()), dtype=np.bool_)
        found[self.ranges[0, 1:]] = True
        return found

    def forget(self) -> None:
        """Drops tables that can be made again."""
        self._made.clear()

    @cached_property
    def _tables(self) -> list[list[tuple[Setting, BlockTimes]]]:
        """Of each group the settings and what blocks take under them, those first that take all blocks soonest."""
        found = []
        for settings in self.settings:
            tables = [(own, self.engine.bounds.stage_table(own.candidate, own.kind)) for own in settings]
            found.append(sorted(tables, key=lambda each: float(
                self.num_micro_batches * (each[1].forward_s + each[1].backward_s).sum() + each[1].once_beside_s.sum()
            )))
        return found

    def _tied_s(self, group: int, setting: Setting) -> float:
        """The least that summing the gradients of what the first and the last block share takes, over all pools."""
        if not self._tied_numel:
            return 0.0
        pools, c = self.cluster_pools, setting.candidate
        own = self.groups[group][0]
        size = GRADIENT_BYTES * self._tied_numel / (c.dp_shard if c.zero else 1)
        others = [other for other in range(len(self.run_pools)) if other != own]
        return min((
            collective_time_s(
                Collective.ALL_REDUCE, size, pools.cluster.group(pools.ranks(own, 0, 1) + pools.ranks(other, 0, 1)),
                groups_per_node=c.tp * c.dp_shard,
            ) for other in others
        ), default=0.0)

    @cached_property
    def _tied_numel(self) -> int:
        graph = self.engine.graph
        shared = set(graph.blocks[0].params) & set(graph.blocks[-1].params)
        return sum(graph.param[name].numel for name in shared) if len(graph.blocks) > 1 else 0

    def best_settings(self, group: int, in_flight: int, first: int, last: int) -> list[Setting]:
        """The settings that fit a range, the best first."""
        if group not in self._made:
            self._made[group] = self._make(group, np.inf)
        at = in_flight - 1, self.ranges[first, last]
        times = [(float(alone[at]), own) for own, alone in self._made[group].useful]
        return [own for time, own in sorted(times, key=lambda each: each[0]) if np.isfinite(time)]

    def fluid_bound(self) -> float:
        """No stages take less: were the work spread over all devices in parts of any size.

        A second of a device of each pool is priced by how much the pool does in it; each block is done where it costs
        least, and all devices together have so many priced seconds in a step.
        """
        m, n = self.num_micro_batches, self.num_layers
        least = np.full((len(self.run_pools), n), np.inf)  # device-seconds of each block
        for (pool, size), tables in zip(self.groups, self._tables, strict=True):
            for _, table in tables:
                least[pool] = np.minimum(least[pool], size * m * (table.forward_s + table.backward_s))
        rate = np.array([1 / each.sum() if each.sum() > 0 else np.inf for each in least])
        count = np.array([pool.num_devices for pool in self.run_pools])
        if not (count * rate).sum() > 0 or np.isinf(rate).any():
            return 0.0 if np.isinf(rate).any() else np.inf
        with np.errstate(invalid="ignore"):
            priced = np.where(rate[:, None] > 0, rate[:, None] * least, np.inf).min(axis=0).sum()
        return float(priced / (count * rate).sum())

    def link_times(self, group: int, pool: int, same_node: bool) -> tuple[Table, Table]:
        """At each border: seconds of what passes, at the least that any settings send, and back."""
        pools = self.cluster_pools
        own, size = self.groups[group]
        here, there = self.run_pools[own], self.run_pools[pool]
        if same_node:
            shape = pools.cluster.group(pools.ranks(own, 0, here.node_size)[:: max(1, here.node_size - 1)][:2])
            shares = (1 / size, 1 / here.node_size)
            flows = (1, 1)
        else:
            last = pools.ranks(pool, there.num_devices - 1, 1)
            shape = pools.cluster.group(pools.ranks(own, 0, 1) + last)
            flows = (min(size, here.node_size), there.node_size)
            shares = (1 / size, 1 / there.num_devices)
        forward, backward = (
            np.array([send_recv_time_s(amount * share, shape, flows_per_node=number) for amount in sizes])
            for sizes, share, number in zip(self._passing, shares, flows, strict=True)
        )
        return forward, backward

    @cached_property
    def _passing(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes of a micro-batch at each border between blocks, forward and backward; nothing at both ends."""
        graph, rows = self.engine.graph, self._rows
        sizes: dict[str, tuple[float, float]] = {}
        for block in graph.blocks:
            cls = graph.block_class[block.cls]
            width = element_bytes(cls, graph.captured_dtype, self.engine.request.dtype)
            for name, own in zip(block.outputs, cls.outputs, strict=True):
                info = cls.tensor[own]
                size = info.numel * graph.scale(info.numel, rows) * width[own]
                sizes[name] = size, size if info.requires_grad else 0.0
        borders = [graph.boundary(at) for at in range(1, len(graph.blocks))]
        forward, backward = (tuple(sum(sizes[name][i] for name in names) for names in borders) for i in (0, 1))
        return (0.0, *forward, 0.0), (0.0, *backward, 0.0)


def _values(times: StageTimes) -> tuple[Table, ...]:
    return tuple(getattr(times, own.name) for own in fields(StageTimes))


def _none_below(one: StageTimes, others: Sequence[StageTimes], limit_s: float) -> NDArray[np.bool_]:
    """Which ranges of one take less than the limit, and are not such that another takes no more at any time."""
    found = one.alone_s < limit_s
    for other in others:
        found = found & ~reduce(and_, (a <= b for a, b in zip(_values(other), _values(one), strict=True)))
    return found


def _is_less(one: StageTimes, other: StageTimes, limit_s: float) -> bool:
    """Whether any time is, of a range that takes less than the limit."""
    below = one.alone_s < limit_s
    return any(bool(((a < b) & below).any()) for a, b in zip(_values(one), _values(other), strict=True))
