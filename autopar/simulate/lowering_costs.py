"""What the special programs communicate and move beside the op itself: the collectives that the runtime issues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.cost_models.compute import LocalTensor, is_causal
from autopar.graph.model_graph import BlockClass, Op
from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import Collective
from autopar.sharding.rules.windows import Halo, halo_of
from autopar.sharding.strategy import Strategy

_STATISTICS_BYTES = 4  # statistics are kept in float32
_COUNT_BYTES = 8  # a count of rows is an int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One collective of a lowering, with the bytes that `collective_time_s` takes.

    `behind` is the share of the op's own seconds, in the same direction, that the device computes meanwhile.
    """

    collective: Collective
    size_bytes: float
    behind: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweringCost:
    """Collectives forward and backward, and what comes besides the op's own: bytes moved, calls, bytes kept."""

    forward: tuple[Exchange, ...] = ()
    backward: tuple[Exchange, ...] = ()
    forward_moved_bytes: float = 0.0
    backward_moved_bytes: float = 0.0
    forward_calls: int = 0
    backward_calls: int = 0
    saved_bytes: float = 0.0


NOTHING = LoweringCost()


def lowering_cost(
    cls: BlockClass, op: Op, strategy: Strategy, size: int, whole: Callable[[str], LocalTensor]
) -> LoweringCost:
    """What `strategy.lowering` adds to an op on an axis of `size` ranks; `whole` gives a tensor at the true rows."""
    match strategy.lowering:
        case Lowering.VOCAB_PARALLEL_CROSS_ENTROPY:
            logits, target = whole(op.operands[0]), whole(op.operands[1])
            rows_bytes = target.numel * max(_STATISTICS_BYTES, logits.element_bytes)
            # The rows' maxima; then their sums of exponentials and their targets' logits.
            return LoweringCost(forward=(_all_reduce(rows_bytes), _all_reduce(2 * rows_bytes)))
        case Lowering.SUM_OVER_COUNT:
            return LoweringCost(forward=(_all_reduce(_COUNT_BYTES),))
        case Lowering.SYNC_BATCH_NORM:
            x = whole(op.operands[0])
            moments = 2 * cls.tensor[op.operands[0]].shape[1] * max(_STATISTICS_BYTES, x.element_bytes)
            gathered = Exchange(collective=Collective.ALL_GATHER, size_bytes=moments * size)
            backward = (_all_reduce(moments),) if x.requires_grad else ()
            moved = 2 * x.size_bytes / size if x.requires_grad else 0.0  # the input's gradient in two steps
            return LoweringCost(forward=(gathered,), backward=backward, backward_moved_bytes=moved)
        case Lowering.CHANNEL_STATISTICS:
            statistics = sum(whole(name).size_bytes for name in op.operands[-2:])
            return LoweringCost(forward=(Exchange(collective=Collective.ALL_GATHER, size_bytes=statistics),))
        case Lowering.SPATIAL_HALO:
            return _halo_cost(halo_of(op, strategy, cls.tensor, size), cls, op, whole(op.operands[0]), size)
        case Lowering.OWN_EXPERTS | Lowering.EXPERT_EXCHANGE:
            return _experts_cost(op, strategy, size, whole)
        case Lowering.CAUSAL_CONTEXT:
            return _context_cost(whole(op.operands[0]), whole(op.outputs[0]), size)
        case Lowering.RING_ATTENTION:
            return _ring_cost([whole(name) for name in op.operands], whole(op.outputs[0]), size, is_causal(op))
    return NOTHING


def _context_cost(query: LocalTensor, out: LocalTensor, size: int) -> LoweringCost:
    """Half of a rank's queries and results are exchanged, through copies; results are put together from two halves.

    Kept besides the op's own: the queries that came and the results as they were computed.
    """
    halves = [x.size_bytes / (2 * size) for x in (query, out)]
    exchanges = tuple(Exchange(collective=Collective.MIRRORED_EXCHANGE, size_bytes=half) for half in halves)
    moved = 2 * halves[0] + 4 * halves[1]
    return LoweringCost(
        forward=exchanges, backward=exchanges[::-1] if out.requires_grad else (), forward_moved_bytes=moved,
        backward_moved_bytes=moved if out.requires_grad else 0.0,
        saved_bytes=halves[0] + 2 * halves[1] if out.requires_grad else 0.0,
    )


_MERGE_CALLS = 9  # of one part of a softmax with the parts before it
_GRADIENT_CALLS = 3  # of adding a part's gradients to those of queries, keys and values


