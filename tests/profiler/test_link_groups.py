"""The groups that are measured are those of plans."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.cluster import GroupShape
from autopar.cluster.measured import CollectiveFit, Piece
from autopar.cluster.parse import parse_cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.profiler import links
from autopar.profiler.link_groups import group_kinds, pair_kinds
from autopar.profiler.links import link_work, measure_links
from autopar.runtime.local import LocalPool
from autopar.sharding.reshard import Collective


def test_two_nodes_of_four() -> None:
    kinds = {kind.name: kind for kind in group_kinds(8, 4)}
    assert kinds["world"].groups == (tuple(range(8)),)
    assert kinds["node"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert kinds["across"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert kinds["blocks of 2"].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert set(kinds) == {"world", "node", "across", "blocks of 2"}, "blocks of 4 are the nodes"
    assert (kinds["across"].num_nodes, kinds["across"].per_node, kinds["across"].groups_per_node) == (2, 1, 4)
    assert [kind.groups for kind in pair_kinds(8, 4)] == [
        ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 4),), ((0, 4), (1, 5), (2, 6), (3, 7))
    ]


@pytest.mark.parametrize(("world", "per_node", "count"), [(1, 1, 0), (2, 2, 5), (2, 1, 5), (4, 4, 9)])
def test_how_much_there_is(world: int, per_node: int, count: int) -> None:
    assert len(link_work(world, per_node)) == count


@given(st.integers(1, 4), st.integers(1, 8))
def test_groups_are_disjoint_and_alike(nodes: int, per_node: int) -> None:
    world = nodes * per_node
    for kind in (*group_kinds(world, per_node), *pair_kinds(world, per_node)):
        ranks = [rank for group in kind.groups for rank in group]
        assert len(ranks) == len(set(ranks))
        assert {len(group) for group in kind.groups} == {kind.size}
        for group in kind.groups:
            assert len({rank // per_node for rank in group}) == kind.num_nodes


def fit(**changes: int) -> CollectiveFit:
    shape = {"num_ranks": 2, "num_nodes": 1, "per_node": 2, "groups_per_node": 4} | changes
    return CollectiveFit(
        collective="all_reduce", backend="nccl", relative_error=0.0, points=(),
        pieces=(Piece(from_bytes=0.0, latency_s=1e-3, bytes_per_s=1e9),), **shape,
    )


def test_a_group_of_the_measured_shape_takes_the_measured_time() -> None:
    cluster = parse_cluster("2x8xA100-80GB")
    node = cluster.nodes[0]
    link, network = replace(node.link, fits=(fit(),)), replace(node.network, fits=(
        fit(num_nodes=2, per_node=1, groups_per_node=8),))
    inside = GroupShape(size=2, num_nodes=1, per_node=2, link=link, network=network)
    assert collective_time_s(Collective.ALL_REDUCE, 1e6, inside) == pytest.approx(2e-3)
    assert collective_time_s(Collective.ALL_GATHER, 1e6, inside) < 1e-3, "not measured: the model's"
    across = GroupShape(size=2, num_nodes=2, per_node=1, link=link, network=network)
    assert collective_time_s(Collective.ALL_REDUCE, 1e6, across, groups_per_node=8) == pytest.approx(2e-3)
    assert collective_time_s(Collective.ALL_REDUCE, 1e6, across) < 1e-3, "alone on the network: not measured"


def test_a_process_alone_measures_no_link_and_needs_no_group() -> None:
    assert list(measure_links((), torch.device("cpu"), budget_s=0.0)) == []


def collectives_that_warn() -> list[str]:
    """What torch says against the collectives that are measured, on this rank of two."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for item in link_work(2, 2):
            links._operation(item, dist.group.WORLD, 64, torch.device("cpu"))()
    return [str(warning.message) for warning in caught]


@pytest.mark.processes
def test_collectives_are_called_by_names_that_torch_keeps() -> None:
    with LocalPool(2) as pool:
        assert pool.run(collectives_that_warn, num_ranks=2) == [[], []]
