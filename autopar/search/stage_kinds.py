"""Where a candidate's stages lie on the cluster: contiguous devices in cluster order, and what kind each stage is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cluster.cluster import Cluster, DeviceType, GroupShape
from autopar.cost_models.collectives import collective_time_s, send_recv_time_s
from autopar.cost_models.memory import GRADIENT_BYTES
from autopar.search.candidates import Candidate
from autopar.search.elimination import Table
from autopar.sharding.reshard import Collective
from autopar.simulate.class_costs import CostAxis
from autopar.simulate.stage_cost import inner_axis, slowest_device


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate, and how many such groups share a node's network."""

    shape: GroupShape
    per_node: int

    def time_s(self, kind: Collective, size_bytes: float) -> float:
        return collective_time_s(kind, size_bytes, self.shape, groups_per_node=self.per_node)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageKind:
    """What a stage's devices are to the cost model; stages of one kind cost the same.

    A layout makes each kind once, so that kinds are compared by identity.
    """

    compute_kind: int  # the same for equal (device, tp_group, context)
    device: DeviceType  # the slowest
    memory_limit_bytes: float  # of the smallest
    tp_group: GroupShape | None
    context: tuple[CostAxis, ...]  # the context axis, where there is one
    shard: Group
    copies: Group
    whole: Group


