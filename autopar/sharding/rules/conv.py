"""Convolutions and poolings: batch and channels split, positions stay whole."""

from __future__ import annotations

from autopar.sharding.factors import OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, rule

_NEIGHBOURS = "positions need their neighbours across the cut"


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", signature="input weight bias stride padding dilation groups")
def convolution(call: Call) -> OpFactors:
    """`n (g i) …, (g o) i … -> n (g o) …`, summed over i; g is the number of groups."""
    x, w, out = call.shape("input"), call.shape("weight"), call.output_shape()
    groups, space = call.number("groups", 1), len(w) - 2
    batch = call.factors("n", x[: -space - 1])
    g = call.factor("g", groups)
    i, o = call.factor("i", w[1]), call.factor("o", w[0] // groups)
    inside = call.factors("x", x[-space:], _NEIGHBOURS)
    window = call.factors("w", w[2:], "the window is one piece")
    outside = call.factors("y", out[-space:], _NEIGHBOURS)
    channels = (*g, *o)
    operands = {"input": (*batch, (*g, *i), *inside), "weight": (channels, i, *window), "bias": (channels,)}
    lowerings = dict.fromkeys(i, Lowering.BIAS_ON_FIRST_RANK) if call.has("bias") else {}
    return call.build(operands, ((*batch, channels, *outside),), reducing=(i,), lowerings=lowerings)


_MAX = "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices"
_LINEAR = """
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
"""


def _space(target: str) -> int:
    """How many dims are positions, from the op's name: "max_pool2d" has 2."""
    return next(space for space in (1, 2, 3) if f"{space}d" in target)


def _pooling(call: Call, linear: bool) -> OpFactors:
    x = call.shape("input")
    space = _space(call.op.target)
    kept = call.factors("n", x[:-space])
    inside = call.factors("x", x[-space:], _NEIGHBOURS)
    outputs = []
    for name in call.op.outputs:
        if name:
            outputs.append((*kept, *call.factors("y", call.tensors[name].shape[-space:], _NEIGHBOURS)))
        else:
            outputs.append(kept)
    return call.build({"input": (*kept, *inside)}, outputs, linear=((0,),) if linear else ())


@rule(*(f"aten.{name}" for name in _MAX.split()), signature="input")
def max_pooling(call: Call) -> OpFactors:
    return _pooling(call, linear=False)


@rule(*(f"aten.{name}" for name in _LINEAR.split()), signature="input")
def average_pooling(call: Call) -> OpFactors:
    return _pooling(call, linear=True)
