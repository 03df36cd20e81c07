"""Which layers of a stage recompute or offload: the least added time that fits into memory, by exact counts.

Layers of one kind have the same options; a stage chooses how many of its layers take each. What a choice takes on the
device is (micro-batches in flight) x (sum of what the layers hold) + (the largest of what they need beside it). So each
value of the largest is tried in turn, with the options that stay below it; what is left is to add as little time as
possible with a bounded sum. `Frontier` keeps every sum that is not beaten in both time and bytes, built up layer by
layer: exact, for a sum that is beaten stays beaten whatever is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import DeviceType
from autopar.plan.plan import Recompute, Variant
from autopar.search.elimination import Table
from autopar.simulate.block_cost import BlockCost
from autopar.simulate.variant_cost import variant_cost

KEEP_ALL = Variant()
MANY_COUNTS = 1 << 17  # what of counts is tried at once
STRIDE = 8  # of the numbers of layers for which a table is made
ROUNDING = 1e-12  # relative; a plan that fills memory to the last byte fits


@dataclass(frozen=True, slots=True)
class Option:
    """A variant of a layer: seconds that it adds to a micro-batch's forward and backward, and its bytes."""

    variant: Variant
    forward_s: float
    backward_s: float
    held_bytes: float
    extra_bytes: float
    host_bytes: float = 0.0

    def added_s(self, weights: Weights) -> float:
        return weights[0] * self.forward_s + weights[1] * self.backward_s


Options = tuple[Option, ...]  # of one layer; the first keeps everything
Weights = tuple[float, float]  # what a second of a forward and of a backward counts


def layer_options(cost: BlockCost, device: DeviceType, num_layers: int, *, offload: bool = True) -> Options:
    """The variants of a layer that none beats in time, held bytes and bytes beside them; the first keeps everything.

    Among equals the one that is simpler stays. `offload` has no effect where the device's host link is unknown, and
    allows what fits into the host's memory for all `num_layers` of the model: stages of a pipeline have fewer of them,
    each for more micro-batches.
    """
    host = device.host_memory_bytes or math.inf
    words = product((False, True) if offload and device.host_bandwidth_bytes_per_s else (False,), Recompute)
    found: list[Option] = []
    for away, recompute in words:
        variant = Variant(recompute=recompute, offload=away)
        given = variant_cost(cost, variant, device)
        option = Option(
            variant, given.forward_s, given.backward_s + given.backward_tp_s, given.held_bytes, given.extra_bytes,
            given.host_bytes,
        )
        if given.host_bytes * num_layers > host:
            continue
        if not any(_beats(other, option) for other in found):
            found = [other for other in found if other.variant == KEEP_ALL or not _beats(option, other)] + [option]
    return tuple(found)


def _beats(one: Option, other: Option) -> bool:
    return (
        one.forward_s <= other.forward_s and one.backward_s <= other.backward_s
        and one.held_bytes <= other.held_bytes and one.extra_bytes <= other.extra_bytes
    )


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Sums over some layers: ascending in bytes, falling in time. `counts[i, o]`: layers that take option o."""

    held_bytes: Table
    added_s: Table
    counts: NDArray[np.int32]

    def best(self, budget: float) -> int | None:
        """The index of the least time within a budget of bytes; None where nothing fits."""
        index = int(np.searchsorted(self.held_bytes, budget, side="right")) - 1
        return index if index >= 0 else None


def joined(one: Frontier, other: Frontier) -> Frontier:
    """The frontier of the layers of both, the counts side by side."""
    return _unbeaten(
        (one.held_bytes[:, None] + other.held_bytes[None, :]).ravel(),
        (one.added_s[:, None] + other.added_s[None, :]).ravel(),
        np.concatenate([
            np.repeat(one.counts, len(other.counts), axis=0), np.tile(other.counts, (len(one.counts), 1))
        ], axis=1),
    )


def _unbeaten(held: Table, added: Table, counts: NDArray[np.int32]) -> Frontier:
    order = np.lexsort((added, held))
    held, added, counts = held[order], added[order], counts[order]
    kept = _falls(added)
    return Frontier(held[kept], added[kept], counts[kept])


def _with_one_more(
    held: Table, added: Table, of_held: Table, of_added: Table
) -> tuple[NDArray[np.intp], Table, Table]:
    """The unbeaten sums of a frontier and one more layer's options: which they are, option after option, and both."""
    every_held, every_added = (of_held[:, None] + held).ravel(), (of_added[:, None] + added).ravel()
    order = np.argsort(every_held, kind="stable")  # which merges what is sorted already: a run an option
    order = order[_falls(every_added[order])]
    held = every_held[order]
    order = order[np.append(held[1:] > held[:-1], True)]  # of those that hold as much the last adds least
    return order, every_held[order], every_added[order]


