"""The common factors of two shapes of one tensor: what a reshape does to factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """Factor names for each dim of both shapes, their sizes, and the factors that only one of the shapes has."""

    before: tuple[tuple[str, ...], ...]
    after: tuple[tuple[str, ...], ...]
    sizes: dict[str, int]
    opaque: tuple[str, ...]


def refine(before: Sequence[int], after: Sequence[int]) -> Refinement:
    """The finest factors that both shapes agree on, outermost first; both must have the same number of elements.

    (4, 6) -> (4, 2, 3) gives 4, 2, 3; (6, 4) -> (4, 6) gives 2 and then what only one side has: 3, 4 and 2, 6.
    """
    assert math.prod(before) == math.prod(after), f"{before} and {after} differ in size"
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in before], [[] for _ in after])
    sizes: dict[str, int] = {}
    opaque: list[str] = []
    if 0 in before:
        for letter, shape, names in zip("ab", (before, after), sides, strict=True):
            for dim, length in enumerate(shape):
                if length != 1:
                    name = f"{letter}{dim}"
                    sizes[name] = length
                    opaque.append(name)
                    names[dim].append(name)
        return _refinement(sides, sizes, opaque)

    left = [(dim, length) for dim, length in enumerate(before) if length != 1]
    right = [(dim, length) for dim, length in enumerate(after) if length != 1]
    while left and right:
        (dim, length), (other, other_length) = left.pop(0), right.pop(0)
        common = math.gcd(length, other_length)
        if common > 1:
            name = f"f{len(sizes)}"
            sizes[name] = common
            sides[0][dim].append(name)
            sides[1][other].append(name)
        length, other_length = length // common, other_length // common
        if length > 1 and other_length > 1:
            # Neither stride divides the other: from here to where both shapes meet again, nothing is common.
            products = [length, other_length]
            pending = ([(dim, length)], [(other, other_length)])
            while products[0] != products[1]:
                side = 0 if products[0] < products[1] else 1
                taken = (left, right)[side].pop(0)
                products[side] *= taken[1]
                pending[side].append(taken)
            for side, letter in enumerate("ab"):
                for position, size in pending[side]:
                    name = f"{letter}{position}"
                    sizes[name] = size
                    opaque.append(name)
                    sides[side][position].append(name)
            continue
        if length > 1:
            left.insert(0, (dim, length))
        if other_length > 1:
            right.insert(0, (other, other_length))
    return _refinement(sides, sizes, opaque)


def _refinement(sides: tuple[list[list[str]], list[list[str]]], sizes: dict[str, int], opaque: list[str]) -> Refinement:
    before, after = (tuple(tuple(names) for names in side) for side in sides)
    return Refinement(before=before, after=after, sizes=sizes, opaque=tuple(opaque))
