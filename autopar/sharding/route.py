"""The way from one placement of a tensor to another: conversions of single axes, and sums over several axes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.sharding.joint import Placement, held_share
from autopar.sharding.reshard import Collective, Conversion, conversion
from autopar.sharding.state import RP, Kind, P, R, State

# A sum over the ranks of several axes in the forward, in the backward, or in both.
SUMS = ((R, RP), (P, R), (P, RP))
# Elements of the whole tensor: below, the time that collectives take to start outweighs what fewer bytes save
# (about 10 us each, NCCL; 2^20 elements of bfloat16 take 5 us at 400 GB/s and 40 us at 50 GB/s).
LEAST_SUMMED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One axis of a tensor's placement changes from `src` to `dst`; `before` is the whole placement until then.

    So do the axes of `inner`, all after it, where each of them does the same, it is one of `SUMS` and the tensor is
    large: every rank of the last of them then sums a part, those of `axis` sum parts of parts, and the parts are
    gathered again.
    """

    axis: int
    src: State
    dst: State
    before: Placement
    inner: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes that change, outermost first."""
        return (self.axis, *self.inner)


def summed_at_once(num_elements: float) -> bool:
    """Whether a tensor of so many elements is large enough for one sum over several axes."""
    return num_elements >= LEAST_SUMMED_AT_ONCE


@lru_cache(maxsize=1 << 16)
def steps(
    src: Placement, dst: Placement, differentiable: bool, is_large: bool = False
) -> tuple[Step, ...] | None:
    """How a tensor placed as `src` becomes one placed as `dst`, axis by axis; None where an axis has no conversion.

    What makes the tensor smaller comes first and what makes it larger last. An axis waits while an axis after it splits
    a dim that it is about to change. Where that axis is to split it afterwards too, it gives up its shard, and takes it
    again when the other is done. `is_large`: sums over several axes are made at once (`summed_at_once`).
    """
    if not differentiable:
        src, dst = _without_gradient(src), _without_gradient(dst)
    if any(
        own != wanted and conversion(own, wanted, differentiable) is None
        for own, wanted in zip(src, dst, strict=True)
    ):
        return None
    found: list[Step] = []
    current = list(src)

    def change(axis: int, state: State, inner: Sequence[int] = ()) -> None:
        found.append(Step(axis, current[axis], state, tuple(current), tuple(inner)))
        for changed in (axis, *inner):
            current[changed] = state

    while left := [axis for axis in range(len(src)) if current[axis] != dst[axis]]:
        ready = [axis for axis in left if _may_change(axis, current, dst, left)]
        if not ready:
            change(max(
                inner for inner, held in enumerate(current) if held.kind is Kind.SHARDED
                and any(axis < inner and _touches(current[axis], dst[axis], held) for axis in left)
            ), R)
            continue
        axis = min(ready, key=lambda axis: (_growth(current[axis], dst[axis]), axis))
        own = current[axis], dst[axis]
        alike = [other for other in ready if other > axis and (current[other], dst[other]) == own]
        change(axis, dst[axis], alike if is_large and own in SUMS else ())
    return tuple(found)


@lru_cache(maxsize=1 << 18)
def conversions(
    src: Placement, dst: Placement, differentiable: bool, sizes: tuple[int, ...], is_large: bool = False
) -> tuple[tuple[int, float, Conversion], ...] | None:
    """The steps as (axis, share of the tensor that the axis's group holds, what it does there); None as in `steps`."""
    path = steps(src, dst, differentiable, is_large)
    if path is None:
        return None
    found: list[tuple[int, float, Conversion]] = []
    for step in path:
        made = conversion(step.src, step.dst, differentiable)
        assert made is not None, "a step is a conversion"
        others = tuple(R if i in step.axes else state for i, state in enumerate(step.before))
        found += sums(made, step.axes, held_share(others, sizes), sizes) if step.inner else [
            (step.axis, held_share(others, sizes), made)
        ]
    return tuple(found)


def sums(
    made: Conversion, axes: Sequence[int], share: float, sizes: Sequence[int]
) -> list[tuple[int, float, Conversion]]:
    """What a sum over these axes, outermost first, of a share of a tensor does on each of them, in the forward's order.

    Scattered over the last axis, what is left of it over the one before, ..., summed over the first, and gathered back.
    """
    outer, *inner = axes
    down: list[tuple[int, float, Conversion]] = []
    up: list[tuple[int, float, Conversion]] = []
    scatter, gather = Collective.REDUCE_SCATTER, Collective.ALL_GATHER
    for axis in reversed(inner):
        down.append((axis, share, Conversion(
            forward=scatter if made.forward else None, backward=gather if made.backward else None)))
        up.insert(0, (axis, share, Conversion(
            forward=gather if made.forward else None, backward=scatter if made.backward else None)))
        share /= sizes[axis]
    return [*down, (outer, share, made), *up]


def _may_change(axis: int, current: Sequence[State], dst: Placement, left: Sequence[int]) -> bool:
    """Whether no axis after it holds the dims that it changes, and none before it is yet to change the dim it takes."""
    own = current[axis], dst[axis]
    if any(held.kind is Kind.SHARDED and _touches(*own, held) for held in current[axis + 1 :]):
        return False
    return dst[axis].kind is not Kind.SHARDED or not any(
        outer < axis and _touches(current[outer], dst[outer], dst[axis]) for outer in left
    )


def _without_gradient(placement: Placement) -> Placement:
    return tuple(R if state.kind is Kind.REPLICATED_PARTIAL_GRAD else state for state in placement)


def _touches(src: State, dst: State, inner: State) -> bool:
    """Whether a change of an axis moves the dim that an axis after it splits."""
    return any(state.kind is Kind.SHARDED and state.dim == inner.dim for state in (src, dst))


def _growth(src: State, dst: State) -> int:
    """-1 where the tensor shrinks, 1 where it grows, 0 where it keeps its size."""
    return (src.kind is Kind.SHARDED) - (dst.kind is Kind.SHARDED)