def _falls(added: Table) -> NDArray[np.bool_]:
    """Where times, in ascending order of bytes, are less than all before."""
    least = np.minimum.accumulate(added)
    return np.concatenate([[True], added[1:] < least[:-1] * (1 - ROUNDING)])


@lru_cache(maxsize=1024)  # stages of a deep pipeline have weights of their own
def _frontiers(options: Options, weights: Weights) -> list[Frontier]:
    """The frontiers of 0, 1, 2, ... layers; `frontiers` appends to it."""
    return [Frontier(np.zeros(1), np.zeros(1), np.zeros((1, len(options)), dtype=np.int32))]


def frontiers(options: Options, num_layers: int, weights: Weights) -> list[Frontier]:
    """The frontiers of at least 0 to `num_layers` layers with these options."""
    known = _frontiers(options, weights)
    if len(known) > num_layers:
        return known
    held = np.array([option.held_bytes for option in options])
    added = np.array([option.added_s(weights) for option in options])
    one = np.eye(len(options), dtype=np.int32)
    while len(known) <= num_layers:
        last = known[-1]
        kept, own_held, own_added = _with_one_more(last.held_bytes, last.added_s, held, added)
        option, before = np.divmod(kept, len(last.held_bytes))
        known.append(Frontier(own_held, own_added, last.counts[before] + one[option]))
    return known


Points = tuple[tuple[float, float], ...]  # (bytes, seconds) of options: ascending in bytes, falling in time


def _points(options: Options, weights: Weights) -> Points:
    """What the options hold and add, without those that another beats in both."""
    found: list[tuple[float, float]] = []
    for point in sorted((option.held_bytes, option.added_s(weights)) for option in options):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return tuple(found)


