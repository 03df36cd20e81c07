"""Which groups of ranks to measure: those that a plan would use, each with the others of its shape at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupKind:
    """Disjoint groups of one shape, which work at the same time. Ranks in none of them look on."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    num_nodes: int  # of each group
    per_node: int
    groups_per_node: int

    @property
    def size(self) -> int:
        return len(self.groups[0])


def group_kinds(world: int, per_node: int) -> tuple[GroupKind, ...]:
    """The whole world, the nodes, the ranks of one place on all nodes, and blocks of 2, 4, 8, ... ranks.

    `per_node` ranks on each node; ranks are numbered node by node. Shapes that are the same come once.
    """
    assert world % per_node == 0, "nodes of one size"
    nodes = world // per_node
    kinds = [_kind("world", [range(world)], per_node)]
    if nodes > 1 and per_node > 1:
        kinds.append(_kind("node", [range(i * per_node, (i + 1) * per_node) for i in range(nodes)], per_node))
        kinds.append(_kind("across", [range(i, world, per_node) for i in range(per_node)], per_node))
    size = 2
    while size < world:
        if size % per_node == 0 or per_node % size == 0:
            blocks = [range(i * size, (i + 1) * size) for i in range(world // size)]
            kinds.append(_kind(f"blocks of {size}", blocks, per_node))
        size *= 2
    found: dict[tuple[int, int, int, int], GroupKind] = {}
    for kind in kinds:
        if kind.size > 1:
            found.setdefault((kind.size, kind.num_nodes, kind.per_node, kind.groups_per_node), kind)
    return tuple(found.values())


def pair_kinds(world: int, per_node: int) -> tuple[GroupKind, ...]:
    """Pairs of ranks for messages: neighbours on a node, and ranks of one place on neighbouring nodes."""
    kinds = []
    if per_node > 1:
        pairs = [(i, i + 1) for node in range(0, world, per_node) for i in range(node, node + per_node - 1, 2)]
        kinds.append(_kind("pairs on a node", pairs, per_node))
    if world > per_node:
        kinds.append(_kind("one pair across nodes", [(0, per_node)], per_node))
        if per_node > 1:
            kinds.append(_kind("pairs across nodes", [(i, i + per_node) for i in range(per_node)], per_node))
    return tuple(kinds)


def _kind(name: str, groups: Sequence[Sequence[int]], per_node: int) -> GroupKind:
    members = tuple(tuple(group) for group in groups)
    nodes = {rank // per_node for rank in members[0]}
    on_first = sum(1 for rank in members[0] if rank // per_node == members[0][0] // per_node)
    sharing = sum(1 for group in members if any(rank // per_node == members[0][0] // per_node for rank in group))
    return GroupKind(name=name, groups=members, num_nodes=len(nodes), per_node=on_first, groups_per_node=sharing)
