"""Ops that rearrange elements: reshapes, permutations, slices, splits, concatenations and repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.refine import refine
from autopar.sharding.rules.registry import (
    Call,
    Shape,
    aligned,
    broadcast,
    normal_dim,
    rule,
    slice_range,
    split_lengths,
)

_FIRST = ((0,),)
_MANY_DIM = "a part of the dim is taken"


@rule(
    "aten.view.default", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten",
    "aten.squeeze", "aten.unsqueeze", "aten.view_as", "aten.reshape_as", signature="self",
)  # fmt: skip
def reshape(call: Call) -> OpFactors:
    """Any reshape is a refinement of both shapes into common factors."""
    shape, out = call.shape("self"), call.output_shape()
    common = refine(shape, out)
    call.sizes.update(common.sizes)
    call.blocked.update(dict.fromkeys(common.opaque, "the reshape mixes this dim with its neighbours"))
    operands = {"self": common.before, "other": common.after, "arg1": common.after}
    return call.build(operands, (common.after,), padded=common.after, linear=_FIRST)


@rule("aten.view.dtype", signature="self dtype")
def view_dtype(call: Call) -> OpFactors:
    return call.unsplit("the elements change size")


@rule(
    "aten.transpose", "aten.permute", "aten.t", "aten.movedim", "aten.swapaxes", "aten.swapdims", "aten.mT",
    "aten.numpy_T", signature="self a b",
)  # fmt: skip
def permutation(call: Call) -> OpFactors:
    shape = call.shape("self")
    dims = call.factors("i", shape)
    name = call.op.target.split(".")[1]
    out = tuple(dims[i] for i in _order(call, name, len(shape)))
    return call.build({"self": dims}, (out,), padded=dims, linear=_FIRST)


def _order(call: Call, name: str, rank: int) -> list[int]:
    """Which input dim each output dim is."""
    order = list(range(rank))
    if name == "permute":
        return [normal_dim(dim, rank) for dim in call.ints("a" if call.has("a") else "dims")]
    if name == "numpy_T":
        return order[::-1]
    if name in ("t", "mT"):
        return order if rank < 2 else [*order[:-2], rank - 1, rank - 2]
    first = [normal_dim(dim, rank) for dim in call.ints("a")]
    second = [normal_dim(dim, rank) for dim in call.ints("b")]
    if name == "movedim":
        rest = iter([dim for dim in order if dim not in first])
        placed = dict(zip(second, first, strict=True))
        return [placed[dim] if dim in placed else next(rest) for dim in order]
    order[first[0]], order[second[0]] = second[0], first[0]
    return order


@rule("aten.expand", "aten.broadcast_to", signature="self size")
def expand(call: Call) -> OpFactors:
    shape, out = call.shape("self"), call.output_shape()
    dims = call.factors("i", out)
    padded = (1,) * (len(out) - len(shape)) + shape
    own = tuple(names if size != 1 else () for size, names in zip(padded, dims, strict=True))
    return call.build({"self": own[len(out) - len(shape) :]}, (dims,), linear=_FIRST)


@rule("aten.broadcast_tensors", signature="tensors")
def broadcast_tensors(call: Call) -> OpFactors:
    """Each operand is expanded to the shape that all share; no partial value passes, for each output is another's."""
    shapes = call.operand_shapes()
    dims = call.factors("i", broadcast(shapes))
    return call.build({"tensors": [aligned(shape, dims) for shape in shapes]}, (dims,) * len(call.op.outputs))