@lru_cache(maxsize=256)
def _steps(points: Points, num_layers: int) -> tuple[float, Table, Table]:
    """The frontiers of 0 to `num_layers` layers in one ascending table: n * width + bytes, and the least added time."""
    width = 2.0 * (num_layers * points[-1][0] + 1.0)
    known = [(np.zeros(1), np.zeros(1))]
    held, added = (np.array(column) for column in zip(*points, strict=True))
    for number in range(1, num_layers + 1):
        if len(points) <= 2:  # every count of the second is unbeaten
            second = np.arange(number + 1 if len(points) == 2 else 1)
            known.append(((number - second) * held[0] + second * held[-1],
                          (number - second) * added[0] + second * added[-1]))
            continue
        known.append(_with_one_more(*known[-1], held, added)[1:])
    keys = np.concatenate([number * width + each for number, (each, _) in enumerate(known)])
    return width, keys, np.concatenate([each for _, each in known])


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The options of each kind that need no more than `extra_bytes` beside what they hold; offloading ones or none."""

    extra_bytes: float
    offload: bool
    allowed: tuple[Options, ...]


def levels(kinds: Sequence[Options]) -> list[Level]:
    """Every set of options that a largest need, and whether any layer offloads, can leave; kinds may lack any."""
    every = [option for options in kinds for option in options]
    found: list[Level] = []
    for offload in (False, True):
        if offload and not any(option.variant.offload for option in every):
            continue
        for extra in sorted({option.extra_bytes for option in every if offload or not option.variant.offload}):
            allowed = tuple(
                tuple(o for o in options if o.extra_bytes <= extra and (offload or not o.variant.offload))
                for options in kinds
            )
            found.append(Level(extra_bytes=extra, offload=offload, allowed=allowed))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a stage has for its layers' activations.

    `budget_bytes` is for all micro-batches in flight and for what is needed beside them, blocks that are no layers
    taken off; those need `extra_bytes` beside. `entry_bytes` stay of each micro-batch where any layer offloads;
    `host_bytes` are there for what is offloaded. At the first layer's moment in the backward of a step of one
    micro-batch `first_budget_bytes` are left for what that layer holds and the larger of what is needed beside it and
    `first_extra_bytes`.
    """

    budget_bytes: float
    in_flight: int
    extra_bytes: float
    entry_bytes: float
    host_bytes: float = math.inf
    first_budget_bytes: float = math.inf
    first_extra_bytes: float = 0.0

    def has_first(self, level: Level) -> bool:
        """Whether the layer that holds least at a level, as the first of them, has room at its own moment."""
        least = min(option.held_bytes for options in level.allowed for option in options)
        left = self.first_budget_bytes * (1 - ROUNDING) - max(level.extra_bytes, self.first_extra_bytes)
        return least <= left - (self.entry_bytes if level.offload else 0.0)

    def for_held(self, level: Level) -> float:
        """The bytes that the layers may hold of one micro-batch at a level."""
        left = self.budget_bytes * (1 - ROUNDING) - max(level.extra_bytes, self.extra_bytes)
        return left / self.in_flight - (self.entry_bytes if level.offload else 0.0)


def cheapest(layers: Sequence[Options], room: Room, weights: Weights) -> tuple[Option, ...] | None:
    """An option for each layer, of least added time among all that fit; None where none does.

    Layers of one kind take those that hold least first. Where what is cheapest among the options of a level lacks host
    memory, that level is passed over.
    """
    kinds = list(dict.fromkeys(layers))
    numbers = [layers.count(kind) for kind in kinds]
    best: tuple[float, list[list[Option]]] | None = None
    for level in levels(kinds):
        budget = room.for_held(level)
        if not all(level.allowed) or (level.allowed and not room.has_first(level)):
            continue
        whole: Frontier | None = None
        for options, number in zip(level.allowed, numbers, strict=True):
            own = frontiers(options, number, weights)[number]
            whole = own if whole is None else joined(whole, own)
        if whole is None:
            return () if budget >= 0 else None
        index = whole.best(budget)
        if index is None or (best is not None and whole.added_s[index] >= best[0] * (1 - ROUNDING)):
            continue
        counts = iter(whole.counts[index])
        chosen = [
            sorted(
                (option for option in options for _ in range(int(next(counts)))), key=lambda option: option.held_bytes
            )
            for options in level.allowed
        ]
        away = sum(option.host_bytes for options in chosen for option in options)
        if room.in_flight * away <= room.host_bytes:
            best = float(whole.added_s[index]), chosen
    if best is None:
        return None if layers or room.budget_bytes < room.extra_bytes else ()
    queues = {kind: iter(options) for kind, options in zip(kinds, best[1], strict=True)}
    return tuple(next(queues[kind]) for kind in layers)


def least_added(
    level: Level, numbers: Sequence[NDArray[np.intp]], budget: Table, weights: Weights
) -> Table:
    """Elementwise: a lower bound of the added time of `numbers[k]` layers of kind k within a budget of held bytes.

    Infinite exactly where nothing fits. With one kind of layers the bound is the exact least; with several it is that
    of fractional counts (the convex hull of each kind's options, filled up greedily).
    """
    if len(numbers) == 1:
        return _exact(level.allowed[0], numbers[0], budget, weights)
    return least_of_parts(level.allowed, numbers, budget, weights)


