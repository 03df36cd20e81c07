"""The state of a tensor on one mesh axis: replicated, replicated with a partial gradient, partial, or sharded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache


class Kind(StrEnum):
    REPLICATED = "R"  # whole value on every rank, whole gradient on every rank
    REPLICATED_PARTIAL_GRAD = "RP"  # whole value on every rank, the gradient is a sum over the ranks
    PARTIAL = "P"  # the value is a sum over the ranks, the gradient is whole on every rank
    SHARDED = "S"

    __hash__ = str.__hash__  # Enum's own is in Python


@dataclass(frozen=True, slots=True)
class State:
    """`State(SHARDED, dim, outer)`: dim is seen as (outer, n, rest) and the axis splits n; outer=1 is a plain shard.

    A padded shard has the dim's `length` (0 elsewhere), which n does not divide: rank i holds the steps
    [i*c, (i+1)*c), c = ceil(length / n), those from `length` on being padding. What is padded starts as zeros; whatever
    it holds, it reaches no result, and its gradient is zero.
    """

    kind: Kind
    dim: int = 0
    outer: int = 1
    length: int = 0
    _hash: int = field(init=False, repr=False, compare=False)  # states are keys everywhere

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.kind, self.dim, self.outer, self.length)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[State], tuple[Kind, int, int, int]]:
        """Another process hashes otherwise."""
        return State, (self.kind, self.dim, self.outer, self.length)

    def __str__(self) -> str:
        if self.kind is not Kind.SHARDED:
            return str(self.kind)
        if self.length:
            return f"S({self.dim};{self.length})"
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim},{self.outer})"

    def at_rows(self, captured: int, rows: int) -> State:
        """The state when the batch has `rows` rows, from one captured at the tagged prime `captured`.

        Where batch and sequence are merged in one dim, the batch is among the outer blocks of a split sequence.
        """
        if self.kind is not Kind.SHARDED or self.outer % captured:
            return self
        return replace(self, outer=self.outer // captured * rows)

    @staticmethod
    def parse(text: str) -> State:
        """The state written as "R", "RP", "P", "S(1)", "S(1,3)" or, padded, "S(1;97)"; ValueError for anything else."""
        if text in (Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL):
            return State(Kind(text))
        found = re.fullmatch(r"S\((\d+)(?:,(\d+)|;(\d+))?\)", text)
        if not found:
            raise ValueError(f"not a sharding state: {text!r}")
        return State(Kind.SHARDED, int(found[1]), int(found[2] or 1), int(found[3] or 0))


R = State(Kind.REPLICATED)
RP = State(Kind.REPLICATED_PARTIAL_GRAD)
P = State(Kind.PARTIAL)


@cache  # equal states that are one object are quick to compare
def shard(dim: int, outer: int = 1) -> State:
    return State(Kind.SHARDED, dim, outer)


@cache
def padded_shard(dim: int, length: int) -> State:
    return State(Kind.SHARDED, dim, 1, length)
