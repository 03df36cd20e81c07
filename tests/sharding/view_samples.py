"""Calls of ops that rearrange elements."""

from __future__ import annotations

import torch
from sampling import Pick, sample
from shard_compare import Sample

_RESHAPES = [
    ((4, 6, 12), (24, 12)), ((24, 12), (4, 6, 12)), ((4, 6, 12), (4, 6, 3, 4)), ((4, 6, 12), (4, 6, -1, 2)),
    ((2, 6, 1, 4), (12, 4)), ((6, 4), (4, 6)), ((12, 6), (8, 9)), ((36,), (6, 6)), ((6, 2, 6), (4, 3, 6)),
    ((3, 4), (12, 1)), ((1, 6), (6,)), ((6, 6, 6), (36, 6)), ((2, 3, 4, 6), (6, 24)), ((6, 1), (6,)),
    ((12, 10), (6, 20)),
]  # fmt: skip


@sample("view.default", "reshape.default", "_unsafe_view.default")
def reshape(pick: Pick, target: str) -> Sample:
    before, after = pick.one_of(*_RESHAPES)
    return Sample(target, (pick.x(*before), list(after)))


@sample("view.dtype")
def view_dtype(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), torch.int32))


@sample("view_as.default", "reshape_as.default")
def reshape_as(pick: Pick, target: str) -> Sample:
    before, after = pick.one_of(*(pair for pair in _RESHAPES if -1 not in pair[1]))
    return Sample(target, (pick.x(*before), pick.x(*after)), frozen=(1,))


@sample("flatten.using_ints")
def flatten(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(4)), *pick.one_of((0, 1), (1,), (1, 2), (-2, -1))))


@sample("unflatten.int")
def unflatten(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 12), 1, pick.one_of([3, 4], [2, -1], [2, 2, 3])))


@sample("transpose.int")
def transpose(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(4)), *pick.one_of((1, 2), (-1, -2), (0, 3))))


@sample("t.default")
def t(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(pick.one_of(1, 2))),))


@sample("mT.default")
def matrix_transpose(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(3)),))


@sample("numpy_T.default")
def numpy_transpose(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(pick.one_of(1, 2, 2, 3))),))


@sample("permute.default")
def permute(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(3)), pick.one_of([2, 0, 1], [1, 2, 0], [0, -1, 1])))


@sample("movedim.int", "swapaxes.default", "swapdims.default")
def movedim(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(3)), *pick.one_of((0, 2), (2, 0), (-1, 1))))


@sample("movedim.intlist")
def movedims(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(4)), [0, 3], pick.one_of([2, 0], [1, 2])))


@sample("unsqueeze.default")
def unsqueeze(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), pick.one_of(0, 1, 2, -1)))


@sample("squeeze.default")
def squeeze(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 1, 6, 3),))


@sample("squeeze.dim")
def squeeze_dim(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 1, 6, 3), pick.one_of(0, 1, 3, -1)))


@sample("squeeze.dims")
def squeeze_dims(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 1, 6, 1), [1, 2, 3]))


@sample("expand.default", "broadcast_to.default")
def expand(pick: Pick, target: str) -> Sample:
    before, sizes = pick.one_of(
        ((6, 1, 4), [6, 3, 4]), ((1, 6), [4, -1]), ((6,), [2, 6]), ((4, 2, 1, 3, 6), [4, 2, 6, 3, -1])
    )
    if "broadcast" in target:
        sizes = [size if size != -1 else 6 for size in sizes]
    return Sample(target, (pick.x(*before), sizes))


@sample("expand_as.default")
def expand_as(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 1, 4), pick.x(2, 6, 3, 4)), frozen=(1,))


@sample("broadcast_tensors.default")
def broadcast_tensors(pick: Pick, target: str) -> Sample:
    shape = (4, 6, 3)
    tensors = [pick.x(*shape), *(pick.x(*pick.broadcast(shape)) for _ in range(pick.one_of(0, 1, 2)))]
    return Sample(target, (tensors,), frozen=(1,))


@sample("repeat.default")
def repeat(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(3, 4), pick.one_of([2, 3], [6, 1, 2], [1, 6])))


@sample("repeat_interleave.self_int")
def repeat_interleave(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 2), pick.one_of(2, 3, 6), pick.one_of(0, 1, -1)))


@sample("slice.Tensor")
def slice_(pick: Pick, target: str) -> Sample:
    rest = pick.one_of(
        (1, 0, 6),
        (1, 6, 2**63 - 1),
        (2, 0, 2**63 - 1),
        (1, -6),
        (0, 1, 3),
        (1, 3, 9),
        (1, 0, 12, 2),
        (1,),
        (),
        (1, 4, 8),
        (1, -8, -2),
    )
    return Sample(target, (pick.x(4, 12, 6), *rest))


@sample("narrow.default")
def narrow(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 12), 1, *pick.one_of((0, 6), (4, 8), (3, 3), (6, 6))))