def _ring_cost(operands: list[LocalTensor], out: LocalTensor, size: int, causal: bool) -> LoweringCost:
    """Keys and values side by side make n-1 hops, each behind a step's products; backward the same, and their gradients
    make n, of which the last is waited for.

    Where a step of the backward sends both, each has half of it to hide behind. Under a causal mask halves of
    everything are exchanged before and after, and the results are kept as they were computed.
    """
    query_bytes, out_bytes = operands[0].size_bytes / size, out.size_bytes / size
    both_bytes = (operands[1].size_bytes + operands[2].size_bytes) / size
    wide = max(4.0, out.element_bytes) / out.element_bytes  # sums are kept in float32 at least
    trains = out.requires_grad
    hop = Exchange(collective=Collective.RING_SHIFT, size_bytes=both_bytes, behind=1 / size)
    shared = Exchange(collective=Collective.RING_SHIFT, size_bytes=both_bytes, behind=0.5 / size)
    last = Exchange(collective=Collective.RING_SHIFT, size_bytes=both_bytes)
    before, after = (
        tuple(Exchange(collective=Collective.MIRRORED_EXCHANGE, size_bytes=each / 2) for each in halves)
        for halves in ((query_bytes, both_bytes), (out_bytes,))
    ) if causal else ((), ())
    swapped_bytes = 2 * (query_bytes + both_bytes + out_bytes) if causal else 0.0
    num_parts = 2 * size + 1 if causal else size
    return LoweringCost(
        forward=(*before, *[hop] * (size - 1), *after),
        backward=(*after, *[shared] * (2 * (size - 1)), last, *before[::-1]) if trains else (),
        forward_moved_bytes=2 * both_bytes + size * (1 + 2 * wide) * out_bytes + swapped_bytes,
        backward_moved_bytes=(
            size * (7 * both_bytes + (1 + 2 * wide) * query_bytes) + swapped_bytes if trains else 0.0
        ),
        forward_calls=num_parts * (1 + _MERGE_CALLS) - 1,
        backward_calls=num_parts * (1 + _GRADIENT_CALLS) - 1 if trains else 0,
        saved_bytes=out_bytes if trains and causal else 0.0,
    )


def _all_reduce(size_bytes: float) -> Exchange:
    return Exchange(collective=Collective.ALL_REDUCE, size_bytes=size_bytes)


def _experts_cost(
    op: Op, strategy: Strategy, size: int, whole: Callable[[str], LocalTensor]
) -> LoweringCost:
    """Rows of the own experts are taken out and kept. An exchange sends counts first, then a row for each choice.

    What came is kept for the products' gradients, what came back for the gradient of the routing weights.
    """
    hidden, choices = whole(op.operands[0]), whole(op.operands[1])
    rows_bytes = hidden.size_bytes * choices.shape[1]
    trains = any(whole(name).requires_grad for name in op.operands)
    if strategy.lowering == Lowering.OWN_EXPERTS:
        moved = 2 * rows_bytes / size
        return LoweringCost(
            forward_moved_bytes=moved, backward_moved_bytes=moved if trains else 0.0,
            saved_bytes=rows_bytes / size if trains else 0.0,
        )
    counts_bytes = size * whole(op.operands[3]).shape[0] * _COUNT_BYTES
    rows = Exchange(collective=Collective.ALL_TO_ALL, size_bytes=rows_bytes)
    counts = Exchange(collective=Collective.ALL_TO_ALL, size_bytes=counts_bytes)
    return LoweringCost(
        forward=(counts, rows, rows), backward=(rows, rows) if trains else (),
        saved_bytes=2 * rows_bytes / size if trains else 0.0,
    )


def _halo_cost(halo: Halo, cls: BlockClass, op: Op, x: LocalTensor, size: int) -> LoweringCost:
    """The borders are sent, and put around a copy of the part, which the op keeps in the part's place."""
    borders = halo.before + halo.after
    position_bytes = x.size_bytes / cls.tensor[op.operands[0]].shape[halo.dim]
    copied = x.size_bytes / size + borders * position_bytes
    sent = (Exchange(collective=Collective.NEIGHBOUR_EXCHANGE, size_bytes=borders * position_bytes),)
    return LoweringCost(
        forward=sent, backward=sent if x.requires_grad else (), forward_moved_bytes=2 * copied,
        backward_moved_bytes=2 * copied if x.requires_grad else 0.0,
        saved_bytes=copied if op.operands[0] in op.saved else 0.0,
    )
