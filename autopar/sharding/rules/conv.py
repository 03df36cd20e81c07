"""Convolutions, poolings and upsamplings: batch and channels split, and positions with a border of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, Factor, rule
from autopar.sharding.rules.windows import num_positions, reaches

_ONE_PIECE = "a stride is one piece"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Positions:
    """Dims of the positions before and after the op, and what splits of their factors need."""

    inside: Dims
    outside: Dims
    halo: tuple[str, ...]
    least: dict[str, int]


def _positions(call: Call) -> _Positions:
    space = num_positions(call.op.target)
    inside, outside = list[Factor](), list[Factor]()
    halo, least = list[str](), dict[str, int]()
    lengths = zip(call.shape("input")[-space:], call.output_shape()[-space:], reaches(call), strict=True)
    for dim, (length, made, reach) in enumerate(lengths):
        if reach.reason:
            inside.append(call.factor(f"x{dim}", length, reach.reason))
            outside.append(call.factor(f"y{dim}", made, reach.reason))
            continue
        common = call.factor(f"x{dim}", length // reach.inner_in)
        inside.append((*common, *call.factor(f"s{dim}", reach.inner_in, _ONE_PIECE)))
        outside.append((*common, *call.factor(f"t{dim}", reach.inner_out, _ONE_PIECE)))
        if reach.communicates and common:
            halo += common
            least[common[0]] = -(-max(reach.before, reach.after) // reach.inner_in)
    return _Positions(inside=tuple(inside), outside=tuple(outside), halo=tuple(halo), least=least)


def _lowerings(positions: _Positions) -> dict[str, str]:
    return dict.fromkeys(positions.halo, Lowering.SPATIAL_HALO)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", signature="input weight bias stride padding dilation groups")
def convolution(call: Call) -> OpFactors:
    """`n (g i) x…, (g o) i w… -> n (g o) x…`, summed over i; g is the number of groups."""
    x, w = call.shape("input"), call.shape("weight")
    groups, space = call.number("groups", 1), len(w) - 2
    batch = call.factors("n", x[: -space - 1])
    g = call.factor("g", groups)
    i, o = call.factor("i", w[1]), call.factor("o", w[0] // groups)
    window = call.factors("w", w[2:], "the window is one piece")
    positions = _positions(call)
    channels = (*g, *o)
    operands = {
        "input": (*batch, (*g, *i), *positions.inside), "weight": (channels, i, *window), "bias": (channels,),
    }
    lowerings = dict.fromkeys(i, str(Lowering.BIAS_ON_FIRST_RANK)) if call.has("bias") else {}
    return call.build(
        operands, ((*batch, channels, *positions.outside),), reducing=(i,), rigid=(positions.halo,),
        lowerings={**lowerings, **_lowerings(positions)}, least=positions.least,
    )


@rule(
    "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d",
    signature="input weight bias stride padding output_padding groups dilation",
)
def transposed_convolution(call: Call) -> OpFactors:
    """`n (g i) x…, (g i) o w… -> n (g o) x…`, summed over i; g is the number of groups."""
    x, w = call.shape("input"), call.shape("weight")
    groups, space = call.number("groups", 1), len(w) - 2
    batch = call.factors("n", x[: -space - 1])
    g = call.factor("g", groups)
    i, o = call.factor("i", w[0] // groups), call.factor("o", w[1])
    window = call.factors("w", w[2:], "the window is one piece")
    positions = _positions(call)
    operands = {
        "input": (*batch, (*g, *i), *positions.inside), "weight": ((*g, *i), o, *window), "bias": ((*g, *o),),
    }
    lowerings = dict.fromkeys(i, str(Lowering.BIAS_ON_FIRST_RANK)) if call.has("bias") else {}
    return call.build(
        operands, ((*batch, (*g, *o), *positions.outside),), reducing=(i,), rigid=(positions.halo,),
        lowerings={**lowerings, **_lowerings(positions)}, least=positions.least,
    )


def _pooling(call: Call, *, linear: bool) -> OpFactors:
    x = call.shape("input")
    kept = call.factors("n", x[: -num_positions(call.op.target)])
    positions = _positions(call)
    outputs = [(*kept, *positions.outside) if name else kept for name in call.op.outputs]
    return call.build(
        {"input": (*kept, *positions.inside)}, outputs, rigid=(positions.halo,), lowerings=_lowerings(positions),
        least=positions.least, linear=((0,),) if linear else (),
    )


@rule(
    "aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.max_pool2d_with_indices",
    signature="input kernel_size stride padding dilation ceil_mode",
)
def max_pooling(call: Call) -> OpFactors:
    return _pooling(call, linear=False)


@rule(
    "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d",
    signature="input kernel_size stride padding ceil_mode count_include_pad divisor_override",
)
def average_pooling(call: Call) -> OpFactors:
    return _pooling(call, linear=True)


_ADAPTIVE_MEAN = "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d"


@rule("aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", signature="input output_size")
@rule(*(f"aten.{name}" for name in _ADAPTIVE_MEAN.split()), signature="input output_size")
def adaptive_pooling(call: Call) -> OpFactors:
    """Windows side by side split; a mean over all positions of a dim is a sum that is scaled."""
    x, space = call.shape("input"), num_positions(call.op.target)
    is_mean = "avg" in call.op.target
    kept = call.factors("n", x[:-space])
    inside, outside, summed = list[Factor](), list[Factor](), list[str]()
    lengths = zip(x[-space:], call.output_shape()[-space:], reaches(call), strict=True)
    for dim, (length, made, reach) in enumerate(lengths):
        if made == 1:
            inside.append(call.factor(f"x{dim}", length, "" if is_mean else "a maximum over the dim"))
            outside.append(())
            summed += inside[-1] if is_mean else ()
            continue
        indices = any(call.op.outputs[1:]) and "the indices count positions of the whole"
        common = call.factor(f"x{dim}", made, reach.reason or indices or "")
        if reach.reason:
            inside.append(call.factor(f"z{dim}", length, reach.reason))
        else:
            inside.append((*common, *call.factor(f"s{dim}", reach.inner_in, "a window is one piece")))
        outside.append(common)
    outputs = [(*kept, *outside) if name else kept for name in call.op.outputs]
    return call.build(
        {"input": (*kept, *inside)}, outputs, reducing=(tuple(summed),),
        lowerings=dict.fromkeys(summed, Lowering.SCALED_MEAN), linear=((0,),) if is_mean else (),
    )


_NEAREST = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
_INTERPOLATED = "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"


@rule(*(f"aten.{name}" for name in _NEAREST.split()), signature="input output_size scale_factors")
@rule(*(f"aten.{name}" for name in _INTERPOLATED.split()), signature="input output_size align_corners scale_factors")
def upsampling(call: Call) -> OpFactors:
    return _pooling(call, linear=True)


