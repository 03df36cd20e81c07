"""Pointwise ops: one rule, with broadcasting, and the few that are linear in their operands."""

from __future__ import annotations

from autopar.graph.model_graph import Ref
from autopar.sharding.factors import OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, aligned, broadcast, rule

_UNARY = """
abs absolute acos acosh asin asinh atan atanh angle bitwise_not ceil celu clamp clamp_max clamp_min clip cos cosh
deg2rad digamma elu erf erfc erfinv exp exp2 expm1 fix floor frac gelu hardshrink hardsigmoid hardswish hardtanh
isfinite isinf isnan leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num positive
rad2deg reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
sqrt square tan threshold trunc i0 polygamma
ones_like zeros_like full_like empty_like fill
"""
_BINARY_AND_MORE = """
atan2 bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift copysign eq ne lt le gt ge fmax fmin
floor_divide fmod greater greater_equal hypot isclose ldexp lerp less less_equal logaddexp logaddexp2 logical_and
logical_or logical_xor maximum minimum not_equal polar pow remainder true_divide xlogy addcmul addcdiv
__and__ __or__ __xor__ __lshift__ __rshift__
"""
_SAME_VALUE = "alias clone contiguous detach lift_fresh_copy lift_fresh _to_copy to type_as"
_FLOATS = ("float64", "float32", "bfloat16", "float16")


def _targets(names: str) -> list[str]:
    """The targets, with the in-place forms of those that have one."""
    return [target for name in names.split() for target in (f"aten.{name}", f"aten.{name}_")]


def _pointwise(
    call: Call, linear: tuple[tuple[int, ...], ...] = (), split_lowering: str = "", keeps_padding: bool = False
) -> OpFactors:
    """`keeps_padding`: of one tensor, and value and derivative are finite wherever the operand is."""
    shapes = call.operand_shapes()
    dims = call.factors("i", broadcast(shapes))
    operands = tuple(aligned(shape, dims) for shape in shapes)
    return OpFactors(
        sizes=call.sizes,
        operands=operands,
        outputs=(dims,) * len(call.op.outputs),
        linear=linear,
        padded=frozenset(call.sizes) if keeps_padding and len(shapes) == 1 else frozenset(),
        split_lowering=split_lowering,
    )


@rule(*_targets("tanh"))
def hyperbolic_tangent(call: Call) -> OpFactors:
    return _pointwise(call, keeps_padding=True)


@rule(*_targets(_UNARY), *_targets(_BINARY_AND_MORE), "aten.max.other", "aten.min.other")
def pointwise(call: Call) -> OpFactors:
    return _pointwise(call)


@rule(*_targets("neg negative"))
def negative(call: Call) -> OpFactors:
    return _pointwise(call, linear=((0,),))


@rule(*_targets("add sub subtract rsub"), signature="self other")
def addition(call: Call) -> OpFactors:
    """A sum is linear in both operands together; a number added to a partial value would be added on every rank."""
    return _pointwise(call, linear=((0, 1),) if call.is_tensor("other") and call.is_tensor("self") else ())


@rule(*_targets("mul multiply"), signature="self other")
def multiplication(call: Call) -> OpFactors:
    return _pointwise(call, linear=tuple((i,) for i in range(len(call.op.operands))), keeps_padding=True)


@rule("autopar.gated", signature="gate up activation")
def gated(call: Call) -> OpFactors:
    """Linear in what the gate is multiplied with."""
    return _pointwise(call, linear=((1,),))


@rule(*_targets("div divide"), signature="self other")
def division(call: Call) -> OpFactors:
    linear = call.is_tensor("self") and not call.has("rounding_mode")
    return _pointwise(call, linear=((0,),) if linear else (), keeps_padding=linear)


@rule(*_targets(_SAME_VALUE))
def same_value(call: Call) -> OpFactors:
    """Copies and conversions; between floating dtypes they keep a partial value partial."""
    names = (*call.op.operands[:1], *call.op.outputs)
    floats = all(name and call.tensors[name].dtype in _FLOATS for name in names)
    shapes = call.operand_shapes()
    dims = call.factors("i", shapes[0])
    model = [call.factors(f"m{i}_", shape, "only its dtype is read") for i, shape in enumerate(shapes[1:])]
    return OpFactors(
        sizes=call.sizes,
        operands=(dims, *model),
        outputs=(dims,) * len(call.op.outputs),
        blocked=call.blocked,
        padded=frozenset(name for names in dims for name in names),
        linear=((0,),) if floats else (),
    )


@rule(*_targets("copy"))
def copy(call: Call) -> OpFactors:
    return _pointwise(call)


@rule("aten.where.self", signature="condition self other")
def where(call: Call) -> OpFactors:
    return _pointwise(call, linear=((1, 2),))


@rule("aten.where")
def where_scalar(call: Call) -> OpFactors:
    return _pointwise(call)


@rule(*_targets("masked_fill"), signature="self mask value")
def masked_fill(call: Call) -> OpFactors:
    is_zero = not isinstance(call.args["value"], Ref) and call.get("value") == 0
    return _pointwise(call, linear=((0,),) if is_zero else ())


@rule(*_targets("dropout"), "aten.native_dropout", signature="input p train")
def dropout(call: Call) -> OpFactors:
    """On shards each rank draws for its own part; elsewhere every rank draws the same, so a partial value stays one."""
    random = call.get("train", True) is True and call.get("p") != 0
    return _pointwise(call, linear=((0,),), split_lowering=Lowering.AXIS_RANDOM if random else "")


@rule(*_targets("bernoulli"), "aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.rrelu")
def random_pointwise(call: Call) -> OpFactors:
    return _pointwise(call, split_lowering=Lowering.AXIS_RANDOM)


@rule("aten.expand_as", signature="self other")
def expand_as(call: Call) -> OpFactors:
    return _pointwise(call, linear=((0,),))
