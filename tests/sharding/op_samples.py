"""Calls of every ruled op on small random tensors; some sizes divide by 2, some by 3, some by neither."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shard_compare import Sample

T = torch.Tensor
_SIZES = (1, 2, 3, 4, 6, 6, 12)


class Pick:
    """Random sizes and tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)

    def size(self) -> int:
        return self.rng.choice(_SIZES)

    def shape(self, rank: int) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(rank))

    def x(self, *shape: int) -> T:
        return torch.randn(*shape, dtype=torch.float64)

    def positive(self, *shape: int) -> T:
        return torch.rand(*shape, dtype=torch.float64) + 0.1

    def ids(self, high: int, *shape: int) -> T:
        return torch.randint(0, high, shape)

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def one_of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`."""
        kept = tuple(1 if self.rng.random() < 0.4 else size for size in shape)
        return kept[self.rng.randrange(len(shape)) if self.flag() else 0 :]


Maker = Callable[[Pick], Sample]
SAMPLES: list[tuple[str, Maker, int]] = []  # target, maker, how many draws


def sample(*targets: str, draws: int = 12) -> Callable[[Callable[[Pick, str], Sample]], Callable[[Pick, str], Sample]]:
    def register(make: Callable[[Pick, str], Sample]) -> Callable[[Pick, str], Sample]:
        for target in targets:
            name = f"aten.{target}"
            SAMPLES.append((name, lambda pick, name=name: make(pick, name), draws))
        return make

    return register


# --- pointwise ---------------------------------------------------------------------------------------------------

_UNARY = """abs acos acosh angle asin asinh atan atanh ceil celu clamp_min-0.1 clamp_max-0.3 cos cosh deg2rad digamma
elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan
leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive rad2deg reciprocal
relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square tan tanh trunc
i0 ones_like zeros_like alias clone contiguous detach relu_ neg_ exp_ tanh_ sigmoid_ silu_ sqrt_ fix absolute negative
clamp-0.1 clamp_-0.1 clip-0.1 lift_fresh lift_fresh_copy threshold-0.2-0.4 threshold_-0.2-0.4 full_like-2.0
leaky_relu_ hardtanh_ elu_ hardswish_"""


@sample(*(f"{name.split('-')[0]}.default" for name in _UNARY.split()), draws=3)
def unary(pick: Pick, target: str) -> Sample:
    packet = target.split(".")[1]
    numbers = next((w.split("-")[1:] for w in _UNARY.split() if w.split("-")[0] == packet), [])
    shape = pick.shape(pick.one_of(1, 2, 3))
    return Sample(target, (pick.positive(*shape) * 0.9, *map(float, numbers)))


@sample("polygamma.default")
def polygamma(pick: Pick, target: str) -> Sample:
    return Sample(target, (1, pick.positive(*pick.shape(2))))


@sample("bitwise_not.default")
def integer_unary(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.ids(5, *pick.shape(2)),))


_BINARY = """add.Tensor sub.Tensor mul.Tensor div.Tensor atan2.default copysign.Tensor eq.Tensor ne.Tensor lt.Tensor
le.Tensor gt.Tensor ge.Tensor fmax.default fmin.default floor_divide.default fmod.Tensor remainder.Tensor
hypot.default logaddexp.default logaddexp2.default maximum.default minimum.default pow.Tensor_Tensor xlogy.Tensor
true_divide.Tensor rsub.Tensor max.other min.other subtract.Tensor multiply.Tensor divide.Tensor greater.Tensor
less.Tensor not_equal.Tensor greater_equal.Tensor less_equal.Tensor isclose.default ldexp.Tensor"""


@sample(*_BINARY.split(), draws=5)
def binary(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    one, two = pick.positive(*pick.broadcast(shape)), pick.positive(*pick.broadcast(shape))
    frozen = (0, 1) if "floor_divide" in target else (1,) if "remainder" in target or "fmod" in target else ()
    return Sample(target, (one, two), frozen=frozen)


@sample("add_.Tensor", "mul_.Tensor", "sub_.Tensor", "div_.Tensor", draws=5)
def binary_in_place(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    return Sample(target, (pick.positive(*shape), pick.positive(*pick.broadcast(shape))))


_SCALAR = """add.Scalar sub.Scalar mul.Scalar div.Scalar eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
pow.Tensor_Scalar fmod.Scalar remainder.Scalar rsub.Scalar mul.Tensor add.Tensor div.Tensor sub.Tensor"""


@sample(*_SCALAR.split(), draws=3)
def with_number(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.positive(*pick.shape(2)), 2.0))


@sample("add.Tensor", "sub.Tensor")
def with_alpha(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.x(*shape), pick.x(*shape)), {"alpha": 3})


@sample("div.Tensor_mode")
def rounded_division(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.x(*shape), pick.positive(*shape)), {"rounding_mode": "floor"})


@sample("pow.Scalar")
def number_first(pick: Pick, target: str) -> Sample:
    return Sample(target, (2.0, pick.x(*pick.shape(2))))


_INTEGER = """bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor
bitwise_left_shift.Tensor bitwise_right_shift.Tensor __lshift__.Tensor __rshift__.Tensor logical_and.default
logical_or.default logical_xor.default"""


@sample(*_INTEGER.split(), draws=4)
def integer_binary(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    return Sample(target, (pick.ids(4, *pick.broadcast(shape)), pick.ids(4, *pick.broadcast(shape))))


@sample("addcmul.default", "addcdiv.default", "lerp.Tensor")
def ternary(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.x(*shape), pick.x(*shape), pick.positive(*pick.broadcast(shape))))


@sample("lerp.Scalar")
def lerp_number(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.x(*shape), pick.x(*shape), 0.3))


@sample("where.self")
def where(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    mask = pick.ids(2, *pick.broadcast(shape)).bool()
    return Sample(target, (mask, pick.x(*pick.broadcast(shape)), pick.x(*pick.broadcast(shape))))


@sample("where.ScalarOther")
def where_number(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.ids(2, *pick.broadcast(shape)).bool(), pick.x(*shape), 1.0))


@sample("masked_fill.Scalar", "masked_fill_.Scalar")
def masked_fill(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    return Sample(target, (pick.x(*shape), pick.ids(2, *pick.broadcast(shape)).bool(), pick.one_of(0, -1e4)))


@sample("to.dtype", "_to_copy.default")
def to_dtype(pick: Pick, target: str) -> Sample:
    x = pick.x(*pick.shape(2))
    dtype = pick.one_of(torch.float64, torch.int64)
    return Sample(target, (x, dtype)) if target.startswith("aten.to") else Sample(target, (x,), {"dtype": dtype})


@sample("to.device")
def to_device(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), torch.device("cpu"), torch.float64))


@sample("to.dtype_layout")
def to_layout(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)),), {"dtype": torch.float64})


@sample("to.other", "type_as.default")
def to_other(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), pick.x(*pick.shape(1))))


@sample("dropout.default", "native_dropout.default")
def dropout(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(3)), 0.3, pick.one_of(True, True, False)))


@sample("copy.default", "copy_.default")
def copy(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    frozen = () if "copy_" in target else (0, 1)
    return Sample(target, (pick.x(*shape), pick.x(*pick.broadcast(shape))), frozen=frozen)


@sample("fill.Scalar")
def fill(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), 0.5))


# --- views -------------------------------------------------------------------------------------------------------

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


@sample("stack.default")
def stack(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, ([pick.x(*shape) for _ in range(pick.one_of(1, 2, 6))], pick.one_of(0, 1, -1)))


@sample("pad.default")
def pad(pick: Pick, target: str) -> Sample:
    rest = pick.one_of(([0, 1],), ([1, 1, 0, 2],), ([0, 0, 2, 2],), ([1, 0], "constant", 3.0), ([1, 1], "replicate"))
    return Sample(target, (pick.x(2, 4, 6), *rest))


@sample("constant_pad_nd.default")
def constant_pad(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), [0, 1], pick.one_of(0, 2.0)))


@sample("flip.default")
def flip(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of([0], [1, 2])))


@sample("roll.default")
def roll(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), *pick.one_of(([1], [0]), ([2, 1], [1, 2]), ([1],))))


@sample("tril.default", "triu.default")
def triangle(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 6), pick.one_of(0, 1, -1)))


# --- reductions --------------------------------------------------------------------------------------------------


@sample(
    "sum.dim_IntList",
    "mean.dim",
    "amax.default",
    "amin.default",
    "var.correction",
    "std.correction",
    "logsumexp.default",
)
def reduce(pick: Pick, target: str) -> Sample:
    dims = pick.one_of([0], [1], [-1], [0, 2])
    if "correction" in target:
        return Sample(target, (pick.x(4, 6, 3), dims), {"correction": 1, "keepdim": pick.flag()})
    return Sample(target, (pick.x(4, 6, 3), dims, pick.flag()))


@sample("var.dim", "std.dim", "var_mean.dim", "std_mean.dim")
def variance(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of([1], [0, 2]), True, pick.flag()))


@sample("var_mean.correction", "std_mean.correction")
def var_mean(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), [1]), {"correction": 0, "keepdim": pick.flag()})


@sample(
    "sum.default",
    "mean.default",
    "max.default",
    "min.default",
    "prod.default",
    "var.default",
    "std.default",
    "nansum.default",
    "var_mean.default",
    "std_mean.default",
)
def reduce_all(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3),))


@sample("max.dim", "min.dim", "prod.dim_int", "median.dim", "argmax.default", "argmin.default")
def reduce_one(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of(0, 1, -1), pick.flag()))


@sample("any.dim", "all.dim")
def boolean(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.ids(2, 4, 6).bool(), pick.one_of(0, 1), pick.flag()))


@sample("any.default", "all.default")
def boolean_all(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.ids(2, 4, 6).bool(),))


@sample("linalg_vector_norm.default", "norm.ScalarOpt_dim")
def norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), 2, [pick.one_of(0, 1, -1)], pick.flag()))


@sample(
    "softmax.int",
    "log_softmax.int",
    "cumsum.default",
    "cumprod.default",
    "logcumsumexp.default",
    "sort.default",
    "argsort.default",
    "glu.default",
)
def along(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 12), pick.one_of(0, 1, -1)))


@sample("_softmax.default", "_log_softmax.default")
def raw_softmax(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of(0, 1, -1), False))


@sample("topk.default")
def topk(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 2, pick.one_of(0, 1, -1)))


# --- matrix products ---------------------------------------------------------------------------------------------


@sample("linear.default")
def linear(pick: Pick, target: str) -> Sample:
    n, k = pick.size(), pick.size()
    bias = (pick.x(n),) if pick.flag() else ()
    return Sample(target, (pick.x(*pick.shape(pick.one_of(0, 1, 2)), k), pick.x(n, k), *bias))


@sample("addmm.default")
def addmm(pick: Pick, target: str) -> Sample:
    m, k, n = pick.shape(3)
    bias = pick.one_of((n,), (m, n), (1, n), (m, 1))
    scale = {"alpha": 2.0, "beta": 0.5} if pick.flag() else {}
    return Sample(target, (pick.x(*bias), pick.x(m, k), pick.x(k, n)), scale)


@sample("baddbmm.default")
def baddbmm(pick: Pick, target: str) -> Sample:
    b, m, k, n = pick.shape(4)
    return Sample(target, (pick.x(*pick.one_of((b, m, n), (1, m, n))), pick.x(b, m, k), pick.x(b, k, n)))


@sample("mm.default")
def mm(pick: Pick, target: str) -> Sample:
    m, k, n = pick.shape(3)
    return Sample(target, (pick.x(m, k), pick.x(k, n)))


@sample("bmm.default")
def bmm(pick: Pick, target: str) -> Sample:
    b, m, k, n = pick.shape(4)
    return Sample(target, (pick.x(b, m, k), pick.x(b, k, n)))


@sample("mv.default")
def mv(pick: Pick, target: str) -> Sample:
    m, k = pick.shape(2)
    return Sample(target, (pick.x(m, k), pick.x(k)))


@sample("dot.default")
def dot(pick: Pick, target: str) -> Sample:
    k = pick.size()
    return Sample(target, (pick.x(k), pick.x(k)))


@sample("matmul.default")
def matmul(pick: Pick, target: str) -> Sample:
    b, c, m, k, n = pick.shape(5)
    one, two = pick.one_of(
        ((b, c, m, k), (b, c, k, n)),
        ((b, 1, m, k), (c, k, n)),
        ((b, m, k), (k, n)),
        ((k,), (b, k, n)),
        ((b, m, k), (k,)),
        ((k,), (k,)),
    )
    return Sample(target, (pick.x(*one), pick.x(*two)))


@sample("einsum.default")
def einsum(pick: Pick, target: str) -> Sample:
    b, i, j, k = pick.shape(4)
    equation, shapes = pick.one_of(
        ("bij,bjk->bik", ((b, i, j), (b, j, k))), ("bi,kj->bikj", ((b, i), (k, j))), ("bij->j", ((b, i, j),)),
        ("ij,jk,kb->ib", ((i, j), (j, k), (k, b))),
    )  # fmt: skip
    return Sample(target, (equation, [pick.x(*shape) for shape in shapes]))


# --- look-ups ----------------------------------------------------------------------------------------------------


@sample("embedding.default")
def embedding(pick: Pick, target: str) -> Sample:
    v, d = pick.shape(2)
    return Sample(target, (pick.x(v, d), pick.ids(v, *pick.shape(pick.one_of(1, 2)))))


@sample("index_select.default")
def index_select(pick: Pick, target: str) -> Sample:
    dim = pick.one_of(0, 1)
    return Sample(target, (pick.x(4, 6, 3), dim, pick.ids(4, pick.size())))


@sample("gather.default")
def gather(pick: Pick, target: str) -> Sample:
    dim = pick.one_of(0, 1, -1)
    return Sample(
        target, (pick.x(4, 6), dim, pick.ids(4, *(pick.one_of((6, 6), (12, 6), (2, 3)) if dim == 0 else (4, 12))))
    )


@sample("scatter.src", "scatter_add.default")
def scatter(pick: Pick, target: str) -> Sample:
    index = torch.stack([torch.randperm(6)[:4] for _ in range(4)])
    return Sample(target, (pick.x(4, 6), 1, index, pick.x(4, 4)))


@sample("scatter.value")
def scatter_value(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 1, pick.ids(6, 4, 1), 1.0))


@sample("index.Tensor")
def index(pick: Pick, target: str) -> Sample:
    x = pick.x(4, 6, 12)
    indices = pick.one_of(
        [pick.ids(4, 6, 1), pick.ids(6, 1, 3)], [None, pick.ids(6, 12)], [pick.ids(4, 2, 6)],
        [None, None, pick.ids(12, 6, 2)], [pick.ids(4, 6), None, pick.ids(12, 6)],
    )  # fmt: skip
    return Sample(target, (x, indices))


@sample("index_add.default", "index_copy.default")
def index_add(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), 0, torch.randperm(6)[:2], pick.x(2, 4)))


@sample("index_put.default")
def index_put(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), [pick.ids(6, 2)], pick.x(2, 4)), {"accumulate": True})


# --- attention, norms, convolutions ------------------------------------------------------------------------------


@sample("scaled_dot_product_attention.default")
def attention(pick: Pick, target: str) -> Sample:
    b, g, d, s = pick.one_of(1, 2, 6), pick.one_of(1, 2, 3, 6), pick.one_of(2, 4), pick.one_of(3, 4, 6)
    kind = pick.one_of("plain", "causal", "mask", "bias", "grouped", "grouped mask", "keys", "scale", "flat")
    r = pick.one_of(2, 3, 6) if kind.startswith("grouped") else 1
    lead = (b,) if kind == "flat" else (b, g)
    keys = pick.one_of(2, 6) if kind == "keys" else s
    q = pick.x(*((b,) if kind == "flat" else (b, g * r)), s, d)
    k, v = pick.x(*lead, keys, d), pick.x(*lead, keys, d)
    given: dict[str, Any] = {}
    if kind == "causal":
        given["is_causal"] = True
    if kind == "scale":
        given["scale"] = 0.3
    if kind.startswith("grouped"):
        given["enable_gqa"] = True
    mask = ()
    if "mask" in kind:
        mask = (pick.ids(2, pick.one_of(1, b), pick.one_of(1, g * r), s, keys).bool() | torch.eye(s, keys).bool(),)
    if kind == "bias":
        mask = (pick.x(*pick.one_of((b, g, s, keys), (g, s, keys), (s, keys), (b, 1, 1, keys))),)
    return Sample(target, (q, k, v, *mask), given, frozen=(3,) if "mask" in kind else ())


@sample("layer_norm.default")
def layer_norm(pick: Pick, target: str) -> Sample:
    normalized = pick.one_of((6,), (3, 4))
    affine = (pick.x(*normalized), pick.x(*normalized)) if pick.flag() else ()
    return Sample(target, (pick.x(*pick.shape(2), *normalized), list(normalized), *affine))


@sample("native_layer_norm.default")
def native_layer_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], pick.x(6), pick.x(6), 1e-5))


@sample("rms_norm.default")
def rms_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], *((pick.x(6),) if pick.flag() else ())))


@sample("_fused_rms_norm.default")
def fused_rms_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], pick.x(6), 1e-5))


@sample("group_norm.default")
def group_norm(pick: Pick, target: str) -> Sample:
    affine = (pick.x(12), pick.x(12)) if pick.flag() else ()
    return Sample(target, (pick.x(pick.one_of(2, 6), 12, 3), pick.one_of(1, 2, 3, 6, 12), *affine))


@sample("instance_norm.default")
def instance_norm(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    return Sample(target, (pick.x(pick.one_of(2, 6), c, 4), pick.x(c), pick.x(c), None, None, True, 0.1, 1e-5, False))


@sample("batch_norm.default")
def batch_norm(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    affine = (pick.x(c), pick.x(c)) if pick.flag() else (None, None)
    x = pick.x(pick.one_of(4, 6), c, *pick.one_of((), (3,), (2, 6)))
    frozen = (3, 4) if affine[0] is not None else (1, 2)
    return Sample(target, (x, *affine, pick.x(c), pick.positive(c), pick.flag(), 0.1, 1e-5, False), frozen=frozen)


@sample("native_batch_norm.default", "_native_batch_norm_legit_functional.default")
def native_batch_norm(pick: Pick, target: str) -> Sample:
    c = 6
    stats = (pick.x(c), pick.positive(c))
    return Sample(target, (pick.x(4, c, 2, 6), pick.x(c), pick.x(c), *stats, True, 0.1, 1e-5), frozen=(3, 4))


@sample("conv1d.default", "conv2d.default", "conv3d.default")
def convolution(pick: Pick, target: str) -> Sample:
    space = int(target[len("aten.conv")])
    groups = pick.one_of(1, 1, 2, 6)
    cin, cout = groups * pick.one_of(1, 2, 3), groups * pick.one_of(1, 2, 6)
    window = pick.one_of(1, 3)
    bias = pick.x(cout) if pick.flag() else None
    batch = () if pick.rng.random() < 0.2 else (pick.one_of(2, 6),)
    x, w = pick.x(*batch, cin, *((4,) * space)), pick.x(cout, cin // groups, *((window,) * space))
    stride, padding = [pick.one_of(1, 2)] * space, [window // 2] * space
    return Sample(target, (x, w, bias, stride, padding, [1] * space, groups))


@sample("max_pool2d.default", "avg_pool2d.default")
def pooling(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.one_of(2, 6), 6, 4, 4), [2, 2], [2, 2]))


@sample("max_pool1d.default", "avg_pool1d.default")
def pooling_1d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.one_of(2, 6), 6, 4), [2], [2]))


@sample("max_pool3d.default", "avg_pool3d.default")
def pooling_3d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4, 4, 4), [2, 2, 2], [2, 2, 2]))


@sample("max_pool2d_with_indices.default")
def pooling_indices(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4, 4), [2, 2], [2, 2]))


@sample("adaptive_avg_pool2d.default", "adaptive_max_pool2d.default", "_adaptive_avg_pool2d.default")
def adaptive(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.one_of(2, 6), 6, 4, 4), pick.one_of([1, 1], [2, 2])))


@sample("adaptive_avg_pool1d.default", "adaptive_max_pool1d.default")
def adaptive_1d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.one_of(2, 6), 6, 4), [2]))


@sample("adaptive_avg_pool3d.default")
def adaptive_3d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4, 4, 4), [2, 2, 2]))


@sample("upsample_nearest1d.vec")
def upsample_1d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4), [8], None))


@sample("upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec")
def upsample(pick: Pick, target: str) -> Sample:
    middle = () if "nearest" in target else (False,)
    return Sample(target, (pick.x(2, 6, 4, 4), [8, 8], *middle, None))


# --- losses ------------------------------------------------------------------------------------------------------


@sample("cross_entropy_loss.default")
def cross_entropy(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    kind = pick.one_of("plain", "sum", "none", "ignore", "ignore", "single", "space", "weight", "smooth", "soft")
    if kind == "single":
        return Sample(target, (pick.x(c), pick.ids(c)))
    shape = (pick.one_of(6, 12), c, *((3,) if kind == "space" else ()))
    x, y = pick.x(*shape), pick.ids(c, shape[0], *shape[2:])
    if kind == "soft":
        return Sample(target, (x, torch.softmax(pick.x(*shape), 1)))
    rest: tuple[Any, ...] = {
        "sum": (None, 2),
        "none": (None, 0),
        "weight": (pick.positive(c),),
        "smooth": (None, 1, -100, 0.1),
    }.get(kind, ())
    if kind == "ignore":
        y[torch.rand(y.shape) < 0.4] = -100
        y[0] = 1
    return Sample(target, (x, y, *rest), frozen=(2,))


@sample("nll_loss_nd.default", "nll_loss.default")
def nll_loss(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), pick.ids(4, 6), None, pick.one_of(0, 1, 2)))


@sample(
    "mse_loss.default",
    "l1_loss.default",
    "smooth_l1_loss.default",
    "huber_loss.default",
    "kl_div.default",
    "soft_margin_loss.default",
)
def pairwise(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    frozen = (1,) if "soft_margin" in target else ()
    return Sample(target, (pick.x(*shape), pick.x(*shape), pick.one_of(0, 1, 2)), frozen=frozen)


@sample("binary_cross_entropy_with_logits.default")
def logits_loss(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    y = pick.ids(2, *shape).double()
    weight = pick.one_of(None, pick.positive(shape[-1]))
    return Sample(target, (pick.x(*shape), y, weight, None, pick.one_of(0, 1, 2)), frozen=(1, 2))


@sample("binary_cross_entropy.default")
def probability_loss(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    y = pick.ids(2, *shape).double()
    return Sample(target, (pick.positive(*shape) * 0.8, y, None, pick.one_of(0, 1, 2)), frozen=(1,))


# --- creation ----------------------------------------------------------------------------------------------------


@sample("arange.default")
def arange(pick: Pick, target: str) -> Sample:
    return Sample(target, (6,))


@sample("new_ones.default", "new_zeros.default")
def new_tensor(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), [4, 6]))


@sample("diff.default")
def diff(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 1, -1, pick.x(4, 1)))


def draws(maker: Maker, number: int) -> Iterator[Sample]:
    """The op's first samples, the same in every run."""
    for seed in range(number):
        yield maker(Pick(seed))
