"""Which ops of a model have sharding rules, and which a plan's tensor axis repeats: a value, and its line of text."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 4  # targets of each list that the line names


@dataclass(frozen=True, slots=True)
class TargetShare:
    """An op target ("aten.histc.default") and its share of the time of all the model's ops (0 to 1)."""

    target: str
    time_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a model the sharding rules cover. An op of a block class counts once, its time once a block.

    Times are the cost model's, forward and backward, on one rank of the plan's tensor axis. `without_rule` and
    `repeated` are by target, the largest share first; `repeated` are the ops with a rule that every rank of the tensor
    axis runs whole (none where `tp` is 1), `num_repeated` how many these are.
    """

    num_ops: int
    num_ruled: int
    tp: int = 1
    num_repeated: int = 0
    without_rule: tuple[TargetShare, ...] = ()
    repeated: tuple[TargetShare, ...] = ()

    @property
    def repeated_share(self) -> float:
        """The share of the time of what the tensor axis repeats although it has a rule."""
        return sum(found.time_share for found in self.repeated)


def coverage_line(coverage: Coverage) -> str:
    """The printed line: "sharding rules: 74 of 75 ops (without one: aten.histc.default 0.1% of the time); ..."."""
    line = f"sharding rules: {coverage.num_ruled} of {coverage.num_ops} ops"
    if coverage.without_rule:
        whole = ", whole on every tensor rank" if coverage.tp > 1 else ""
        line += f" (without one{whole}: {_named(coverage.without_rule)} of the time)"
    if coverage.tp > 1:
        line += f"; every rank of tp {coverage.tp} repeats {coverage.num_repeated} of the others"
        if coverage.repeated:
            line += f", {coverage.repeated_share:.1%} of the time: {_named(coverage.repeated)}"
    return line


def _named(shares: tuple[TargetShare, ...]) -> str:
    more = f" and {len(shares) - _SHOWN} more kinds" if len(shares) > _SHOWN else ""
    return ", ".join(f"{found.target} {found.time_share:.1%}" for found in shares[:_SHOWN]) + more
