"""Groups of devices on nodes: every way to place a group, up to the order of nodes that are alike.

A group takes whole nodes, and at most one part of a node beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

Node = tuple[int, int]  # (devices, of which free)
Profile = tuple[tuple[Node, ...], ...]  # of each pool its nodes, ascending
Home = tuple[int, Node]  # (pool, node as it is left): where a group that lies on one node is


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """What a group takes of one pool: nodes as a whole, by size, and a part of one node."""

    whole: tuple[int, ...]
    part: Node | None  # the node as it was before
    count: int  # of devices on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One way to place a group. `same_node`: on the very node that the group after it lies on, both wholly."""

    profile: Profile  # what is left
    home: Home | None
    same_node: bool
    places: tuple[PoolPlace, ...]


def whole_profile(nodes: Sequence[Sequence[int]]) -> Profile:
    """Pools of which nothing is taken."""
    return tuple(tuple(sorted((size, size) for size in sizes)) for sizes in nodes)


@lru_cache(maxsize=200_000)
def placements(profile: Profile, counts: tuple[int, ...], home: Home | None) -> tuple[Placement, ...]:
    """All ways to take `counts` of each pool; `home` is the node of the group that comes after, where it has one."""
    pools = [pool for pool, count in enumerate(counts) if count]
    found = []
    for places in product(*(tuple(_of_pool(profile[pool], counts[pool])) for pool in pools)):
        left = list(profile)
        for pool, place in zip(pools, places, strict=True):
            left[pool] = _taken(profile[pool], place)
        own = _home(pools, places)
        base = Placement(profile=tuple(left), home=own, same_node=False, places=places)
        at_home = own is not None and home is not None and home == (pools[0], _before(places[0]))
        if at_home:
            found.append(replace(base, same_node=True))
        if not at_home or profile[pools[0]].count(_before(places[0])) > 1:
            found.append(base)
    return tuple(found)


def _of_pool(nodes: tuple[Node, ...], count: int) -> Iterator[PoolPlace]:
    for whole in _whole_nodes(tuple(size for size, free in nodes if size == free), count):
        part = count - sum(whole)
        if part == 0:
            yield PoolPlace(whole, None, 0)
            continue
        left = list(nodes)
        for size in whole:
            left.remove((size, size))
        for node in sorted({(size, free) for size, free in left if free >= part and part < size}):
            yield PoolPlace(whole, node, part)


def _whole_nodes(sizes: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    """Every multiset of free nodes with at most so many devices."""
    kinds = sorted(set(sizes))
    for numbers in product(*(range(min(sizes.count(kind), most // kind) + 1) for kind in kinds)):
        chosen = tuple(kind for kind, number in zip(kinds, numbers, strict=True) for _ in range(number))
        if sum(chosen) <= most:
            yield chosen


def _taken(nodes: tuple[Node, ...], place: PoolPlace) -> tuple[Node, ...]:
    left = list(nodes)
    for size in place.whole:
        left.remove((size, size))
        left.append((size, 0))
    if place.part is not None:
        size, free = place.part
        left.remove(place.part)
        left.append((size, free - place.count))
    return tuple(sorted(left))


def _before(place: PoolPlace) -> Node:
    """The only node of a place as it was."""
    return place.part if place.part is not None else (place.whole[0], place.whole[0])


def _home(pools: Sequence[int], places: Sequence[PoolPlace]) -> Home | None:
    if len(pools) > 1 or len(places[0].whole) + (places[0].part is not None) > 1:
        return None
    size, free = _before(places[0])
    return pools[0], (size, free - (places[0].count if places[0].part is not None else size))


def concrete_nodes(
    nodes: Sequence[Sequence[int]], chosen: Sequence[tuple[tuple[int, ...], Placement]]
) -> list[tuple[tuple[int, int, int], ...]]:
    """For each group, in the order in which they were placed: (pool, index of node, devices) that it gets.

    `chosen` holds each group's pools and its placement.
    """
    free = [list(sizes) for sizes in nodes]
    last: tuple[int, int] | None = None
    found = []
    for pools, placement in chosen:
        own: list[tuple[int, int, int]] = []
        for pool, place in zip(pools, placement.places, strict=True):
            sizes = nodes[pool]
            wanted = [((size, size), size) for size in place.whole]
            wanted += [(place.part, place.count)] if place.part is not None else []
            for (size, was_free), count in wanted:
                alike = [i for i in range(len(sizes)) if (sizes[i], free[pool][i]) == (size, was_free)]
                others = [i for i in alike if (pool, i) != last]
                index = last[1] if placement.same_node and last is not None else (others or alike)[0]
                assert index in alike, "the placement was made for these nodes"
                free[pool][index] -= count
                own.append((pool, index, count))
        last = own[0][:2] if len(own) == 1 else None
        found.append(tuple(own))
    return found
