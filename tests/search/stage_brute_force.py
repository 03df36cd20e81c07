"""Every division of a small problem into stages, tried one by one: the oracle of `find_stages`. And random problems."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product

from autopar.search.objective import Objective, Score
from autopar.search.tables import LayerOption, LayerStrategy, Link, Pool, StageTables


def best_by_brute_force(tables: StageTables, objective: Objective) -> Score | None:
    """The best score of all divisions; None where nothing fits."""
    m, n = tables.num_micro_batches, tables.num_layers
    prices = [pool.price_per_hour for pool in tables.pools]
    inside = dict(tables.inside)
    between = {frozenset((a, b)): link for a, b, link in tables.links}
    gradients = tables.boundary_bytes if tables.gradient_bytes is None else tables.gradient_bytes
    best: list[Score | None] = [None]

    @cache
    def stage_s(index: int, first: int, last: int, behind: int) -> float | None:
        """Seconds of a micro-batch with the best options of each layer that fit."""
        strategy, least = tables.strategies[index], None
        for chosen in product(*strategy.layers[first:last]):
            for (name, _), share in zip(
                strategy.devices, strategy.held_shares or (1.0,) * len(strategy.devices), strict=True
            ):
                memory = next(pool.memory_bytes for pool in tables.pools if pool.name == name)
                held = min(behind + 1, m) * sum(o.held_bytes for o in chosen) + max(o.extra_bytes for o in chosen)
                if sum(strategy.static_bytes[first:last]) + share * held > memory:
                    break
            else:
                time_s = sum(o.forward_s + o.backward_s for o in chosen)
                least = time_s if least is None else min(least, time_s)
        return least

    def on_a_node(strategy: LayerStrategy) -> int:
        largest = {pool.name: max(pool.nodes) for pool in tables.pools}
        return max(min(count, largest[name]) for name, count in strategy.devices)

    def link(at: int, one: LayerStrategy, other: LayerStrategy, same_node: bool) -> tuple[float, float]:
        share, flows = max(one.boundary_share, other.boundary_share), max(on_a_node(one), on_a_node(other))
        ways = []
        for size in (tables.boundary_bytes[at], gradients[at]):
            longest = 0.0
            for a, _ in one.devices:
                for b, _ in other.devices:
                    own = inside.get(a) if same_node else between.get(frozenset((a, b)), tables.network)
                    if own is not None and size > 0:
                        many = flows if own.shared else 1
                        longest = max(longest, own.latency_s + size * share * many / own.bandwidth_bytes_per_s)
            ways.append(longest)
        return ways[0], ways[1]

    def extend(last: int, free: dict[tuple[str, int], int], behind: int, after: tuple[LayerStrategy, frozenset] | None,
               total: float, load: float) -> None:
        used = [pool.num_devices - sum(free[pool.name, i] for i in range(len(pool.nodes))) for pool in tables.pools]
        score = objective.score(total + load, used, prices)
        if score[0] == float("inf") or (best[0] is not None and score >= best[0]):
            return  # more stages only add to it
        if last == 0:
            best[0] = score
            return
        for first in range(last):
            for index, strategy in enumerate(tables.strategies):
                time_s = stage_s(index, first, last, behind)
                if time_s is None:
                    continue
                own = (m - 1) * time_s + sum(strategy.once_s[first:last])
                for taken in places(tables.pools, free, strategy):
                    nodes = frozenset(taken)
                    more, worst = time_s, max(load, own)
                    if after is not None:
                        same = nodes == after[1] and len(nodes) == 1
                        ways = link(last - 1, strategy, after[0], same)
                        more, worst = more + sum(ways), max(worst, (m - 1) * max(ways))
                    left = {node: count - taken.get(node, 0) for node, count in free.items()}
                    extend(first, left, behind + 1, (strategy, nodes), total + more, worst)

    extend(n, {(pool.name, i): size for pool in tables.pools for i, size in enumerate(pool.nodes)}, 0, None, 0.0, 0.0)
    return best[0]


def places(
    pools: Sequence[Pool], free: dict[tuple[str, int], int], strategy: LayerStrategy
) -> Iterator[dict[tuple[str, int], int]]:
    """Every set of whole nodes and at most one part of a node that has the strategy's devices."""
    each = []
    for name, count in strategy.devices:
        nodes = next(pool.nodes for pool in pools if pool.name == name)
        whole = [i for i, size in enumerate(nodes) if free[name, i] == size]
        found = []
        for many in range(len(whole) + 1):
            for chosen in combinations(whole, many):
                part = count - sum(nodes[i] for i in chosen)
                taken = {(name, i): nodes[i] for i in chosen}
                if part == 0:
                    found.append(taken)
                elif part > 0:
                    found += [
                        {**taken, (name, i): part} for i, size in enumerate(nodes)
                        if i not in chosen and part <= free[name, i] and part < size
                    ]
        each.append(found)
    for combined in product(*each):
        yield {node: count for taken in combined for node, count in taken.items()}


