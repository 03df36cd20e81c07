"""Piecewise fits find the latencies and bandwidths that made the times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.measured import CollectiveFit
from autopar.profiler.fit_pieces import fit_pieces

SIZES = tuple(2**power for power in range(10, 31))


@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e12))
def test_one_line_is_one_piece(latency_s: float, rate: float) -> None:
    pieces, error = fit_pieces([(size, latency_s + size / rate) for size in SIZES])
    assert error < 1e-3
    assert len(pieces) == 1
    assert pieces[0].latency_s == pytest.approx(latency_s, rel=1e-2)
    assert pieces[0].bytes_per_s == pytest.approx(rate, rel=1e-2)


def test_a_protocol_step_is_found() -> None:
    def time_s(size: int) -> float:
        return 5e-6 + size / 2e9 if size < 2**18 else 6e-5 + size / 2e10

    pieces, error = fit_pieces([(size, time_s(size)) for size in SIZES])
    assert error < 1e-3
    assert [round(math.log2(piece.from_bytes), 1) if piece.from_bytes else 0 for piece in pieces] == [0, 17.5]
    assert [piece.latency_s for piece in pieces] == pytest.approx([5e-6, 6e-5], rel=1e-3)
    assert [piece.bytes_per_s for piece in pieces] == pytest.approx([2e9, 2e10], rel=1e-3)
    fit = CollectiveFit(
        collective="all_reduce", backend="gloo", num_ranks=2, num_nodes=1, per_node=2, groups_per_node=1,
        pieces=pieces, relative_error=error, points=(),
    )
    for size in (1, 2000, 2**17, 2**20, 2**32):
        assert fit.time_s(size) == pytest.approx(time_s(size), rel=1e-2)


def test_noise_makes_no_pieces_and_shows_in_the_error() -> None:
    noise = [1.2 if i % 2 else 0.8 for i in range(len(SIZES))]
    points = [(size, (1e-4 + size / 1e9) * factor) for size, factor in zip(SIZES, noise, strict=True)]
    pieces, error = fit_pieces(points)
    assert len(pieces) == 1
    assert 0.1 < error < 0.3
    assert pieces[0].bytes_per_s == pytest.approx(1e9, rel=0.3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_and_flat_times(count: int) -> None:
    pieces, error = fit_pieces([(size, 1e-3) for size in SIZES[:count]])
    assert len(pieces) == 1
    assert error < 0.9
    assert pieces[0].latency_s >= 0
    assert 0 < pieces[0].bytes_per_s < math.inf


def test_times_that_do_not_grow_say_nothing_of_larger_messages() -> None:
    """Flat up to 1 MiB: a message of 1 GiB takes as many times as long as it is larger, not as long as 1 MiB."""
    flat = fit_of_points([(size, 1e-3) for size in (1024, 16384, 262144, 2**20)])
    assert flat.time_s(2**20) == pytest.approx(1e-3, rel=1e-6)
    assert flat.time_s(2**30) == pytest.approx(1024 * 1e-3, rel=1e-3)
    assert flat.bytes_per_s == pytest.approx(2**20 / 1e-3, rel=1e-6)


def test_a_line_goes_on_beyond_the_largest_message() -> None:
    line = fit_of_points([(size, 1e-5 + size / 1e9) for size in (1024, 65536, 2**20, 2**24)])
    assert line.time_s(2**30) == pytest.approx(1e-5 + 2**30 / 1e9, rel=1e-6)
    assert line.bytes_per_s == pytest.approx(1e9, rel=1e-6)


def fit_of_points(points: list[tuple[int, float]]) -> CollectiveFit:
    pieces, error = fit_pieces(points)
    return CollectiveFit(collective="all_reduce", backend="gloo", num_ranks=2, num_nodes=1, per_node=2,
                         groups_per_node=1, pieces=pieces, relative_error=error, points=tuple(points))
