"""What passes a stage boundary, rank by rank: which part of which tensor goes from whom to whom.

A rank holds a box of each tensor: the rows of its data rank, and along another dim the part that its inner axes give
it. Ranks of the receiving stage want boxes of their own. Every element that a rank wants is sent to it once, by one of
the ranks that hold it; these take turns, so that no link carries more than it must.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from autopar.errors import InputError
from autopar.graph.model_graph import ModelGraph, TensorInfo
from autopar.plan.plan import Plan, Stage
from autopar.sharding.joint import Placement, placed_shape
from autopar.sharding.state import Kind, R

Box = tuple[tuple[int, int], ...]  # begin and end in each dim of the tensor over the whole micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a rank's own tensor that it sends to `peer`, or receives from it. `adds`: to what is there already."""

    peer: int
    part: tuple[slice, ...]
    shape: tuple[int, ...]
    adds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One tensor on one rank beside a boundary: its local shape there, and the pieces that it sends or receives.

    Activations go one way, gradients, where the tensor requires one, the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    activations: tuple[Piece, ...]
    gradients: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class _Holder:
    """A rank beside a boundary and what it has, or wants, of a tensor."""

    rank: int
    data_rank: int
    box: Box


def crossings(graph: ModelGraph, plan: Plan, boundary: int, rank: int) -> tuple[Crossing, ...]:
    """The tensors that pass from stage `boundary` to the next as `rank`, of one of these stages, sees them.

    `graph` has tagged rows, or the stages share one layout. InputError where a tensor cannot be taken apart and put
    together for stages of unlike layout.
    """
    return tuple(
        _crossing(graph, plan, boundary, rank, name) for name in graph.boundary(plan.stages[boundary].last)
    )


def _crossing(graph: ModelGraph, plan: Plan, boundary: int, rank: int, name: str) -> Crossing:
    before, after = plan.stages[boundary], plan.stages[boundary + 1]
    side = 0 if rank in before.devices else 1
    info = _info(graph, name)
    places = place_in(graph, plan, boundary, name), place_in(graph, plan, boundary + 1, name)
    if before.mesh == after.mesh and plan.rows_of(before) == plan.rows_of(after) and places[0] == places[1]:
        here, there = (before, after) if side == 0 else (after, before)
        lane = here.devices.index(rank)
        rows = plan.rows_of(here)[lane // (here.mesh.cp * here.mesh.tp)]
        shape = placed_shape(_at(graph, info.shape, rows), places[0], [size for _, size in here.mesh.inner])
        piece = Piece(peer=there.devices[lane], part=tuple(slice(0, size) for size in shape), shape=shape)
        activations = gradients = [piece]
    else:
        row_dim = _row_dim(graph, plan, boundary, info)
        whole = _at(graph, info.shape, plan.micro_batch_rows)
        sources = _holders(whole, row_dim, plan, before, places[0])
        targets = _holders(whole, row_dim, plan, after, places[1])
        own = next(holder.box for holder in (sources, targets)[side] if holder.rank == rank)
        shape = tuple(end - begin for begin, end in own)
        forward, backward = _ways(sources, targets, has_rows=row_dim is not None)
        activations = _pieces(forward, rank, own, adds=False)
        gradients = _pieces(backward, rank, own, adds=row_dim is None)
    return Crossing(
        name=name, dtype=info.dtype, shape=shape, requires_grad=info.requires_grad,
        activations=tuple(activations), gradients=tuple(gradients) if info.requires_grad else (),
    )


_Region = tuple[int, int, Box]  # from rank, to rank, what


def _ways(
    sources: Sequence[_Holder], targets: Sequence[_Holder], *, has_rows: bool
) -> tuple[list[_Region], list[_Region]]:
    """The regions of the activations and of their gradients.

    A tensor without rows is the same on all data ranks, and the gradients of each are a part of the whole: each data
    rank of the later stage has one of the earlier stage to take it from, which adds up the gradients it gets back.
    """
    if has_rows:
        return _assigned(sources, targets), _assigned(targets, sources)
    num_sources = 1 + max(holder.data_rank for holder in sources)
    forward: list[_Region] = []
    backward: list[_Region] = []
    for data_rank in range(1 + max(holder.data_rank for holder in targets)):
        above = [holder for holder in sources if holder.data_rank == data_rank % num_sources]
        below = [holder for holder in targets if holder.data_rank == data_rank]
        forward += _assigned(above, below)
        backward += _assigned(below, above)
    return forward, backward


def _assigned(sources: Sequence[_Holder], targets: Sequence[_Holder]) -> list[_Region]:
    """Every target's box from the sources' boxes; of sources with the same box the one that sends least so far."""
    by_box: dict[Box, list[int]] = {}
    for holder in sources:
        by_box.setdefault(holder.box, []).append(holder.rank)
    sent = {holder.rank: 0 for holder in sources}
    found = []
    for target in targets:
        for box, ranks in by_box.items():
            part = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, target.box, strict=True))
            if all(begin < end for begin, end in part):
                source = min(ranks, key=lambda rank: sent[rank])
                sent[source] += math.prod(end - begin for begin, end in part)
                found.append((source, target.rank, part))
    return found