def random_tables(seed: int) -> StageTables:
    """At most 6 layers, 6 devices of 2 types and 4 micro-batches, with memory that often binds."""
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    alike = rng.random() < 0.4
    pools = []
    for name in ("a", "b")[: rng.randint(1, 2)]:
        nodes = rng.choice([(1,), (2,), (3,), (1, 1), (1, 2), (2, 1), (1, 1, 1)])
        pools.append(Pool(
            name=name, nodes=nodes, memory_bytes=rng.choice([6.0, 10.0, 20.0, 60.0]), price_per_hour=rng.randint(1, 5),
        ))
    strategies = []
    sizes = [((pool.name, k),) for pool in pools for k in range(1, pool.num_devices + 1)]
    if len(pools) == 2:
        sizes.append((("a", 1), ("b", 1)))
    for devices in rng.sample(sizes, min(len(sizes), 4)):
        speed = sum(k for _, k in devices) * rng.uniform(0.6, 1.0) * (2.0 if devices[0][0] == "b" else 1.0)
        weights = [1] * n if alike else [rng.randint(1, 4) for _ in range(n)]

        def layer(weight: int, speed: float = speed) -> tuple[LayerOption, ...]:
            forward, backward = weight / speed, 2 * weight / speed
            kept = LayerOption(forward_s=forward, backward_s=backward, held_bytes=weight * 1.0, name="none")
            full = LayerOption(
                forward_s=forward, backward_s=backward + forward, held_bytes=0.25, extra_bytes=weight * 1.0, name="full"
            )
            return (kept, full) if rng.random() < 0.8 else (kept,)

        strategies.append(LayerStrategy(
            name=str(devices), devices=devices,
            layers=tuple(layer(w) if rng.random() < 0.95 else () for w in weights),
            static_bytes=tuple(float(rng.randint(0, 2)) for _ in range(n)),
            once_s=tuple(rng.choice([0.0, 0.5]) for _ in range(n)) if rng.random() < 0.5 else (),
            boundary_share=rng.choice([1.0, 0.5]),
            held_shares=(0.25, 0.75) if len(devices) == 2 else (),
        ))
    return StageTables(
        pools=tuple(pools), strategies=tuple(strategies), num_micro_batches=rng.randint(1, 4),
        boundary_bytes=tuple(rng.choice([0.0, 1.0, 2.0]) for _ in range(n - 1)),
        gradient_bytes=None if rng.random() < 0.5 else tuple(rng.choice([0.0, 3.0]) for _ in range(n - 1)),
        network=Link(latency_s=rng.choice([0.0, 0.2]), bandwidth_bytes_per_s=rng.choice([0.5, 4.0]),
                     shared=rng.random() < 0.5),
        inside=tuple(
            (pool.name, Link(latency_s=0.0, bandwidth_bytes_per_s=8.0)) for pool in pools if rng.random() < 0.7
        ),
        links=(("a", "b", Link(latency_s=0.5, bandwidth_bytes_per_s=1.0)),) if rng.random() < 0.5 else (),
    )
