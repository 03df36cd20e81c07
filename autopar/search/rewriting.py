"""Which rewrites of a block class pay: each is solved by the exact search over shardings, and the fastest is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.graph.model_graph import BlockClass
from autopar.sharding.rewrite import Rewrite
from autopar.sharding.rewrites import apply_rewrite, candidates_of
from autopar.sharding.strategy import ClassSharding

_EQUAL = 1e-9  # relative; times are sums that are rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A class's best shardings (one an axis; none where there is no axis), their time and what a block keeps."""

    shardings: tuple[ClassSharding, ...]
    time_s: float
    saved_bytes: float
    selective_saved_bytes: float

    def beats(self, other: Weighed) -> bool:
        """Whether it is faster and keeps no more, so that no plan gets slower or bigger by it."""
        return self.time_s < other.time_s * (1 - _EQUAL) and self._keeps_no_more(other)

    def _keeps_no_more(self, other: Weighed) -> bool:
        return (self.saved_bytes <= other.saved_bytes * (1 + _EQUAL)
                and self.selective_saved_bytes <= other.selective_saved_bytes * (1 + _EQUAL))


class Variants:
    """What each class can be rewritten to; the same objects each time."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[BlockClass, tuple[tuple[Rewrite, BlockClass], ...]]] = {}

    def of(self, cls: BlockClass) -> tuple[tuple[Rewrite, BlockClass], ...]:
        """Each rewrite that applies to the class, with the rewritten class."""
        if id(cls) not in self._of:  # the class is kept, so that its id is not used again
            self._of[id(cls)] = cls, tuple((rewrite, apply_rewrite(cls, rewrite)) for rewrite in candidates_of(cls))
        return self._of[id(cls)][1]


def best_rewrites(
    cls: BlockClass, captured: Weighed, variants: Variants, weigh: Callable[[BlockClass], Weighed | None],
    tried: Sequence[Rewrite] | None = None,
) -> tuple[tuple[Rewrite, ...], Weighed]:
    """The rewrites that make the class fastest, one after the other, and the class so rewritten as `weigh` sees it.

    In every round each rewrite that applies is weighed and the best is taken, until none pays: rewrites of different
    ops hardly change what the others gain. Of equals the first is taken, and the captured form before any. With some
    to be `tried`, each of them is taken in turn if it pays.
    """
    if tried is not None:
        return _in_turn(cls, captured, variants, weigh, tried)
    taken: tuple[Rewrite, ...] = ()
    best = captured
    while True:
        found: tuple[Rewrite, BlockClass] | None = None
        before = best
        for rewrite, changed in variants.of(cls):
            weighed = weigh(changed)
            if weighed is not None and weighed.beats(before) and weighed.time_s < best.time_s:
                best, found = weighed, (rewrite, changed)
        if found is None:
            return taken, best
        taken, cls = (*taken, found[0]), found[1]


def _in_turn(
    cls: BlockClass, captured: Weighed, variants: Variants, weigh: Callable[[BlockClass], Weighed | None],
    tried: Sequence[Rewrite],
) -> tuple[tuple[Rewrite, ...], Weighed]:
    taken, best = list[Rewrite](), captured
    for rewrite in tried:
        changed = dict(variants.of(cls)).get(rewrite)
        weighed = None if changed is None else weigh(changed)
        if changed is not None and weighed is not None and weighed.beats(best):
            taken.append(rewrite)
            cls, best = changed, weighed
    return tuple(taken), best