def _pieces(regions: Sequence[_Region], rank: int, own: Box, *, adds: bool) -> list[Piece]:
    """The regions that this rank sends or receives, in terms of its own box."""
    return [
        Piece(
            peer=target if rank == source else source,
            part=tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, own, strict=True)),
            shape=tuple(b - a for a, b in box), adds=adds,
        )
        for source, target, box in regions if rank in (source, target)
    ]


def _holders(
    shape: tuple[int, ...], row_dim: int | None, plan: Plan, stage: Stage, place: Placement
) -> list[_Holder]:
    """What each rank of a stage holds of a tensor whose shape over the whole micro-batch is `shape`."""
    mesh = stage.mesh
    ends = list(accumulate(plan.rows_of(stage)))
    found = []
    for lane, rank in enumerate(stage.devices):
        data_rank = lane // (mesh.cp * mesh.tp)
        coordinates = {"cp": lane // mesh.tp % mesh.cp, "tp": lane % mesh.tp}
        box = [(0, size) for size in shape]
        if row_dim is not None:
            box[row_dim] = (ends[data_rank] - plan.rows_of(stage)[data_rank], ends[data_rank])
        for state, (axis, size) in zip(place, mesh.inner, strict=True):
            if state.kind is Kind.SHARDED:
                assert state.outer == 1 and not state.length, "verify_plan lets only plain shards pass"
                begin, end = box[state.dim]
                step = (end - begin) // size
                box[state.dim] = (begin + coordinates[axis] * step, begin + (coordinates[axis] + 1) * step)
        found.append(_Holder(rank, data_rank, tuple(box)))
    return found


def _info(graph: ModelGraph, name: str) -> TensorInfo:
    block = next(block for block in graph.blocks if name in block.outputs)
    cls = graph.block_class[block.cls]
    return cls.tensor[cls.outputs[block.outputs.index(name)]]


def place_in(graph: ModelGraph, plan: Plan, index: int, name: str) -> Placement:
    """How a stage holds a tensor that it makes, takes or passes on."""
    stage = plan.stages[index]
    for block in graph.blocks[stage.first : stage.last]:
        for word in ("inputs", "outputs"):
            names = getattr(block, word)
            if name in names:
                choices = plan.class_shardings(block.cls, stage)
                return tuple(getattr(choice, word)[names.index(name)] for choice in choices)
    earlier = plan.stages[index - 1]
    if index and earlier.mesh == stage.mesh:  # passed on as it came
        return place_in(graph, plan, index - 1, name)
    return (R,) * len(stage.mesh.inner)


def _at(graph: ModelGraph, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape at `rows` rows; a graph without tagged rows has the shapes of its own rows."""
    if not graph.rows_are_tagged:
        return shape
    return tuple(size // graph.rows * rows if size % graph.rows == 0 else size for size in shape)


def _row_dim(graph: ModelGraph, plan: Plan, boundary: int, info: TensorInfo) -> int | None:
    """The dim that holds the batch's rows and nothing else; None where the tensor has none and is no batch's."""
    where = f"{info.name} passes between stages {boundary} and {boundary + 1}, which share out rows or ops otherwise,"
    if not graph.rows_are_tagged:
        raise InputError(f"{where} and the model was captured at a fixed number of rows; capture it with tagged rows")
    dims = [dim for dim, size in enumerate(info.shape) if size and size % graph.rows == 0]
    if len(dims) > 1 or (dims and info.shape[dims[0]] != graph.rows):
        raise InputError(f"{where} with rows merged into another dim, {list(info.shape)}; cut the model elsewhere")
    if dims:
        return dims[0]
    if _follows_batch(graph, plan.stages[boundary].last, info):
        raise InputError(f"{where} and is computed across the rows of a micro-batch; cut the model elsewhere")
    return None


def _follows_batch(graph: ModelGraph, last: int, info: TensorInfo) -> bool:
    """Whether values of the batch reach a tensor that the blocks before `last` make."""
    reached = {one.name for one in graph.inputs}
    for block in (graph.shared, *graph.blocks[:last]):
        cls = graph.block_class[block.cls]
        local = {own for own, name in zip(cls.inputs, block.inputs, strict=True) if name in reached}
        for op in cls.ops:
            if local.intersection(op.operands):
                local.update(output for output in op.outputs if output)
        reached.update(name for own, name in zip(cls.outputs, block.outputs, strict=True) if own in local)
        for own, name in zip(cls.outputs, block.outputs, strict=True):
            if cls.tensor[own] is info and name in reached:
                return True
    return False
