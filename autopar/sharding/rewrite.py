"""A rewrite of a block class as a value; `autopar.sharding.rewrites` says what it does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RewriteKind(StrEnum):
    MERGE_LINEARS = "merge_linears"  # one product of the forward, with the weights laid together
    SHARE_INPUT = "share_input"  # one op, a product each; only the gradients of the input are added on the way
    SPLIT_LINEAR = "split_linear"  # one linear for each part that is read of a linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """One rewrite of the class named `cls`: of these ops, by their names in the class as it is then."""

    kind: RewriteKind
    cls: str
    ops: tuple[str, ...]


def rewrite_text(rewrite: Rewrite) -> str:
    """The rewrite in words: "merge_linears of linear, linear_1, linear_2 in LlamaDecoderLayer"."""
    return f"{rewrite.kind} of {', '.join(rewrite.ops)} in {rewrite.cls}"
