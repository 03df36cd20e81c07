"""What groups of a cluster's devices cost as stages of a model, as the tables that `find_stages` searches.

Pools are the cluster's nodes of one kind. A strategy is a number of devices of one pool; on a range of blocks it stands
for the best of its settings (tensor axis, ZeRO level, sequence parallelism), which may differ from stage to stage.

Costs as a bound are never above the simulator's under 1F1B (`bounds`): of a micro-batch's forward and backward, what is
after the first counts for a stage's load. As an estimate each stage's load has all its micro-batches and what it does
once a step.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cost_models.collectives import send_recv_time_s
from autopar.cost_models.op_kinds import element_bytes
from autopar.search.balance import range_sums
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, axis_variants, divisors
from autopar.search.elimination import Table
from autopar.search.stage_kinds import StageKind
from autopar.search.tables import Pool, Ranges
from autopar.sharding.rewrite import Rewrite
from autopar.simulate.class_costs import captured_dtype

MAX_STAGES = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """How a group of devices may run a stage, and what its devices are."""

    candidate: Candidate
    kind: StageKind

    @property
    def share(self) -> float:
        """The part of what passes to the next stage that one device sends."""
        c = self.candidate
        return 1.0 / (c.dp * (c.tp if c.sequence_parallel else 1))


class ClusterPools:
    """The pools of a cluster, and the ranks of their nodes."""

    def __init__(self, cluster: Cluster) -> None:
        kinds: dict[object, list[int]] = {}
        for index, node in enumerate(cluster.nodes):
            kinds.setdefault((node.device, node.link, node.network), []).append(index)
        self.cluster = cluster
        self.nodes = tuple(tuple(own) for own in kinds.values())  # of each pool the indices in the cluster
        first_rank = np.concatenate([[0], np.cumsum([node.num_devices for node in cluster.nodes])])
        self._first_rank = [int(rank) for rank in first_rank]
        self.pools = tuple(
            Pool(
                name=f"{index}: {cluster.nodes[own[0]].device.name}",
                price_per_hour=cluster.nodes[own[0]].device.price_per_hour,
                nodes=tuple(cluster.nodes[i].num_devices for i in own),
                memory_bytes=cluster.nodes[own[0]].device.usable_memory_bytes,
            )
            for index, own in enumerate(self.nodes)
        )

    def sizes(self, pool: int) -> list[int]:
        """The numbers of devices that a group of the pool may have: parts of a node, and whole nodes doubled up."""
        nodes = self.pools[pool].nodes
        found = {part for size in nodes for part in divisors(size)} | {sum(nodes)}
        if len(nodes) <= 4:
            found |= {sum(nodes[:count]) for count in range(1, len(nodes) + 1)}
        else:  # many nodes: no stage takes less than one
            found = {sum(nodes[: 2**power]) for power in range(len(nodes).bit_length())} | {sum(nodes)}
        return sorted(found)

    def ranks(self, pool: int, count: int) -> tuple[int, ...]:
        """The ranks of a group as it is placed first: on one node where one has so many devices."""
        nodes = sorted(self.nodes[pool], key=lambda i: -self.cluster.nodes[i].num_devices)
        return tuple(rank for i in nodes for rank in self.node_ranks(i))[:count]

    def node_ranks(self, node: int) -> range:
        return range(self._first_rank[node], self._first_rank[node + 1])


class MixedCosts:
    """The costs of all stages with `num_micro_batches` micro-batches and these rewrites of layers."""

    in_runs = True

    def __init__(
        self, engine: Engine, pools: ClusterPools, num_micro_batches: int, rewrites: tuple[Rewrite, ...]
    ) -> None:
        self.engine, self.cluster_pools, self.num_micro_batches = engine, pools, num_micro_batches
        self.rewrites, self._as_bound = rewrites, True
        self.pools = pools.pools
        self.num_layers = len(engine.graph.blocks)
        self.max_stages: int | None = MAX_STAGES
        rows = engine.request.global_batch // num_micro_batches
        self.groups: list[tuple[int, int]] = []  # (pool, devices) of each strategy
        self.settings: list[list[Setting]] = []
        for pool in range(len(self.pools)):
            for size in pools.sizes(pool):
                found = self._settings(pool, size, rows)
                if found:
                    self.groups.append((pool, size))
                    self.settings.append(found)
        self._ranges: dict[tuple[int, int], tuple[Ranges, Ranges]] = {}

    def estimate(self) -> MixedCosts:
        """The same groups with costs as an estimate."""
        other = copy(self)
        other._as_bound = False
        return other

    def _settings(self, pool: int, size: int, rows: int) -> list[Setting]:
        engine, found = self.engine, []
        ranks = self.cluster_pools.ranks(pool, size)
        per_node = min(size, *self.pools[pool].nodes)
        for tp in divisors(size):
            dp = size // tp
            if per_node % tp or rows % dp or any(node % tp for node in self.pools[pool].nodes if size > node):
                continue
            # The last that splits weights: with sequence parallelism where hidden states allow it.
            for sequence_parallel, split_weights in [own for own in axis_variants(engine.chooser, tp) if own[1]][-1:]:
                choice = engine.chooser.choose(tp, sequence_parallel=sequence_parallel, split_weights=split_weights)
                if choice is None or choice.rewrites != self.rewrites:
                    continue
                for zero, replicate, shard in [(0, dp, 1)] + ([(z, 1, dp) for z in (1, 2, 3)] if dp > 1 else []):
                    candidate = Candidate(
                        pp=2, tp=tp, dp_replicate=replicate, dp_shard=shard, zero=zero,
                        sequence_parallel=sequence_parallel, split_weights=split_weights, offload_optimizer=False,
                        micro_batch=rows // dp, num_micro_batches=self.num_micro_batches,
                    )
                    found.append(Setting(candidate, engine.layout.kind_of(candidate, ranks)))
        return found

    @property
    def num_strategies(self) -> int:
        return len(self.groups)

    def counts(self, strategy: int) -> tuple[int, ...]:
        """How many devices of each pool the strategy takes."""
        pool, size = self.groups[strategy]
        return tuple(size if index == pool else 0 for index in range(len(self.pools)))

    def border(self, strategy: int) -> int:
        """Strategies of one pool and as many devices send alike: each is its own kind."""
        return strategy

    def ranges(self, strategy: int, in_flight: int) -> Ranges:
        """Times over all ranges of blocks: of each range the best setting's."""
        key = strategy, in_flight
        if key not in self._ranges:
            self._ranges[key] = self._make(strategy, in_flight)
        return self._ranges[key][0 if self._as_bound else 1]

    def _make(self, strategy: int, in_flight: int) -> tuple[Ranges, Ranges]:
        """As a bound and as an estimate; settings that are nowhere the best even with all activations kept are left."""
        n, m = self.num_layers + 1, self.num_micro_batches
        time_s, load_s, first_s, all_s = (np.full((n, n), np.inf) for _ in range(4))
        tables = []
        for own in self.settings[strategy]:
            table = self.engine.bounds.stage_table(own.candidate, own.kind)
            work = range_sums(table.forward_s + table.backward_s)
            later = range_sums((m - 1) * table.backward_s + (m - in_flight) * table.forward_s)
            tables.append((own, table, work, later, range_sums(table.once_beside_s)))
        tables.sort(key=lambda each: float(m * each[2][0, -1] + each[4][0, -1]))  # the quickest first
        for own, table, work, later, once in tables:
            if not _improves(_with_once(work, once), time_s) and not _improves(later, load_s) and not _improves(
                m * _finite(work) + once, all_s
            ):
                continue
            later, _, first = self.engine.bounds.stage_loads(own.candidate, own.kind, in_flight, table)
            time_s = np.minimum(time_s, _with_once(first, once))
            load_s = np.minimum(load_s, later)
            whole = np.where(np.isfinite(first), m * _finite(first) + once, np.inf)
            first_s = np.where(whole < all_s, first, first_s)
            all_s = np.minimum(whole, all_s)
        fits = np.isfinite(time_s) & np.isfinite(load_s) & np.isfinite(all_s)
        bound = Ranges(time_s=np.where(fits, time_s, np.inf), load_s=np.where(fits, load_s, np.inf))
        rest = np.where(fits, _finite(all_s) - _finite(first_s), np.inf)
        return bound, Ranges(time_s=np.where(fits, first_s, np.inf), load_s=rest)

    def best_settings(self, strategy: int, in_flight: int, first: int, last: int) -> list[Setting]:
        """The settings that fit a range, the best first."""
        m = self.num_micro_batches
        times = []
        for own in self.settings[strategy]:
            table = self.engine.bounds.stage_table(own.candidate, own.kind)
            _, _, micro = self.engine.bounds.stage_loads(own.candidate, own.kind, in_flight, table)
            times.append(m * float(micro[first, last]) + float(table.once_beside_s[first:last].sum()))
        order = sorted((time, index) for index, time in enumerate(times) if np.isfinite(time))
        return [self.settings[strategy][index] for _, index in order]

    def fluid_bound(self) -> float:
        """No stages take less: were the work spread over all devices by their speed, in parts of any size."""
        m = self.num_micro_batches
        rates = [0.0] * len(self.pools)
        for (pool, size), settings in zip(self.groups, self.settings, strict=True):
            for own in settings:
                table = self.engine.bounds.stage_table(own.candidate, own.kind)
                work = max(m - MAX_STAGES, 0) * float(table.forward_s.sum()) + (m - 1) * float(table.backward_s.sum())
                rates[pool] = max(rates[pool], 1 / (size * work) if work > 0 else np.inf)
        whole = sum(pool.num_devices * rate for pool, rate in zip(self.pools, rates, strict=True))
        return 1 / whole if whole > 0 else np.inf

    def sends_s(self, one: int, other: int, same_node: bool) -> tuple[Table, Table]:
        """At each border: seconds of what passes, at the least that any setting sends, and back."""
        cluster = self.cluster_pools.cluster
        here, there = self.groups[one][0], self.groups[other][0]
        # Two neighbouring groups of one node, or a device of each pool on two nodes.
        a = self.cluster_pools.nodes[here][0]
        b = self.cluster_pools.nodes[there][-1]
        ranks = self.cluster_pools.node_ranks(a)
        if same_node:
            group = cluster.group((ranks[0], ranks[-1]))
        elif a != b:
            group = cluster.group((ranks[0], self.cluster_pools.node_ranks(b)[0]))
        else:
            return np.zeros(self.num_layers + 1), np.zeros(self.num_layers + 1)
        ends = [
            (min(s.share for s in self.settings[own]), min(self.groups[own][1], *self.pools[self.groups[own][0]].nodes))
            for own in (one, other)
        ]
        share, flows = min(ends) if self._as_bound else max(ends)
        flows = min(own for _, own in ends) if self._as_bound else flows
        found = [
            np.array([send_recv_time_s(amount * share, group, flows_per_node=flows) for amount in sizes])
            for sizes in self._passing
        ]
        return found[0], found[1]

    @cached_property
    def _passing(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes of a micro-batch at each border between blocks, forward and backward; nothing at both ends."""
        graph, rows = self.engine.graph, self.engine.request.global_batch // self.num_micro_batches
        sizes: dict[str, tuple[float, float]] = {}
        for block in graph.blocks:
            cls = graph.block_class[block.cls]
            width = element_bytes(cls, captured_dtype(graph), self.engine.request.dtype)
            for name, own in zip(block.outputs, cls.outputs, strict=True):
                info = cls.tensor[own]
                size = info.numel * graph.scale(info.numel, rows) * width[own]
                sizes[name] = size, size if info.requires_grad else 0.0
        borders = [graph.boundary(at) for at in range(1, len(graph.blocks))]
        forward, backward = (tuple(sum(sizes[name][i] for name in names) for names in borders) for i in (0, 1))
        return (0.0, *forward, 0.0), (0.0, *backward, 0.0)


def _finite(table: Table) -> Table:
    return np.where(np.isfinite(table), table, 0.0)


def _with_once(first: Table, once: Table) -> Table:
    """What the first stage does once comes before its first forward and after its last backward."""
    found = first.copy()
    found[0] = first[0] + once[0]
    return found


def _improves(one: Table, other: Table) -> bool:
    return bool((one < other).any())
