"""Conversions between the states of a tensor on one axis: what they do forward and backward, as pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autopar.sharding.state import RP, Kind, R, State


class Collective(StrEnum):
    """A communication among the ranks of one axis; its cost is a function of the whole tensor's bytes.

    Of NEIGHBOUR_EXCHANGE, in which each rank sends to the one before and the one after it, and of MIRRORED_EXCHANGE, in
    which rank i and rank n-1-i send to each other, and of RING_SHIFT, in which each sends to the next, it is one of the
    bytes that a rank sends.
    """

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND_RECV = "send_recv"
    NEIGHBOUR_EXCHANGE = "neighbour_exchange"
    MIRRORED_EXCHANGE = "mirrored_exchange"
    RING_SHIFT = "ring_shift"


class LocalAction(StrEnum):
    """What a rank does by itself in a conversion: nothing, keep its shard, put its shard among zeros, divide by n.

    SLICE after an all-gather means: gather the whole tensor from shards, then keep the shard of the other layout.
    """

    NONE = "none"
    SLICE = "slice"
    PAD_ZEROS = "pad_zeros"
    DIVIDE = "divide"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A collective (or none) and then a local action, in the forward and, on the gradient, in the backward."""

    forward: Collective | None = None
    backward: Collective | None = None
    forward_local: LocalAction = LocalAction.NONE
    backward_local: LocalAction = LocalAction.NONE

    @property
    def is_free(self) -> bool:
        """Whether neither direction communicates."""
        return self.forward is None and self.backward is None


def conversion(src: State, dst: State, differentiable: bool) -> Conversion | None:
    """How a tensor in state `src` becomes one in state `dst`, or None where no conversion exists (only into P).

    A tensor without gradient knows no difference between R and RP, and its conversions have no backward.
    """
    if not differentiable:
        src, dst = (R if state == RP else state for state in (src, dst))
    if src == dst:
        return Conversion()
    if dst.kind is Kind.PARTIAL:
        return None
    if src.kind is Kind.SHARDED and dst.kind is Kind.SHARDED:
        both = _between_shards(src, dst)
    else:
        both = _TABLE[src.kind, dst.kind]
    if differentiable:
        return both
    return Conversion(forward=both.forward, forward_local=both.forward_local)


def _between_shards(src: State, dst: State) -> Conversion:
    if src.dim != dst.dim and not (src.length or dst.length):
        return Conversion(forward=Collective.ALL_TO_ALL, backward=Collective.ALL_TO_ALL)
    # Two layouts of one dim, and a padded one with any other, exchange pieces of unequal sizes, which an even
    # all-to-all cannot.
    gather, keep = Collective.ALL_GATHER, LocalAction.SLICE
    return Conversion(forward=gather, forward_local=keep, backward=gather, backward_local=keep)


_TABLE: dict[tuple[Kind, Kind], Conversion] = {
    (Kind.REPLICATED, Kind.REPLICATED_PARTIAL_GRAD): Conversion(backward=Collective.ALL_REDUCE),
    (Kind.REPLICATED_PARTIAL_GRAD, Kind.REPLICATED): Conversion(backward_local=LocalAction.DIVIDE),
    (Kind.REPLICATED, Kind.SHARDED): Conversion(forward_local=LocalAction.SLICE, backward=Collective.ALL_GATHER),
    (Kind.REPLICATED_PARTIAL_GRAD, Kind.SHARDED): Conversion(
        forward_local=LocalAction.SLICE, backward_local=LocalAction.PAD_ZEROS
    ),
    (Kind.SHARDED, Kind.REPLICATED): Conversion(forward=Collective.ALL_GATHER, backward_local=LocalAction.SLICE),
    (Kind.SHARDED, Kind.REPLICATED_PARTIAL_GRAD): Conversion(
        forward=Collective.ALL_GATHER, backward=Collective.REDUCE_SCATTER
    ),
    (Kind.PARTIAL, Kind.REPLICATED): Conversion(forward=Collective.ALL_REDUCE),
    (Kind.PARTIAL, Kind.REPLICATED_PARTIAL_GRAD): Conversion(
        forward=Collective.ALL_REDUCE, backward=Collective.ALL_REDUCE
    ),
    (Kind.PARTIAL, Kind.SHARDED): Conversion(forward=Collective.REDUCE_SCATTER, backward=Collective.ALL_GATHER),
}


def divides(shape: tuple[int, ...], state: State, size: int) -> bool:
    """Whether a tensor of this shape can be in this state on an axis of this size: every shard has the same shape.

    A padded state is of one length, which the size must not divide.
    """
    if state.kind is not Kind.SHARDED:
        return True
    if state.length:
        return state.dim < len(shape) and shape[state.dim] == state.length and state.length % size > 0
    return state.dim < len(shape) and shape[state.dim] > 0 and shape[state.dim] % (state.outer * size) == 0


def local_shape(shape: tuple[int, ...], state: State, size: int) -> tuple[int, ...]:
    """The shape of one rank's part of a tensor of global shape `shape`."""
    if state.kind is not Kind.SHARDED:
        return shape
    assert divides(shape, state, size), f"{state} does not divide {shape} by {size}"
    dim = state.dim
    return (*shape[:dim], -(-shape[dim] // size), *shape[dim + 1 :])


def split_shape(shape: tuple[int, ...], state: State, size: int) -> tuple[tuple[int, ...], int]:
    """The shape with the sharded dim seen as (outer, size, rest), and the position of that `size`.

    Rank i's shard of x is `x.reshape(split).select(position, i).reshape(local_shape(...))`.
    """
    assert state.kind is Kind.SHARDED and not state.length, f"{state} is no shard without padding"
    assert divides(shape, state, size), f"{state} does not divide {shape} by {size}"
    dim, rest = state.dim, shape[state.dim] // (state.outer * size)
    return (*shape[:dim], state.outer, size, rest, *shape[dim + 1 :]), dim + 1
