"""Calls of pointwise ops and of those that make tensors."""

from __future__ import annotations

import torch
from sampling import Pick, sample
from shard_compare import Sample

_UNARY = """abs acos acosh angle asin asinh atan atanh ceil celu clamp_min-0.1 clamp_max-0.3 cos cosh deg2rad digamma
elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan
leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive rad2deg reciprocal
relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square tan tanh trunc
i0 ones_like zeros_like alias clone contiguous detach relu_ neg_ exp_ tanh_ sigmoid_ silu_ sqrt_ fix absolute negative
clamp-0.1 clamp_-0.1 clip-0.1 lift_fresh lift_fresh_copy threshold-0.2-0.4 threshold_-0.2-0.4 full_like-2.0
leaky_relu_ hardtanh_ elu_ hardswish_"""


@sample("polar.default")
def polar(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (pick.positive(*shape), pick.x(*shape)))


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


@sample("arange.default")
def arange(pick: Pick, target: str) -> Sample:
    return Sample(target, (6,))


@sample("new_ones.default", "new_zeros.default")
def new_tensor(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2)), [4, 6]))


@sample("diff.default")
def diff(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 1, -1, pick.x(4, 1)))