def least_of_parts(
    allowed: Sequence[Options], numbers: Sequence[NDArray[np.intp]], budget: Table, weights: Weights
) -> Table:
    """The same where layers may take options in parts: the convex hull of each kind's options, filled up greedily."""
    added, lacking = np.zeros_like(budget), np.where(np.isfinite(budget), -budget, np.inf)
    segments: list[tuple[float, float, int]] = []  # (seconds a byte, bytes a layer, kind)
    for kind, options in enumerate(allowed):
        if not options:
            lacking = np.where(numbers[kind] > 0, np.inf, lacking)
            continue
        hull = _hull(options, weights)
        added = added + numbers[kind] * hull[0][0]
        lacking = lacking + numbers[kind] * hull[0][1]
        segments += [
            ((after[0] - before[0]) / (before[1] - after[1]), before[1] - after[1], kind)
            for before, after in pairwise(hull)
        ]
    scale = np.abs(np.where(np.isfinite(budget), budget, 0.0)) + 1.0
    for slope, size, kind in sorted(segments):
        taken = np.clip(lacking, 0.0, numbers[kind] * size)
        added = added + slope * taken
        lacking = lacking - taken
    return np.where(lacking <= ROUNDING * scale, added, np.inf)


def _exact(options: Options, numbers: NDArray[np.intp], budget: Table, weights: Weights) -> Table:
    if not options:
        return np.where((numbers == 0) & (budget >= 0), 0.0, np.inf)
    points, most = _points(options, weights), int(numbers.max(initial=0))
    middle = len(points) - 2
    if numbers.size * (most + 1) ** max(middle, 0) <= MANY_COUNTS:
        return _counted(points, numbers, budget)
    width, keys, added = _steps(points, -(-most // STRIDE) * STRIDE)
    own = numbers * width
    index = np.searchsorted(keys, own + np.clip(budget, -0.25 * width, 0.75 * width), side="right") - 1
    fits = (index >= 0) & (keys[np.maximum(index, 0)] >= own)
    return np.where(fits, added[np.maximum(index, 0)], np.inf)


@lru_cache(maxsize=16)
def _every_count(most: int, num_options: int) -> NDArray[np.intp]:
    """counts[option, i]: all ways to take 0 to `most` of each option."""
    return np.indices((most + 1,) * num_options, dtype=np.intp).reshape(num_options, (most + 1) ** num_options)


def _counted(points: Points, numbers: NDArray[np.intp], budget: Table) -> Table:
    """The least added time by trying all counts of all options but the first and the last, which share the rest."""
    counts = _every_count(int(numbers.max(initial=0)), max(len(points) - 2, 0))
    held, added = (np.array(column) for column in zip(*points, strict=True))
    rest = numbers[..., None] - counts.sum(axis=0)
    left = np.where(np.isfinite(budget), budget, -np.inf)[..., None] - counts.T @ held[1:-1] - rest * held[0]
    total = counts.T @ added[1:-1] + rest * added[0]
    fits = (rest >= 0) & (left >= 0)
    if len(points) > 1:
        # The last option holds most and adds least.
        last = np.clip(np.floor(np.where(fits, left, 0.0) / (held[-1] - held[0])), 0, rest)
        total = total - last * (added[0] - added[-1])
    return np.asarray(np.where(fits, total, np.inf).min(axis=-1))


def _hull(options: Options, weights: Weights) -> list[tuple[float, float]]:
    """(time, bytes) of the lower convex hull of the options: from the least time to the fewest bytes."""
    hull: list[tuple[float, float]] = []
    for point in sorted((option.added_s(weights), option.held_bytes) for option in options):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle one lies on or above the line between the others (time over falling bytes)."""
    return (middle[0] - first[0]) * (first[1] - last[1]) >= (last[0] - first[0]) * (first[1] - middle[1])
