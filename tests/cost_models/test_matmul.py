"""Tiles, waves and alignment of products against cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost_models.compute import best_matmul_efficiency, matmul_efficiency
from autopar.cost_models.hardware import device_type
from autopar.cost_models.matmul import ALIGNED_SHARE, INNER_DIM_OVERHEAD, aligned_share, shape_efficiency

A100 = device_type("A100-80GB")
dims = st.integers(1, 20000)


def test_whole_waves_of_whole_tiles_lose_only_the_inner_loop() -> None:
    """108 tiles of 256 x 128 on 108 multiprocessors."""
    k = 4096
    assert shape_efficiency(108, 12 * 256, 9 * 128, k, 1.0) == pytest.approx(k / (k + INNER_DIM_OVERHEAD))


def test_one_tile_too_many_takes_another_wave() -> None:
    """109 tiles of 256 x 128 would take two waves; so it runs as 436 of 128 x 64, at 0.82, in five."""
    k = 4096
    got = shape_efficiency(108, 109 * 256, 128, k, 1.0)
    assert got == pytest.approx(0.82 * 436 / (5 * 108) * k / (k + INNER_DIM_OVERHEAD))


def test_a_batch_is_so_many_products() -> None:
    """Scores of 16 heads x 8 rows, 1024 x 1024 over heads of 128: 4096 tiles of 256 x 128 in 38 waves."""
    got = shape_efficiency(108, 1024, 1024, 128, 128.0)
    assert got == pytest.approx(4096 / (38 * 108) * 128 / (128 + INNER_DIM_OVERHEAD))


def test_few_tiles_are_cut_along_the_inner_dim() -> None:
    """One tile of 64 x 64 in four parts keeps four multiprocessors of 108 busy, on a quarter of the inner dim each."""
    k = 65536
    assert shape_efficiency(108, 64, 64, k, 1.0) == pytest.approx(0.60 * 4 / 108 * k / (k + 4 * INNER_DIM_OVERHEAD))


@given(st.integers(1, 400), dims, dims, dims, st.integers(1, 64))
def test_a_share_that_grows_with_the_inner_dim(units: int, m: int, n: int, k: int, batch: int) -> None:
    here = shape_efficiency(units, m, n, k, float(batch))
    assert 0 < here <= shape_efficiency(units, m, n, 2 * k, float(batch)) <= 1


def test_rows_off_sixteen_bytes_are_loaded_narrowly() -> None:
    """GPT-2's vocabulary is odd; padded to 50304 it is not. float32 products use no tensor cores."""
    assert aligned_share(2048, 50304) == 1.0
    assert aligned_share(2048, 50257) == ALIGNED_SHARE[1]
    assert aligned_share(4) == ALIGNED_SHARE[4]
    assert aligned_share(6, 12) == ALIGNED_SHARE[2]
    odd, even = (matmul_efficiency(A100, 8192, n, 2048) for n in (50257, 50304))
    assert odd == pytest.approx(ALIGNED_SHARE[1] * even, rel=0.02)
    odd, even = (matmul_efficiency(A100, 8192, n, 2048, dtype="float32") for n in (50257, 50304))
    assert odd == pytest.approx(even, rel=0.02)


def test_peaks_are_reached_by_no_shape() -> None:
    assert matmul_efficiency(A100, 2**15, 2**15, 2**15) <= best_matmul_efficiency(A100, "bfloat16")
