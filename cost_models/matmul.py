"""What share of a device's peak a matrix product reaches, by its sizes: tiles, waves, inner loop, alignment.

A product is cut into tiles of its result, which multiprocessors take in waves; a wave lasts as long as one tile's loop
over the inner dim. Libraries choose the tile (and may cut the inner dim, too) for the shape at hand: so does this.
"""

from __future__ import annotations

import math
from functools import lru_cache

# Tiles of a kernel library (rows, columns) and what each reaches of the best: a smaller tile reads more for each
# multiplication, from an L2 cache that feeds a 128 x 128 tile at about full rate (assumed; an A100's L2 gives 5 TB/s,
# and 64 x 64 tiles at its peak would read 9.7).
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.96), (128, 64, 0.82), (64, 128, 0.82), (64, 64, 0.60))
# A tile's start (filling the pipeline of loads) and end (writing the result) cost about as much as 128 steps of the
# inner dim (assumed, range 64-256). Writing 8192 x 8192 alone is worth 150 steps on an A100.
INNER_DIM_OVERHEAD = 128
# Into how many parts the inner dim may be cut where there are few tiles.
SPLITS = (1, 2, 4)
# Loads of tensor cores are 16 bytes wide: rows that do not begin at multiples of 8 elements need narrower ones.
# NVIDIA's guide asks for multiples of 8; padding GPT-2's vocabulary of 50257 to 50304 is known to save a quarter of a
# small model's step (nanoGPT), of which the head is about a fifth: 0.4 of the rate (assumed, range 0.25-0.6), with
# steps between for 2 and 4.
ALIGNED_SHARE = {1: 0.4, 2: 0.6, 4: 0.85}


@lru_cache(maxsize=1 << 16)
def shape_efficiency(multiprocessors: int, m: float, n: float, k: float, batch: float) -> float:
    """The share of the best product's rate that `batch` products of (m, k) by (k, n) reach; grows with k."""
    best = 0.0
    work = m * n * max(1.0, batch)
    for rows, columns, rate in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * max(1.0, batch)
        filled = work / (tiles * rows * columns) * rate
        for split in SPLITS:
            if split > 1 and tiles * split > multiprocessors:
                break
            waves = math.ceil(tiles * split / multiprocessors)
            busy = tiles * split / (waves * multiprocessors)
            best = max(best, filled * busy * k / (k + split * INNER_DIM_OVERHEAD))
    return best


def aligned_share(*row_lengths: float, odd: float = ALIGNED_SHARE[1]) -> float:
    """What is left of the rate where rows of 16-bit elements have these lengths; `odd`, of rows of odd length."""
    worst = 1.0
    for length in row_lengths:
        if length % 8:
            shares = {**ALIGNED_SHARE, 1: odd}
            worst = min(worst, next(shares[size] for size in sorted(shares, reverse=True) if length % size == 0
                                    or size == 1))
    return worst
