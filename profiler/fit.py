"""Latency and bandwidth from measured message times."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import numpy as np

from autopar.profiler.profile import LinkFit

LARGE_BYTES = 256 * 1024  # below this, buffers of the operating system hide a link's rate; up to this, latency rules


def fit_link(times_s: Mapping[int, float], *, backend: str) -> LinkFit:
    """The LinkFit of median seconds by message size.

    Least squares of relative errors over the large messages gives the slope; the latency is the median of what messages
    of up to 256 KiB take beyond it. Needs two large sizes and one small one.
    """
    points = tuple(sorted(times_s.items()))
    large = [(size, time) for size, time in points if size >= LARGE_BYTES]
    small = [(size, time) for size, time in points if size <= LARGE_BYTES]
    assert len(large) >= 2, "two large sizes are needed"
    assert small, "a small size is needed"
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*large, strict=True))
    rows = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    slope = float(np.linalg.lstsq(rows, np.ones_like(seconds), rcond=None)[0][1])
    if slope <= 0:  # times that do not grow with size: noise; the largest message bounds the rate
        slope = float(seconds[-1] / sizes[-1])
    latency_s = max(0.0, median(time - slope * size for size, time in small))
    errors = [(latency_s + slope * size) / time - 1 for size, time in points]
    return LinkFit(
        backend=backend,
        latency_s=latency_s,
        bytes_per_s=1 / slope,
        relative_error=float(np.sqrt(np.mean(np.square(errors)))),
        points=points,
    )