@sample("slice.Tensor", "narrow.default", draws=1)
def slice_nothing(pick: Pick, target: str) -> Sample:
    """Rotary embeddings of the first few features leave a rest, which may be empty."""
    return Sample(target, (pick.x(4, 12, 6), 1, *((12, 2**63 - 1) if "slice" in target else (12, 0))))


@sample("select.int")
def select(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), *pick.one_of((0, 1), (1, -1), (2, 0))))


@sample("split.Tensor", "unsafe_split.Tensor")
def split(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 12, 18), *pick.one_of((6, 1), (6, -1), (4, 2), (12, 1), (2,), (5, 1))))


@sample("split_with_sizes.default", "split.sizes")
def split_sizes(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 24), pick.one_of([12, 6, 6], [8, 16], [5, 19], [24]), 1))


@sample("chunk.default", "unsafe_chunk.default")
def chunk(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 12), *pick.one_of((2, 1), (3, -1), (5, 1), (2,))))


@sample("tensor_split.sections")
def tensor_split(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 12), *pick.one_of((2, 1), (3, -1), (5, 1))))


@sample("unbind.int")
def unbind(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(3, 6, 4), pick.one_of(0, 1, -1)))


@sample("cat.default", "concat.default", "concatenate.default")
def cat(pick: Pick, target: str) -> Sample:
    lengths = pick.one_of((6, 6), (4, 8, 12), (3, 5), (6, 12))
    dim = pick.one_of(0, 1, -1)
    return Sample(
        target, ([pick.x(*((n, 4, 6) if dim == 0 else (4, n) if dim == 1 else (4, 6, n))) for n in lengths], dim)
    )


@sample("cat.default", draws=2)
def cat_with_nothing(pick: Pick, target: str) -> Sample:
    dim = pick.one_of(1, -1)
    shapes = [(4, n, 6) if dim == 1 else (4, 6, n) for n in (6, 0)]
    return Sample(target, ([pick.x(*shape) for shape in shapes], dim))


@sample("split_with_sizes.default", draws=1)
def split_off_nothing(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 24), [12, 0, 12], 1))


@sample("add.Tensor", draws=1)
def add_nothing(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 0, 6), pick.x(4, 0, 6)))


@sample("stack.default")
def stack(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, ([pick.x(*shape) for _ in range(pick.one_of(1, 2, 6))], pick.one_of(0, 1, -1)))


@sample("slice_scatter.default", draws=10)
def slice_scatter(pick: Pick, target: str) -> Sample:
    dim, length, rest = pick.one_of((1, 6, (0, 6)), (1, 6, (6, 2**63 - 1)), (1, 4, (4, 8)), (1, 12, ()), (0, 2, (1, 3)),
                                    (2, 3, (0, 6, 2)), (-2, 6, (-6,)))  # fmt: skip
    shape = [4, 12, 6]
    shape[dim] = length
    return Sample(target, (pick.x(4, 12, 6), pick.x(*shape), dim, *rest))


@sample("select_scatter.default")
def select_scatter(pick: Pick, target: str) -> Sample:
    shape = [4, 6, 3]
    dim, index = pick.one_of((0, 1), (1, -1), (2, 0), (-1, 2))
    del shape[dim]
    return Sample(target, (pick.x(4, 6, 3), pick.x(*shape), dim, index))


@sample("slice.Tensor", draws=8)
def every_few(pick: Pick, target: str) -> Sample:
    rest = pick.one_of((0, 12, 2), (1, 12, 2), (2, 2**63 - 1, 3), (1, 9, 2), (3, 12, 2), (0, 12, 5), (-11, 12, 3))
    return Sample(target, (pick.x(2, 12, 3), 1, *rest))


@sample("pad.default", draws=14)
def pad(pick: Pick, target: str) -> Sample:
    rest = pick.one_of(
        ([0, 1],), ([1, 1, 0, 2],), ([0, 0, 2, 2],), ([1, 0], "constant", 3.0), ([1, 1, 0, 0], "replicate"), ([6, 3],),
        ([0, 12, 2, 0], "constant", 1.0), ([2, 2, -2, 0],), ([-3, 3],), ([2, 2, 2, 2], "reflect"), ([-6, 6],),
    )  # fmt: skip
    return Sample(target, (pick.x(1, 2, 4, 6), *rest))


@sample("constant_pad_nd.default")
def constant_pad(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), pick.one_of([0, 1], [6, 0], [0, 0, 2, -2]), pick.one_of(0, 2.0)))


@sample("flip.default")
def flip(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of([0], [1, 2])))


@sample("roll.default", draws=10)
def roll(pick: Pick, target: str) -> Sample:
    rest = pick.one_of(
        ([1], [0]), ([2, 1], [1, 2]), ([1],), ([-6], [1]), ([6, -3], [1, -1]), ([4, 2], [1, 1]), ([12], [1]), ([0], [1])
    )
    return Sample(target, (pick.x(4, 12, 3), *rest))


@sample("tril.default", "triu.default")
def triangle(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 6), pick.one_of(0, 1, -1)))
