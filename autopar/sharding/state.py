"""The state of a tensor on one mesh axis: replicated, replicated with a partial gradient, partial, or sharded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    REPLICATED = "R"  # whole value on every rank, whole gradient on every rank
    REPLICATED_PARTIAL_GRAD = "RP"  # whole value on every rank, the gradient is a sum over the ranks
    PARTIAL = "P"  # the value is a sum over the ranks, the gradient is whole on every rank
    SHARDED = "S"


@dataclass(frozen=True, slots=True)
class State:
    """`State(SHARDED, dim, outer)`: dim is seen as (outer, n, rest) and the axis splits n; outer=1 is a plain shard."""

    kind: Kind
    dim: int = 0
    outer: int = 1

    def __str__(self) -> str:
        if self.kind is not Kind.SHARDED:
            return str(self.kind)
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim},{self.outer})"

    def at_rows(self, captured: int, rows: int) -> State:
        """The state when the batch has `rows` rows, from one captured at the tagged prime `captured`.

        Where batch and sequence are merged in one dim, the batch is among the outer blocks of a split sequence.
        """
        if self.kind is not Kind.SHARDED or self.outer % captured:
            return self
        return State(self.kind, self.dim, self.outer // captured * rows)

    @staticmethod
    def parse(text: str) -> State:
        """The state written as "R", "RP", "P", "S(1)" or "S(1,3)"; ValueError for anything else."""
        if text in (Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD, Kind.PARTIAL):
            return State(Kind(text))
        found = re.fullmatch(r"S\((\d+)(?:,(\d+))?\)", text)
        if not found:
            raise ValueError(f"not a sharding state: {text!r}")
        return State(Kind.SHARDED, int(found[1]), int(found[2] or 1))


R = State(Kind.REPLICATED)
RP = State(Kind.REPLICATED_PARTIAL_GRAD)
P = State(Kind.PARTIAL)


def shard(dim: int, outer: int = 1) -> State:
    return State(Kind.SHARDED, dim, outer)
