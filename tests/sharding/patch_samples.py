"""Calls of ops on patches, pixels, frequencies and complex numbers."""

from __future__ import annotations

import torch
from sampling import Pick, sample
from shard_compare import Sample


@sample("im2col.default")
def im2col(pick: Pick, target: str) -> Sample:
    kernel, padding, stride = pick.one_of(([3, 3], 1, [1, 1]), ([2, 3], 0, [2, 1]), ([4, 1], 0, [1, 1]))
    rest = (kernel, [1, 1], [padding, padding], stride)
    return Sample(target, (pick.x(*pick.one_of((2, 6, 4, 6), (6, 4, 4))), *rest))


@sample("col2im.default")
def col2im(pick: Pick, target: str) -> Sample:
    batch = pick.one_of((), (2,))
    return Sample(target, (pick.x(*batch, 6 * 4, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]))


@sample("unfold.default", draws=8)
def unfold(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 12, 6), *pick.one_of((1, 2, 2), (1, 3, 1), (-1, 2, 2), (0, 1, 1), (1, 5, 5))))


@sample("pixel_shuffle.default")
def pixel_shuffle(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 24, 6, 2), 2))


@sample("pixel_unshuffle.default")
def pixel_unshuffle(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 6, 12, 4), 2))


@sample("channel_shuffle.default")
def channel_shuffle(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(2, 12, 6), pick.one_of(1, 2, 3, 6)))


@sample("fft_fft.default", "fft_rfft.default", "fft_ifft.default", "fft_irfft.default", "fft_hfft.default",
        "fft_ihfft.default")  # fmt: skip
def fourier(pick: Pick, target: str) -> Sample:
    x = pick.x(4, 6, 12)
    given = x + 0j if "fft_irfft" in target or "fft_hfft" in target else x
    return Sample(target, (given, pick.one_of(None, 6), pick.one_of(-1, 1)))


@sample("fft_fft2.default", "fft_ifft2.default", "fft_rfft2.default", "fft_irfft2.default", "fft_fftn.default",
        "fft_ifftn.default", "fft_rfftn.default", "fft_irfftn.default")  # fmt: skip
def fourier_in_many_dims(pick: Pick, target: str) -> Sample:
    x = pick.x(4, 6, 12)
    rest = pick.one_of((), (None, [0, 1])) if "2" in target else pick.one_of((), (None, [0, 1]), ([6, 6],))
    return Sample(target, (x + 0j if "irfft" in target else x, *rest))


@sample("real.default", "imag.default", "view_as_real.default")
def parts(pick: Pick, target: str) -> Sample:
    shape = pick.shape(2)
    return Sample(target, (torch.complex(pick.x(*shape), pick.x(*shape)),))


@sample("view_as_complex.default")
def view_as_complex(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 2),))


@sample("diagonal.default")
def diagonal(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 6), *pick.one_of((0, 1, 2), (1, -1, -2), (-2, 0, 1), ())))


@sample("outer.default")
def outer(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(pick.size()), pick.x(pick.size())))


@sample("cosine_similarity.default")
def cosine_similarity(pick: Pick, target: str) -> Sample:
    shape = pick.one_of((6, 4, 3), (1, 4, 3), (4, 3))
    return Sample(target, (pick.x(6, 4, 3), pick.x(*shape), pick.one_of(1, -1)))