@rule("aten.repeat", signature="self repeats")
def repeat(call: Call) -> OpFactors:
    """Tiles: the repetition is the outer part of each dim."""
    shape, out = call.shape("self"), call.output_shape()
    padded = (1,) * (len(out) - len(shape)) + shape
    own = call.factors("i", padded)
    tiles = tuple(call.factor(f"r{d}", out[d] // padded[d]) if padded[d] else () for d in range(len(out)))
    dims = tuple((*tile, *names) for tile, names in zip(tiles, own, strict=True))
    return call.build({"self": own[len(out) - len(shape) :]}, (dims,), linear=_FIRST)


@rule("aten.repeat_interleave.self_int", signature="self repeats dim")
def repeat_interleave(call: Call) -> OpFactors:
    """Repeats each element: the repetition is the inner part of the dim."""
    shape, repeats = call.shape("self"), call.number("repeats", 1)
    if not call.has("dim") and len(shape) != 1:
        return call.unsplit("without a dim the op flattens its input")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = call.factors("i", shape)
    copies = call.factor("r", repeats)
    return call.build({"self": dims}, ((*dims[:dim], (*dims[dim], *copies), *dims[dim + 1 :]),), linear=_FIRST)


def _parts(call: Call, total: int, cuts: Sequence[int], prefix: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """A dim cut at these positions: (block length, the input's factors, the factor inside a block)."""
    length = math.gcd(total, *cuts)
    blocks = call.factor(f"{prefix}blocks", total // length, _MANY_DIM)
    inner = call.factor(f"{prefix}inner", length)
    return length, (*blocks, *inner), inner


def _cut(call: Call, dim: int, cuts: Sequence[int], lengths: Sequence[int]) -> OpFactors:
    """An op whose outputs are consecutive or single pieces of one dim of its operand."""
    shape = call.shape("self")
    if shape[dim] == 0:
        return call.unsplit("the dim is empty")
    rest = [call.factor(f"i{d}", size) if d != dim else () for d, size in enumerate(shape)]
    length, whole, inner = _parts(call, shape[dim], cuts, "c")
    outputs: list[Dims] = []
    for index, taken in enumerate(lengths):
        blocks = call.factor(f"o{index}", taken // length, _MANY_DIM)
        outputs.append((*rest[:dim], (*blocks, *inner) if taken else blocks, *rest[dim + 1 :]))
    return call.build({"self": (*rest[:dim], whole, *rest[dim + 1 :])}, outputs, padded=rest, linear=_FIRST)


@rule("aten.slice", signature="self dim start end step")
def slice_(call: Call) -> OpFactors:
    """A slice that starts and ends on block borders leaves the inside of the blocks free to split."""
    shape, out = call.shape("self"), call.output_shape()
    dim = normal_dim(call.number("dim", 0), len(shape))
    step = call.number("step", 1)
    if step != 1:
        return _every_few(call, dim, step, out)
    start, end = slice_range(shape[dim], call.number("start", 0), out[dim])
    if (start, end) == (0, shape[dim]):
        dims = call.factors("i", shape)
        return call.build({"self": dims}, (dims,), linear=_FIRST)
    if start == end:
        return _blocked_dim(call, dim, out, "nothing of the dim is taken")
    return _cut(call, dim, (start, end), (end - start,))


def _every_few(call: Call, dim: int, step: int, out: Shape) -> OpFactors:
    """A slice that takes one position of every `step`: the dim is (pieces, step), and the pieces split."""
    shape = call.shape("self")
    start, _ = slice_range(shape[dim], call.number("start", 0), 0)
    if shape[dim] % step or out[dim] * step != shape[dim] or start >= step:
        return _blocked_dim(call, dim, out, "the slice takes every few elements, not as many of each part")
    rest = [call.factor(f"i{d}", size) if d != dim else () for d, size in enumerate(shape)]
    pieces, inside = call.factor("pieces", out[dim]), call.factor("step", step, _MANY_DIM)
    before = (*rest[:dim], (*pieces, *inside), *rest[dim + 1 :])
    return call.build({"self": before}, ((*rest[:dim], pieces, *rest[dim + 1 :]),), linear=_FIRST)


@rule("aten.slice_scatter", signature="self src dim start end step")
def slice_scatter(call: Call) -> OpFactors:
    """A slice that is written to: as `slice_`, the inside of the blocks that both tensors are made of splits."""
    shape, source = call.shape("self"), call.shape("src")
    dim = normal_dim(call.number("dim", 0), len(shape))
    start, end = slice_range(shape[dim], call.number("start", 0), source[dim])
    rest = [call.factor(f"i{d}", size) if d != dim else () for d, size in enumerate(shape)]
    if call.number("step", 1) == 1 and shape[dim] and source[dim]:
        length, whole, inner = _parts(call, shape[dim], (start, end), "c")
        written = (*call.factor("s", source[dim] // length, _MANY_DIM), *inner)
    else:
        whole, written = call.factor("i", shape[dim], _MANY_DIM), call.factor("s", source[dim], _MANY_DIM)
    dims, own = (*rest[:dim], whole, *rest[dim + 1 :]), (*rest[:dim], written, *rest[dim + 1 :])
    return call.build({"self": dims, "src": own}, (dims,), linear=((0, 1),))


@rule("aten.select_scatter", signature="self src dim index")
def select_scatter(call: Call) -> OpFactors:
    shape = call.shape("self")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = [call.factor(f"i{d}", size, _MANY_DIM if d == dim else "") for d, size in enumerate(shape)]
    own = (*dims[:dim], *dims[dim + 1 :])
    return call.build({"self": tuple(dims), "src": own}, (tuple(dims),), linear=((0, 1),))


@rule("aten.narrow", signature="self dim start length")
def narrow(call: Call) -> OpFactors:
    shape, out = call.shape("self"), call.output_shape()
    dim = normal_dim(call.number("dim", 0), len(shape))
    start, end = slice_range(shape[dim], call.number("start", 0), out[dim])
    if start == end:
        return _blocked_dim(call, dim, out, "nothing of the dim is taken")
    return _cut(call, dim, (start, end), (end - start,))


@rule(
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split",
    "aten.unsafe_split", "aten.unsafe_chunk", signature="self how dim",
)  # fmt: skip
def split(call: Call) -> OpFactors:
    shape = call.shape("self")
    dim = normal_dim(call.number("dim", 0), len(shape))
    lengths = split_lengths(call, shape, dim)
    if sum(lengths) != shape[dim] or len(lengths) != len(call.op.outputs):
        return call.unsplit("pieces of unknown sizes")
    cuts = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return _cut(call, dim, cuts, lengths)


@rule("aten.select", signature="self dim index")
def select(call: Call) -> OpFactors:
    shape = call.shape("self")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = [call.factor(f"i{d}", size, _MANY_DIM if d == dim else "") for d, size in enumerate(shape)]
    return call.build({"self": tuple(dims)}, ((*dims[:dim], *dims[dim + 1 :]),), linear=_FIRST)


@rule("aten.unbind", signature="self dim")
def unbind(call: Call) -> OpFactors:
    shape = call.shape("self")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = [call.factor(f"i{d}", size, _MANY_DIM if d == dim else "") for d, size in enumerate(shape)]
    out = (*dims[:dim], *dims[dim + 1 :])
    return call.build({"self": tuple(dims)}, (out,) * len(call.op.outputs), linear=_FIRST)


@rule("aten.cat", "aten.concat", "aten.concatenate", signature="tensors dim")
def cat(call: Call) -> OpFactors:
    """Pieces whose lengths have a common divisor g share the factor g inside; their blocks stay whole."""
    shapes = call.operand_shapes()
    out = call.output_shape()
    if any(len(shape) != len(out) for shape in shapes):
        return call.unsplit("an empty tensor is among the pieces")
    dim = normal_dim(call.number("dim", 0), len(out))
    rest = [call.factor(f"i{d}", size) if d != dim else () for d, size in enumerate(out)]
    common = math.gcd(*(shape[dim] for shape in shapes))
    inner = call.factor("inner", common)
    reason = "the pieces lie one after another"

    def along(name: str, length: int) -> Dims:
        blocks = call.factor(name, length // common if common else length, reason)
        return (*rest[:dim], (*blocks, *inner) if length else blocks, *rest[dim + 1 :])

    pieces = [along(f"p{i}", shape[dim]) for i, shape in enumerate(shapes)]
    return call.build({"tensors": pieces}, (along("all", out[dim]),), linear=(tuple(range(len(shapes))),))


@rule("aten.stack", signature="tensors dim")
def stack(call: Call) -> OpFactors:
    shapes = call.operand_shapes()
    dim = normal_dim(call.number("dim", 0), len(shapes[0]) + 1)
    dims = call.factors("i", shapes[0])
    new = call.factor("new", len(shapes), "the pieces lie one after another")
    out = (*dims[:dim], new, *dims[dim:])
    return call.build({"tensors": [dims] * len(shapes)}, (out,), linear=(tuple(range(len(shapes))),))


def _pad_amounts(call: Call, rank: int) -> list[tuple[int, int]]:
    """How much a pad adds before and after each dim; the op lists the last dim first."""
    amounts = call.ints("pad")
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts) - 1, 2)]
    return [*([(0, 0)] * (rank - len(pairs))), *reversed(pairs)]


@rule("aten.pad", "aten.constant_pad_nd", signature="self pad mode value")
def pad(call: Call) -> OpFactors:
    """Dims that are not padded split; a constant is added in blocks, whose inside splits.

    Zeros added to a partial value keep it partial.
    """
    shape, out = call.shape("self"), call.output_shape()
    plain = call.op.target.startswith("aten.constant_pad_nd")
    is_constant = plain or call.get("mode", "constant") == "constant"
    inside, outside = [], []
    for dim, (size, (before, after)) in enumerate(zip(shape, _pad_amounts(call, len(shape)), strict=True)):
        if not before and not after:
            inside.append(call.factor(f"i{dim}", size))
            outside.append(inside[-1])
            continue
        length = math.gcd(size, before, after) if is_constant and size and out[dim] else 1
        inner = call.factor(f"c{dim}", length)
        inside.append((*call.factor(f"i{dim}", size // length, "the dim is padded"), *inner))
        outside.append((*call.factor(f"o{dim}", out[dim] // length, "the dim is padded"), *inner))
    value = call.get("mode") if plain else call.get("value")
    keeps_partial = not is_constant or value in (None, 0)
    return call.build({"self": tuple(inside)}, (tuple(outside),), linear=_FIRST if keeps_partial else ())


@rule("aten.flip", signature="self dims")
def flip(call: Call) -> OpFactors:
    shape = call.shape("self")
    moved = {normal_dim(dim, len(shape)) for dim in call.ints("dims")}
    reason = "elements move along the dim"
    dims = tuple(call.factor(f"i{d}", size, reason if d in moved else "") for d, size in enumerate(shape))
    return call.build({"self": dims}, (dims,), linear=_FIRST)


@rule("aten.roll", signature="self shifts dims")
def roll(call: Call) -> OpFactors:
    """Each rolled dim is made of blocks that the shift moves as they are: their inside splits."""
    shape = call.shape("self")
    dims = [normal_dim(dim, len(shape)) for dim in call.ints("dims")]
    reason = "elements move along the dim"
    if not dims:
        same = tuple(call.factors("i", shape, reason))
        return call.build({"self": same}, (same,), linear=_FIRST)
    factors: list[tuple[str, ...]] = []
    for dim, size in enumerate(shape):
        shifts = [shift for shift, at in zip(call.ints("shifts"), dims, strict=True) if at == dim]
        length = math.gcd(size, *shifts)
        moved = length and size != length
        blocks = call.factor(f"m{dim}", size // length, reason) if moved else ()
        factors.append((*blocks, *call.factor(f"i{dim}", length if moved else size)))
    return call.build({"self": tuple(factors)}, (tuple(factors),), linear=_FIRST)


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_", signature="self diagonal")
def triangle(call: Call) -> OpFactors:
    shape = call.shape("self")
    reason = "the triangle depends on the position"
    dims = tuple(call.factor(f"i{d}", size, reason if d >= len(shape) - 2 else "") for d, size in enumerate(shape))
    return call.build({"self": dims}, (dims,), linear=_FIRST)


def _blocked_dim(call: Call, dim: int, out: Shape, reason: str) -> OpFactors:
    """An op that changes one dim in a way that cannot be split and passes the others through."""
    dims = [call.factor(f"i{d}", size, reason if d == dim else "") for d, size in enumerate(call.shape("self"))]
    changed = call.factor("o", out[dim], reason)
    return call.build({"self": tuple(dims)}, ((*dims[:dim], changed, *dims[dim + 1 :]),), linear=_FIRST)
