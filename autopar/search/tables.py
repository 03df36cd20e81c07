"""Cost tables of layers and the devices they may run on: what `find_stages` searches, from any source.

The tables of other systems can be given as they are. For example, 24 equal layers on one slow and one fast device:

    from autopar.search.stage_dp import find_stages
    from autopar.search.tables import LayerOption, LayerStrategy, Link, Pool, StageTables

    def alone(pool, seconds):
        layer = (LayerOption(forward_s=seconds / 3, backward_s=2 * seconds / 3, held_bytes=1e6),)
        return LayerStrategy(name=f"one {pool}", devices=((pool, 1),), layers=(layer,) * 24, static_bytes=(4e6,) * 24)

    tables = StageTables(
        pools=(Pool(name="fast", nodes=(1,), memory_bytes=1e9), Pool(name="slow", nodes=(1,), memory_bytes=1e9)),
        strategies=(alone("fast", 1.0), alone("slow", 2.0)), num_micro_batches=32, boundary_bytes=(1e6,) * 23,
        network=Link(latency_s=0.0, bandwidth_bytes_per_s=1e9),
    )
    found = find_stages(tables)
    print([(stage.first, stage.last, stage.strategy) for stage in found.stages], found.step_time_s, found.gap)

With stage i taking t_i a micro-batch (forward and backward) and o_i once a step, a link taking c and c' a micro-batch
(activations, gradients), and B micro-batches, a step takes

    sum t_i + sum (c + c') + max(max_i ((B - 1) t_i + o_i), max over links ((B - 1) max(c, c')))

(Alpa's objective, with what a step does once in the maximum, and with links that can be the bottleneck). Under 1F1B the
stage that k - 1 stages follow holds min(k, B) micro-batches, on each device in at most the pool's memory:

    sum static + share * (min(k, B) * sum held + max extra) <= memory

A group of devices takes whole nodes and at most one part of a node, so that what fits into a node lies in one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from autopar.errors import InputError
from autopar.plan.plan import Variant
from autopar.search.balance import range_sums
from autopar.search.elimination import Table
from autopar.search.variants import ROUNDING, Option, Options, Room, cheapest


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Devices of one type. `nodes`: how many each node has; `memory_bytes`: what a stage may use of one device."""

    name: str
    nodes: tuple[int, ...]
    memory_bytes: float
    price_per_hour: float | None = None  # of one device

    @property
    def num_devices(self) -> int:
        return sum(self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What carries the activations between two groups: seconds, and bytes a second of one direction.

    A `shared` link is a node's: the devices of a group on one node share it.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    shared: bool = False

    def send_s(self, size_bytes: float, flows: int) -> float:
        """Seconds of `flows` messages of this size at once; nothing where there is nothing to send."""
        if size_bytes <= 0:
            return 0.0
        return self.latency_s + size_bytes * (flows if self.shared else 1) / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOption:
    """One way to run a layer under a strategy, such as with recomputation. Seconds and bytes of a micro-batch.

    `held_bytes` stay on each device from forward to backward; `extra_bytes` come beside them while the layer runs.
    """

    forward_s: float
    backward_s: float
    held_bytes: float = 0.0
    extra_bytes: float = 0.0
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStrategy:
    """How a group of devices shares the layers of a stage: a mesh and its ZeRO level, with their costs by layer.

    `layers[i]` are the options of layer i, none where the strategy cannot run it. `boundary_share` is the part of what
    passes between layers that one device sends. Where pools get unequal rows, `held_shares` says for each of `devices`
    what part of the options' held and extra bytes its devices hold.
    """

    name: str
    devices: tuple[tuple[str, int], ...]  # (pool, how many of it)
    layers: tuple[tuple[LayerOption, ...], ...]
    static_bytes: tuple[float, ...]  # of each layer on one device, whatever is in flight
    once_s: tuple[float, ...] = ()  # of each layer once a step: gradients summed, weights updated
    boundary_share: float = 1.0
    held_shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """For all ranges of layers [first, last): seconds that add up over stages, and those of which the largest counts.

    Infinite where a range is not allowed.
    """

    time_s: Table
    load_s: Table


@dataclass(frozen=True, kw_only=True)
class StageTables:
    """A whole problem: layers by strategy, pools of devices, links, and how many micro-batches a step has.

    `boundary_bytes[i]` passes from layer i to layer i + 1 for a whole micro-batch; gradients of `gradient_bytes` come
    back (as many where they are left out). `network` joins nodes; `links` says where it is another between two pools;
    `inside` is a node's own link by pool (free where none is given).
    """

    pools: tuple[Pool, ...]
    strategies: tuple[LayerStrategy, ...]
    num_micro_batches: int
    boundary_bytes: tuple[float, ...]
    network: Link
    gradient_bytes: tuple[float, ...] | None = None
    links: tuple[tuple[str, str, Link], ...] = ()
    inside: tuple[tuple[str, Link], ...] = ()
    max_stages: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise InputError(f"two pools have one name among {names}; give each its own")
        if self.num_micro_batches < 1:
            raise InputError(f"num_micro_batches is {self.num_micro_batches}; it must be at least 1")
        for strategy in self.strategies:
            if len(strategy.layers) != self.num_layers or len(strategy.static_bytes) != self.num_layers:
                raise InputError(f"strategy {strategy.name!r} does not give the costs of {self.num_layers} layers")
            for pool, count in strategy.devices:
                if pool not in names or count < 1:
                    raise InputError(f"strategy {strategy.name!r} takes {count} devices of {pool!r}; pools: {names}")

    @property
    def num_layers(self) -> int:
        return len(self.boundary_bytes) + 1

    @cached_property
    def pool_index(self) -> dict[str, int]:
        return {pool.name: index for index, pool in enumerate(self.pools)}

    @cached_property
    def _links(self) -> dict[frozenset[str], Link]:
        return {frozenset((one, other)): link for one, other, link in self.links}

    @property
    def num_strategies(self) -> int:
        return len(self.strategies)

    @cached_property
    def _border_keys(self) -> tuple[tuple[object, ...], ...]:
        return tuple(
            (tuple(sorted(dict.fromkeys(pool for pool, _ in own.devices))), own.boundary_share, self._on_a_node(own))
            for own in self.strategies
        )

    def border(self, strategy: int) -> int:
        """The same for strategies that send and receive alike."""
        return self._border_keys.index(self._border_keys[strategy])

    def counts(self, strategy: int) -> tuple[int, ...]:
        """How many devices of each pool the strategy takes."""
        taken = dict(self.strategies[strategy].devices)
        return tuple(taken.get(pool.name, 0) for pool in self.pools)

    def sends_s(self, one: int, other: int, same_node: bool) -> tuple[Table, Table]:
        """At each border 0..num_layers: seconds of activations from a stage under `one` to one under `other`, and back.

        The borders at both ends of the chain carry nothing.
        """
        here, there = self.strategies[one], self.strategies[other]
        share = max(here.boundary_share, there.boundary_share)
        links = [
            self._inside(a) if same_node else self._links.get(frozenset((a, b)), self.network)
            for a, _ in here.devices for b, _ in there.devices
        ]
        flows = max(self._on_a_node(here), self._on_a_node(there))
        back = self.boundary_bytes if self.gradient_bytes is None else self.gradient_bytes
        forward, backward = (
            np.array([0.0, *(max(link.send_s(size * share, flows) for link in links) for size in sizes), 0.0])
            for sizes in (self.boundary_bytes, back)
        )
        return forward, backward

    def _inside(self, pool: str) -> Link:
        return dict(self.inside).get(pool, Link(latency_s=0.0, bandwidth_bytes_per_s=float("inf")))

    def _on_a_node(self, strategy: LayerStrategy) -> int:
        return max(min(n, max(self.pools[self.pool_index[pool]].nodes)) for pool, n in strategy.devices)

    def ranges(self, strategy: int, in_flight: int) -> Ranges:
        """The strategy's times over all ranges of layers, each with the options of least time that fit."""
        own, n = self.strategies[strategy], self.num_layers
        first = np.array([sum(_time(options[0])) if options else np.inf for options in self._options(strategy)])
        time_s = np.full((n + 1, n + 1), np.inf)
        for i in range(n):
            for j in range(i + 1, n + 1):
                if not np.isfinite(first[j - 1]):
                    break
                options = self.options(strategy, in_flight, i, j)
                if options is None:
                    continue  # a longer one may fit no better, but static bytes are the caller's
                time_s[i, j] = sum(sum(_time(option)) for option in options)
        once = range_sums(np.array(own.once_s)) if own.once_s else np.zeros((n + 1, n + 1))
        fits = np.isfinite(time_s)
        loads = (self.num_micro_batches - 1) * np.where(fits, time_s, 0.0) + once
        return Ranges(time_s=time_s, load_s=np.where(fits, loads, np.inf))

    def options(self, strategy: int, in_flight: int, first: int, last: int) -> tuple[Option, ...] | None:
        """The option of each layer of a stage, of least time that fits; None where none does."""
        budget = self._budget(strategy, first, last)
        layers = self._options(strategy)[first:last]
        if budget < 0 or not all(layers):
            return None
        quickest = [min(options, key=lambda option: sum(_time(option))) for options in layers]
        if in_flight * sum(o.held_bytes for o in quickest) + max(o.extra_bytes for o in quickest) <= budget:
            return tuple(quickest)
        # `cheapest` keeps this much away from the limit; what fills it exactly fits.
        room = Room(budget_bytes=budget * (1 + 2 * ROUNDING), in_flight=in_flight, extra_bytes=0.0, entry_bytes=0.0)
        return cheapest(layers, room, (1.0, 1.0))

    def _budget(self, strategy: int, first: int, last: int) -> float:
        """What a stage has for activations, as bytes of the options."""
        own = self.strategies[strategy]
        static = sum(own.static_bytes[first:last])
        shares = own.held_shares or (1.0,) * len(own.devices)
        budgets = []
        for (pool, _), share in zip(own.devices, shares, strict=True):
            left = self.pools[self.pool_index[pool]].memory_bytes - static
            budgets.append(left / share if share > 0 else (float("inf") if left >= 0 else -1.0))
        return min(budgets)

    def _options(self, strategy: int) -> tuple[Options, ...]:
        return self._made[strategy]

    @cached_property
    def _made(self) -> tuple[tuple[Options, ...], ...]:
        return tuple(
            tuple(
                tuple(Option(KEPT, o.forward_s, o.backward_s, o.held_bytes, o.extra_bytes) for o in options)
                for options in strategy.layers
            )
            for strategy in self.strategies
        )

    def option_names(self, strategy: int, first: int, chosen: Sequence[Option]) -> tuple[str, ...]:
        """The names of chosen options of the layers from `first` on."""
        own = self.strategies[strategy].layers
        return tuple(
            own[first + i][self._made[strategy][first + i].index(option)].name for i, option in enumerate(chosen)
        )


KEPT = Variant()


def _time(option: Option) -> tuple[float, float]:
    return option.forward_s, option.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Rows of each replica, and the seconds of the slowest."""

    rows: tuple[int, ...]
    time_s: float = field(compare=False)


def unequal_shares(times_s: Sequence[Callable[[int], float]], num_rows: int) -> Share:
    """The rows of unequal replicas that end soonest: each row goes where it is then done first.

    `times_s[i](rows)` is what replica i takes; it does not fall with more rows (infinite where they do not fit), for
    which this is exact: a replica that is passed over would have ended later with the row.
    """
    rows = [0] * len(times_s)
    heap = [(time_s(1), i) for i, time_s in enumerate(times_s)]
    heapq.heapify(heap)
    slowest = 0.0
    for _ in range(num_rows):
        ends, i = heapq.heappop(heap)
        rows[i] += 1
        slowest = max(slowest, ends)
        heapq.heappush(heap, (times_s[i](rows[i] + 1), i))
    return Share(rows=tuple(rows), time_s=slowest)
