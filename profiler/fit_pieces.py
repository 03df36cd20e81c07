"""Latency and bandwidth from message times, in pieces: libraries change their protocol with the size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autopar.cluster.measured import Piece

MAX_PIECES = 4
MIN_POINTS = 3  # of a piece: two are met exactly by any line
SURELY = 1e-3  # relative errors below this are rounding


def fit_pieces(points: Sequence[tuple[int, float]]) -> tuple[tuple[Piece, ...], float]:
    """(pieces, root mean square of relative errors) of (size_bytes, seconds), sizes ascending.

    Each piece is the least-squares line of relative errors with a latency and a slope of at least 0. Cuts lie between
    measured sizes. The number of pieces is that with the least Bayesian information criterion (Schwarz 1978): a piece
    more has to explain more than its three numbers would by chance.
    """
    assert points, "no message was measured"
    count = len(points)
    lines = {
        (first, last): _line(points[first:last])
        for first in range(count) for last in range(first + min(MIN_POINTS, count), count + 1)
    }
    # best[k][end]: the least squared error of points[:end] in k pieces, and where the last begins.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(min(MAX_PIECES, max(1, count // MIN_POINTS))):
        row: dict[int, tuple[float, int]] = {}
        for (first, last), (_, error) in lines.items():
            if first in best[-1]:
                candidate = best[-1][first][0] + error, first
                row[last] = min(row.get(last, (math.inf, 0)), candidate)
        best.append(row)
    scores = {
        k: count * math.log(max(row[count][0] / count, SURELY**2)) + 3 * k * math.log(count)
        for k, row in enumerate(best) if k and count in row
    }
    chosen = min(scores, key=lambda k: (scores[k], k))
    pieces: list[Piece] = []
    end = count
    for k in range(chosen, 0, -1):
        first = best[k][end][1]
        piece, _ = lines[first, end]
        cut = 0.0 if first == 0 else math.sqrt(points[first - 1][0] * points[first][0])
        pieces.append(Piece(from_bytes=cut, latency_s=piece[0], bytes_per_s=piece[1]))
        end = first
    return tuple(reversed(pieces)), math.sqrt(best[chosen][count][0] / count)


def _line(points: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], float]:
    """((latency, bytes a second), sum of squared relative errors) of the best line with latency and slope >= 0."""
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    ones = np.ones_like(seconds)
    rows = np.stack([ones, sizes], axis=1) / seconds[:, None]
    latency, slope = (float(value) for value in np.linalg.lstsq(rows, ones, rcond=None)[0])
    if latency < 0 or len(points) == 1:
        latency = 0.0
        slope = float(np.sum(sizes / seconds) / np.sum((sizes / seconds) ** 2))
    if slope <= 0:  # the time does not grow with the size here
        slope = 1e-18
        latency = float(np.sum(1 / seconds) / np.sum(1 / seconds**2))
    errors = (latency + slope * sizes) / seconds - 1
    return (latency, 1 / slope), float(np.sum(errors**2))
