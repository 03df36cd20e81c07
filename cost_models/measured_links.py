"""Seconds of collectives from measurements of the links, where a group of the same shape was measured."""

from __future__ import annotations

from autopar.cluster.cluster import GroupShape
from autopar.cluster.measured import CollectiveFit


def fit_of(collective: str, group: GroupShape, *, groups_per_node: int = 1) -> CollectiveFit | None:
    """The fit of a collective among a group of this shape; None where there is none.

    Groups that share a node's network are measured together with the others of their shape, so that a fit across nodes
    holds for as many of them as there are members on a node, and for no other number.
    """
    crosses = group.num_nodes > 1
    for fit in (group.network if crosses else group.link).fits:
        same = (fit.collective, fit.num_ranks, fit.num_nodes) == (collective, group.size, group.num_nodes)
        if same and fit.per_node == group.per_node and (not crosses or fit.groups_per_node == groups_per_node):
            return fit
    return None
