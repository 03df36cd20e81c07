"""Patches, pixels and frequencies: ops that trade positions for channels, and Fourier transforms."""

from __future__ import annotations

import math

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.rules.registry import Call, aligned, broadcast, normal_dim, rule

_FIRST = ((0,),)
_PATCHES = "patches reach across the cut"
_LITERAL = "the op is told how many there are"


@rule("aten.im2col", signature="self kernel_size")
def im2col(call: Call) -> OpFactors:
    """`n c h w -> n (c k) l`: channels and rows split."""
    x, out = call.shape("self"), call.output_shape()
    rows, c = call.factors("n", x[:-3]), call.factor("c", x[-3])
    space = call.factors("x", x[-2:], _PATCHES)
    window, places = call.factor("k", out[-2] // x[-3], _PATCHES), call.factor("l", out[-1], _PATCHES)
    return call.build({"self": (*rows, c, *space)}, ((*rows, (*c, *window), places),), linear=_FIRST)


@rule("aten.col2im", signature="self output_size kernel_size")
def col2im(call: Call) -> OpFactors:
    """`n (c k) l -> n c h w`, where patches that overlap are added."""
    x, out = call.shape("self"), call.output_shape()
    rows, c = call.factors("n", x[:-2]), call.factor("c", out[-3])
    window, places = call.factor("k", x[-2] // out[-3], _PATCHES), call.factor("l", x[-1], _PATCHES)
    space = call.factors("y", out[-2:], _PATCHES)
    return call.build({"self": (*rows, (*c, *window), places)}, ((*rows, c, *space),), linear=_FIRST)


@rule("aten.unfold", signature="self dimension size step")
def unfold(call: Call) -> OpFactors:
    """Windows along one dim; where they lie side by side and fill it, they split."""
    x, out = call.shape("self"), call.output_shape()
    if not x:
        return call.unsplit("a single number")
    dim, size = normal_dim(call.number("dimension", 0), len(x)), call.number("size", 1)
    rest = [call.factor(f"i{d}", n) if d != dim else () for d, n in enumerate(x)]
    inside = call.factor("size", size, _PATCHES)
    if call.number("step", 1) == size and out[dim] * size == x[dim]:
        windows = call.factor("windows", out[dim])
        before = (*windows, *inside)
    else:
        windows, before = call.factor("windows", out[dim], _PATCHES), call.factor("along", x[dim], _PATCHES)
    after = (*rest[:dim], windows, *rest[dim + 1 :], inside)
    return call.build({"self": (*rest[:dim], before, *rest[dim + 1 :])}, (after,), linear=_FIRST)


def _pixels(call: Call, channels: int, height: int, width: int, factor: int) -> tuple[Dims, Dims]:
    """The last three dims with pixels in the channels, and with them in the positions."""
    c, h, w = call.factor("c", channels), call.factor("h", height), call.factor("w", width)
    down, across = call.factor("r", factor, _LITERAL), call.factor("s", factor, _LITERAL)
    return ((*c, *down, *across), h, w), (c, (*h, *down), (*w, *across))


@rule("aten.pixel_shuffle", signature="self factor")
def pixel_shuffle(call: Call) -> OpFactors:
    x, factor = call.shape("self"), call.number("factor", 1)
    rows = call.factors("n", x[:-3])
    deep, wide = _pixels(call, x[-3] // factor**2, x[-2], x[-1], factor)
    return call.build({"self": (*rows, *deep)}, ((*rows, *wide),), linear=_FIRST)


@rule("aten.pixel_unshuffle", signature="self factor")
def pixel_unshuffle(call: Call) -> OpFactors:
    x, factor = call.shape("self"), call.number("factor", 1)
    rows = call.factors("n", x[:-3])
    deep, wide = _pixels(call, x[-3], x[-2] // factor, x[-1] // factor, factor)
    return call.build({"self": (*rows, *wide)}, ((*rows, *deep),), linear=_FIRST)


@rule("aten.channel_shuffle", signature="self groups")
def channel_shuffle(call: Call) -> OpFactors:
    """`n (g c) … -> n (c g) …`."""
    x, groups = call.shape("self"), call.number("groups", 1)
    n, space = call.factor("n", x[0]), call.factors("x", x[2:])
    g, c = call.factor("g", groups, _LITERAL), call.factor("c", x[1] // groups)
    return call.build({"self": (n, (*g, *c), *space)}, ((n, (*c, *g), *space),), linear=_FIRST)


_ONE_DIM = "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"
_MANY_DIMS = "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn"


@rule(*(f"aten.{name}" for name in (*_ONE_DIM.split(), *_MANY_DIMS.split())), signature="self n dim norm")
def fourier(call: Call) -> OpFactors:
    """The dims that are not transformed split."""
    x, out = call.shape("self"), call.output_shape()
    name = call.op.target.split(".")[1]
    last = (-1,) if name in _ONE_DIM.split() else (-2, -1) if name.endswith("2") else tuple(range(len(x)))
    if name.endswith("n") and not call.has("dim") and call.has("n"):
        last = tuple(range(-len(call.ints("n")), 0))
    moved = {normal_dim(dim, len(x)) for dim in call.ints("dim", last)}
    reason = "a Fourier transform along the dim"
    before = [call.factor(f"x{d}", n, reason) if d in moved else call.factor(f"i{d}", n) for d, n in enumerate(x)]
    after = [call.factor(f"y{d}", n, reason) if d in moved else before[d] for d, n in enumerate(out)]
    return call.build({"self": tuple(before)}, (tuple(after),), linear=_FIRST)


@rule("aten.real", "aten.imag", signature="self")
def part_of_complex(call: Call) -> OpFactors:
    dims = call.factors("i", call.shape("self"))
    return call.build({"self": dims}, (dims,), linear=_FIRST)


@rule("aten.view_as_real", "aten.view_as_complex", signature="self")
def complex_pairs(call: Call) -> OpFactors:
    """A last dim of two numbers against one complex number."""
    shapes = sorted((call.shape("self"), call.output_shape()), key=len)
    dims = call.factors("i", shapes[0])
    pairs = (*dims, call.factor("pair", 2, "the parts of one number"))
    before, after = (dims, pairs) if "view_as_real" in call.op.target else (pairs, dims)
    return call.build({"self": before}, (after,), linear=_FIRST)


@rule("aten.diagonal", signature="self offset dim1 dim2")
def diagonal(call: Call) -> OpFactors:
    x, reason = call.shape("self"), "the diagonal runs through the dim"
    taken = {normal_dim(call.number("dim1", 0), len(x)), normal_dim(call.number("dim2", 1), len(x))}
    dims = [call.factor(f"i{d}", n, reason if d in taken else "") for d, n in enumerate(x)]
    along = call.factor("along", call.output_shape()[-1], reason)
    rest = [names for d, names in enumerate(dims) if d not in taken]
    return call.build({"self": tuple(dims)}, ((*rest, along),), linear=_FIRST)


@rule("aten.outer", signature="self vec2")
def outer(call: Call) -> OpFactors:
    a, b = call.factor("a", math.prod(call.shape("self"))), call.factor("b", math.prod(call.shape("vec2")))
    return call.build({"self": (a,), "vec2": (b,)}, ((a, b),), linear=((0,), (1,)))


@rule("aten.cosine_similarity", signature="x1 x2 dim")
def cosine_similarity(call: Call) -> OpFactors:
    shapes = call.operand_shapes()
    whole = broadcast(shapes)
    along = normal_dim(call.number("dim", 1), len(whole))
    dims = tuple(call.factor(f"i{d}", n, "a norm over the dim" if d == along else "") for d, n in enumerate(whole))
    operands = {"x1": aligned(shapes[0], dims), "x2": aligned(shapes[1], dims)}
    return call.build(operands, ((*dims[:along], *dims[along + 1 :]),))
