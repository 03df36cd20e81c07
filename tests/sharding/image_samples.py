"""Calls of convolutions, poolings and upsamplings, with and without positions that can be cut."""

from __future__ import annotations

from sampling import Pick, sample
from shard_compare import Sample


def _length(pick: Pick, stride: int) -> int:
    return stride * pick.one_of(2, 4, 6, 6, 12)


@sample("conv1d.default", "conv2d.default", "conv3d.default", draws=12)
def convolution(pick: Pick, target: str) -> Sample:
    """Windows of 1 to 5 with paddings that keep the length (or its part), and others."""
    space = int(target[len("aten.conv")])
    groups = pick.one_of(1, 1, 2, 6)
    cin, cout = groups * pick.one_of(1, 2, 3), groups * pick.one_of(1, 2, 6)
    window, stride, dilation = pick.one_of(1, 2, 3, 5), pick.one_of(1, 1, 2, 3), pick.one_of(1, 1, 2)
    padding = pick.one_of(dilation * (window - 1) // 2, dilation * (window - 1) // 2, 0, 1)
    bias = pick.x(cout) if pick.flag() else None
    batch = () if pick.rng.random() < 0.2 else (pick.one_of(2, 6),)
    lengths = [_length(pick, stride), *[max(_length(pick, stride) // 2, 4)] * (space - 1)]
    while any(length + 2 * padding < dilation * (window - 1) + 1 for length in lengths):
        lengths = [2 * length for length in lengths]
    x, w = pick.x(*batch, cin, *lengths), pick.x(cout, cin // groups, *((window,) * space))
    return Sample(target, (x, w, bias, [stride] * space, [padding] * space, [dilation] * space, groups))


@sample("conv1d.padding", "conv2d.padding", "conv3d.padding", draws=4)
def padded_convolution(pick: Pick, target: str) -> Sample:
    space = int(target[len("aten.conv")])
    x, w = pick.x(2, 2, 6, *[4] * (space - 1)), pick.x(4, 2, *((pick.one_of(1, 3, 3, 2),) * space))
    return Sample(target, (x, w, pick.x(4), [1] * space, pick.one_of("same", "valid")))


@sample("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input", draws=12)
def transposed_convolution(pick: Pick, target: str) -> Sample:
    """Mostly those that make the length a multiple: padding and output padding make up for the window."""
    space = int(target[len("aten.conv_transpose")])
    groups = pick.one_of(1, 1, 2, 3)
    cin, cout = groups * pick.one_of(1, 2), groups * pick.one_of(1, 2)
    window, stride, dilation = pick.one_of(1, 2, 3, 4), pick.one_of(1, 2, 3), pick.one_of(1, 1, 2)
    extent = dilation * (window - 1) + 1
    padding = max(0, (extent - stride + 1) // 2)
    extra = min(max(0, stride + 2 * padding - extent), max(stride, dilation) - 1)
    if pick.rng.random() < 0.2:
        padding, extra = 0, 0
    bias = pick.x(cout) if pick.flag() else None
    lengths = [pick.one_of(4, 6, 6, 12), *[3] * (space - 1)]
    x, w = pick.x(pick.one_of(2, 6), cin, *lengths), pick.x(cin, cout // groups, *((window,) * space))
    numbers = ([stride] * space, [padding] * space, [extra] * space, groups, [dilation] * space)
    return Sample(target, (x, w, bias, *numbers))


@sample("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", draws=10)
def max_pooling(pick: Pick, target: str) -> Sample:
    space = int(target[len("aten.max_pool")])
    window = pick.one_of(2, 2, 3, 4)
    stride, padding = pick.one_of(window, 1, 2), pick.one_of(0, (window - 1) // 2)
    lengths = [_length(pick, stride), *[max(6, 2 * stride)] * (space - 1)]
    if lengths[0] + 2 * padding < window:
        lengths[0] *= 2
    x = pick.x(pick.one_of(2, 6), 3, *lengths)
    rest = ([stride] * space, [padding] * space)
    dilation = pick.one_of(1, 1, 2) if padding else 1
    if any(length + 2 * padding < dilation * (window - 1) + 1 for length in lengths):
        dilation = 1
    return Sample(target, (x, [window] * space, *rest, [dilation] * space, pick.one_of(False, True)))


@sample("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", draws=10)
def average_pooling(pick: Pick, target: str) -> Sample:
    """Windows that do not overlap, or keep the length; some round up, some count no padding."""
    space = int(target[len("aten.avg_pool")])
    window, stride, padding = pick.one_of((2, 2, 0), (3, 1, 1), (3, 1, 1), (3, 3, 1), (5, 1, 2), (3, 2, 0))
    x = pick.x(pick.one_of(2, 6), 3, stride * pick.one_of(4, 6), *[6] * (space - 1))
    kind = pick.one_of("plain", "plain", "divisor", "rounded up", "padding not counted")
    rest = [kind == "rounded up", kind != "padding not counted", *([5] if kind == "divisor" and space > 1 else [])]
    return Sample(target, (x, [window] * space, [stride] * space, [padding] * space, *rest))


@sample("max_pool2d_with_indices.default")
def pooling_indices(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4, 4), [2, 2], [2, 2]))


@sample("adaptive_avg_pool2d.default", "adaptive_max_pool2d.default", "_adaptive_avg_pool2d.default", draws=8)
def adaptive(pick: Pick, target: str) -> Sample:
    x = pick.x(pick.one_of(2, 6), 6, pick.one_of(4, 6, 12), 6)
    return Sample(target, (x, pick.one_of([1, 1], [2, 2], [4, 6], [1, 3], [5, 3])))


@sample("adaptive_avg_pool1d.default", "adaptive_max_pool1d.default")
def adaptive_1d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.one_of(2, 6), 6, pick.one_of(4, 12)), [pick.one_of(1, 2, 4)]))


@sample("adaptive_avg_pool3d.default")
def adaptive_3d(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 4, 4, 4), pick.one_of([2, 2, 2], [1, 1, 1])))


_INTERPOLATED = ("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec")
_NEAREST = ("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
_EXACT = ("_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d.vec")


@sample(*_INTERPOLATED, *_NEAREST, *_EXACT, "upsample_bicubic2d.vec", draws=7)
def upsample(pick: Pick, target: str) -> Sample:
    space = next(number for number in (1, 2, 3) if f"{number}d" in target)
    lengths = [pick.one_of(2, 4, 6, 6, 12), *[pick.one_of(2, 3)] * (space - 1)]
    factor = pick.one_of(1, 2, 2, 3)
    corners = () if "nearest" in target else (pick.one_of(False, False, False, True),)
    how = pick.one_of("size", "scale", "scale", "odd")
    if how == "odd":
        size = [length * factor + 1 for length in lengths]
        return Sample(target, (pick.x(2, 6, *lengths), size, *corners, None))
    size = [length * factor for length in lengths] if how == "size" else None
    return Sample(target, (pick.x(2, 6, *lengths), size, *corners, None if size else [float(factor)] * space))


@sample("upsample_nearest2d.default")
def upsample_by_numbers(pick: Pick, target: str) -> Sample:
    factor = pick.one_of(2, 3)
    return Sample(target, (pick.x(2, 6, 6, 2), [6 * factor, 2 * factor], *pick.one_of((), (float(factor),) * 2)))