class StageLayout:
    """Finds the kinds of the stages of candidates; keeps what it found."""

    def __init__(self, cluster: Cluster, dtype: str) -> None:
        self._cluster, self._dtype = cluster, dtype
        self._kinds: dict[tuple[int, ...], StageKind] = {}
        self._on_ranks: dict[tuple[int, int, int, int, tuple[int, ...]], StageKind] = {}
        self._of_candidate: dict[tuple[int, ...], tuple[StageKind, ...]] = {}
        self._pairs: dict[tuple[int, int], list[list[tuple[GroupShape, int]]]] = {}
        self._sends: dict[tuple[int, int, float, float], Table] = {}
        self._equal: dict[tuple[object, ...], StageKind] = {}
        self._compute: dict[tuple[object, ...], int] = {}

    def kinds(self, candidate: Candidate) -> tuple[StageKind, ...]:
        """The kind of each stage, first to last."""
        key = (candidate.pp, candidate.tp, candidate.cp, candidate.dp_shard, candidate.dp_replicate)
        if key not in self._of_candidate:
            self._of_candidate[key] = tuple(self._kind(candidate, stage) for stage in range(candidate.pp))
        return self._of_candidate[key]

    def sends_s(self, c: Candidate, forward_bytes: float, backward_bytes: float) -> Table:
        """[stage]: seconds of sending so much from it on from stage to stage, and so much back, one after another."""
        key = c.pp, c.mesh.size, forward_bytes, backward_bytes
        if key not in self._sends:
            each = [
                sum(
                    max((send_recv_time_s(size, group, flows_per_node=flows) for group, flows in links), default=0.0)
                    for size in (forward_bytes, backward_bytes)
                )
                for links in self._links(c.pp, c.mesh.size)
            ]
            self._sends[key] = np.append(np.cumsum(each[::-1])[::-1], 0.0)
        return self._sends[key]

    def tied_s(self, c: Candidate, numel: int) -> float:
        """Seconds of adding up the gradients of so many parameters of which the first and the last stage hold copies.
        """
        if c.pp == 1 or not numel:
            return 0.0
        size = GRADIENT_BYTES * numel / (c.dp_shard if c.zero else 1)
        group = self._cluster.group((0, (c.pp - 1) * c.mesh.size))
        return collective_time_s(Collective.ALL_REDUCE, size, group, groups_per_node=c.tp * c.dp_shard)

    def _links(self, num_stages: int, size: int) -> list[list[tuple[GroupShape, int]]]:
        """For each pair of neighbouring stages: their ranks' distinct links, and the flows that share a node's."""
        key = (num_stages, size)
        if key not in self._pairs:
            cluster = self._cluster
            alike: dict[int, list[tuple[GroupShape, int]]] = {}  # by where a stage begins on nodes that are alike
            found = []
            for first in range(0, (num_stages - 1) * size, size):
                at = first % cluster.nodes[0].num_devices if cluster.is_uniform else first
                if at not in alike:
                    alike[at] = self._links_from(first, size)
                found.append(alike[at])
            self._pairs[key] = found
        return self._pairs[key]

    def _links_from(self, first: int, size: int) -> list[tuple[GroupShape, int]]:
        """The same of the stage on so many ranks from the first on and the one behind it."""
        node_of = self._cluster.node_of
        pairs: dict[tuple[int, int], tuple[int, int]] = {}
        leaving: dict[int, int] = {}
        for rank in range(first, first + size):
            here, there = node_of[rank], node_of[rank + size]
            pairs.setdefault((here, there), (rank, rank + size))
            leaving[here] = leaving.get(here, 0) + (here != there)
        kinds: dict[tuple[object, ...], tuple[GroupShape, int]] = {}
        for (here, there), pair in pairs.items():
            flows = max(1, leaving[here])
            key_of = (here == there, flows) if self._cluster.is_uniform else (here, there)
            if key_of not in kinds:
                kinds[key_of] = self._cluster.group(pair), flows
        return list(kinds.values())

    def _kind(self, c: Candidate, stage: int) -> StageKind:
        size = c.mesh.size
        first = stage * size
        if self._cluster.is_uniform:
            first %= self._cluster.nodes[0].num_devices
            if first + size > self._cluster.num_devices:  # only where stages straddle nodes
                first = stage * size
        key = (first, size, c.tp, c.cp, c.dp_shard, c.dp_replicate)
        if key not in self._kinds:
            self._kinds[key] = self._make(c, tuple(range(first, first + size)))
        return self._kinds[key]

    def kind_of(self, c: Candidate, ranks: tuple[int, ...]) -> StageKind:
        """The kind of a stage with the candidate's mesh on these ranks."""
        if (key := (c.tp, c.cp, c.dp_shard, c.dp_replicate, ranks)) not in self._on_ranks:
            self._on_ranks[key] = self._make(c, ranks)
        return self._on_ranks[key]

    def _make(self, c: Candidate, ranks: tuple[int, ...]) -> StageKind:
        cluster, tp = self._cluster, c.tp
        device, limit = slowest_device(cluster, ranks, self._dtype), memory_limit(cluster, ranks)
        tp_group = cluster.group(ranks[:tp]) if tp > 1 else None
        context = (inner_axis(cluster, tuple(ranks[i * tp] for i in range(c.cp))),) if c.cp > 1 else ()
        shard = self._group(tuple(ranks[i * tp] for i in range(c.num_shards)))
        copies = self._group(tuple(ranks[i * c.num_shards * tp] for i in range(c.dp_replicate)))
        whole = self._group(tuple(ranks[i * tp] for i in range(c.dp * c.cp)))
        made = StageKind(
            device=device, memory_limit_bytes=limit, tp_group=tp_group, context=context, shard=shard, copies=copies,
            whole=whole, compute_kind=self._compute.setdefault((device, tp_group, context), len(self._compute)),
        )
        return self._equal.setdefault((device, limit, tp_group, context, shard, copies, whole), made)

    def _group(self, ranks: tuple[int, ...]) -> Group:
        shape = self._cluster.group(ranks)
        cluster = self._cluster
        some = ranks[:1] if cluster.is_uniform else ranks
        used = max(cluster.nodes[cluster.node_of[rank]].num_devices for rank in some)
        return Group(shape, max(1, used // shape.per_node))


def memory_limit(cluster: Cluster, ranks: tuple[int, ...]) -> float:
    """What the smallest of these devices can give."""
    if cluster.is_uniform:
        return cluster.nodes[0].device.usable_memory_bytes
    nodes = dict.fromkeys(cluster.node_of[rank] for rank in ranks)
    return min(cluster.nodes[i].device.usable_memory_bytes for i in nodes)
