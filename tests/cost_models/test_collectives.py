"""Collective times against cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.cluster import GroupShape, Link
from autopar.cost_models.collectives import (
    LAUNCH_S,
    NETWORK_EFFICIENCY,
    NETWORK_FILL_S,
    NETWORK_LAUNCH_S,
    NETWORK_SETTLE_S,
    collective_time_s,
    send_recv_time_s,
)
from autopar.sharding.reshard import Collective

# A link whose rate was measured is taken at its word: no efficiency, no ramp.
LINK = Link(name="test", latency_s=1e-6, bandwidth_bytes_per_s=100e9, source="measured")
NETWORK = Link(name="400Gbps", latency_s=5e-6, bandwidth_bytes_per_s=50e9)
GIB = float(2**30)


def group(size: int, nodes: int = 1, per_node: int | None = None) -> GroupShape:
    return GroupShape(size=size, num_nodes=nodes, per_node=per_node or size // nodes, link=LINK, network=NETWORK)


def test_ring_inside_a_node() -> None:
    assert collective_time_s(Collective.ALL_GATHER, GIB, group(4)) == pytest.approx(
        LAUNCH_S + 3e-6 + GIB * 3 / 4 / 100e9
    )
    assert collective_time_s(Collective.REDUCE_SCATTER, GIB, group(4)) == collective_time_s(
        Collective.ALL_GATHER, GIB, group(4)
    )
    # Two rounds of bytes, and twice a tree of depth 2.
    assert collective_time_s(Collective.ALL_REDUCE, GIB, group(4)) == pytest.approx(
        LAUNCH_S + 4e-6 + GIB * 2 * 3 / 4 / 100e9
    )
    # Each rank has a quarter and keeps a quarter of that.
    assert collective_time_s(Collective.ALL_TO_ALL, GIB, group(4)) == pytest.approx(
        LAUNCH_S + 3e-6 + GIB / 4 * 3 / 4 / 100e9
    )


def test_two_nodes_are_bound_by_the_network() -> None:
    full = GIB / 2 / (50e9 * NETWORK_EFFICIENCY)
    fill = NETWORK_FILL_S * full / (full + NETWORK_SETTLE_S)
    expected = LAUNCH_S + NETWORK_LAUNCH_S + 6 * 1e-6 + 2 * 5e-6 + full + fill
    assert collective_time_s(Collective.ALL_GATHER, GIB, group(8, 2)) == pytest.approx(expected)


def on_nvlink(size: int, name: str, bandwidth: float) -> GroupShape:
    link = Link(name=name, latency_s=1.9e-6, bandwidth_bytes_per_s=bandwidth, source="vendor")
    return GroupShape(size=size, num_nodes=1, per_node=size, link=link, network=NETWORK)


def test_a_ring_fills_its_pipeline_step_by_step() -> None:
    """16 MiB on 4 A100: 2 (n - 1) / n of it at 0.76 of 300 GB/s, six steps of 5 us and 25 us, and a tree's latency."""
    full = 2 * 2**24 * 3 / 4 / (300e9 * 0.76)
    fill = (25e-6 + 6 * 5e-6) * full / (full + 5e-6)
    expected = LAUNCH_S + 2 * 2 * 1.9e-6 + full + fill
    assert collective_time_s(Collective.ALL_REDUCE, 2**24, on_nvlink(4, "NVLink3", 300e9)) == pytest.approx(expected)


def test_switches_reduce_on_more_than_four_devices() -> None:
    """8 H100 with NVLS: 1.3 of the ring's 0.8 of 450 GB/s, 75 us of filling."""
    full = 2 * 2**26 * 7 / 8 / (450e9 * 0.8 * 1.3)
    expected = LAUNCH_S + 2 * 3 * 1.9e-6 + full + 75e-6 * full / (full + 25e-6)
    assert collective_time_s(Collective.ALL_REDUCE, 2**26, on_nvlink(8, "NVLink4", 450e9)) == pytest.approx(expected)
    four, eight = (collective_time_s(Collective.ALL_REDUCE, GIB, on_nvlink(n, "NVLink4", 450e9)) for n in (4, 8))
    assert eight < four


def test_groups_on_a_node_share_its_network() -> None:
    shape = group(2, 2, 1)
    alone = collective_time_s(Collective.ALL_GATHER, GIB, shape)
    assert collective_time_s(Collective.ALL_GATHER, GIB, shape, groups_per_node=8) == pytest.approx(8 * alone, rel=0.1)


@pytest.mark.parametrize("kind", list(Collective))
def test_nothing_to_do_takes_no_time(kind: Collective) -> None:
    assert collective_time_s(kind, GIB, group(1)) == 0
    assert collective_time_s(kind, 0, group(4)) == 0
    assert collective_time_s(kind, GIB, None) == 0


def test_send_recv() -> None:
    assert send_recv_time_s(GIB, group(2)) == pytest.approx(1e-6 + GIB / 100e9)
    assert send_recv_time_s(GIB, group(2, 2), flows_per_node=4) == pytest.approx(
        5e-6 + GIB * 4 / (50e9 * NETWORK_EFFICIENCY)
    )


def test_neighbours_exchange_at_once() -> None:
    assert collective_time_s(Collective.NEIGHBOUR_EXCHANGE, GIB, group(4)) == pytest.approx(
        LAUNCH_S + 1e-6 + GIB / 100e9
    )
    assert collective_time_s(Collective.NEIGHBOUR_EXCHANGE, GIB, group(8, 2)) == pytest.approx(
        LAUNCH_S + NETWORK_LAUNCH_S + 5e-6 + GIB / (50e9 * NETWORK_EFFICIENCY)
    )


def test_mirrored_pairs_share_the_network() -> None:
    assert collective_time_s(Collective.MIRRORED_EXCHANGE, GIB, group(4)) == pytest.approx(
        LAUNCH_S + 1e-6 + GIB / 100e9
    )
    assert collective_time_s(Collective.MIRRORED_EXCHANGE, GIB, group(8, 2)) == pytest.approx(
        LAUNCH_S + NETWORK_LAUNCH_S + 5e-6 + 4 * GIB / (50e9 * NETWORK_EFFICIENCY)
    )


@given(st.sampled_from(list(Collective)), st.floats(1, 1e10), st.integers(1, 8), st.integers(1, 16))
def test_more_bytes_never_take_less(kind: Collective, size_bytes: float, per_node: int, nodes: int) -> None:
    shape = group(per_node * nodes, nodes)
    assert collective_time_s(kind, size_bytes, shape) <= collective_time_s(kind, 2 * size_bytes, shape)
