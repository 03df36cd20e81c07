"""What passes between two stages for a micro-batch, and how long that takes, be they laid out alike or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from autopar.cluster.cluster import Cluster, GroupShape
from autopar.cost_models.collectives import send_recv_time_s
from autopar.cost_models.op_kinds import element_bytes
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Stage
from autopar.sharding.joint import Placement, held_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor that passes a boundary. The shares are of what one device holds of its rows on either side."""

    row_bytes: float  # of one row, whole
    has_gradient: bool
    share_before: float
    share_behind: float


def crossings(graph: ModelGraph, plan: Plan, index: int) -> tuple[Crossing, ...]:
    """The tensors that pass from stage `index` to the next."""
    stage, following = plan.stages[index], plan.stages[index + 1]
    dtype, found = graph.captured_dtype, []
    for name in graph.boundary(stage.last):
        block = next(block for block in graph.blocks[: stage.last] if name in block.outputs)
        cls, at = graph.block_class[block.cls], block.outputs.index(name)
        info = cls.tensor[cls.outputs[at]]
        before = _share(stage, tuple(own.outputs[at] for own in plan.class_shardings(block.cls, stage)))
        behind = before
        if following.mesh != stage.mesh or following.shardings != stage.shardings:
            user = next((b for b in graph.blocks[following.first : following.last] if name in b.inputs), None)
            behind = 1.0 if user is None else _share(following, tuple(
                own.inputs[user.inputs.index(name)] for own in plan.class_shardings(user.cls, following)
            ))
        size = info.numel * graph.scale(info.numel, 1.0) * element_bytes(cls, dtype, plan.dtype)[cls.outputs[at]]
        found.append(Crossing(
            row_bytes=size, has_gradient=info.requires_grad, share_before=before, share_behind=behind
        ))
    return tuple(found)


def _share(stage: Stage, placement: Placement) -> float:
    return held_share(placement, [size for _, size in stage.mesh.inner])


def boundary_bytes(graph: ModelGraph, plan: Plan, index: int) -> tuple[float, float]:
    """Bytes of a micro-batch that the fullest device of stage `index` holds at its end, and of their gradients."""
    rows = max(plan.rows_of(plan.stages[index]))
    found = crossings(graph, plan, index)
    sizes = [crossing.row_bytes * rows * crossing.share_before for crossing in found]
    return sum(sizes), sum(size for size, crossing in zip(sizes, found, strict=True) if crossing.has_gradient)


def link_times(graph: ModelGraph, cluster: Cluster, plan: Plan, index: int) -> tuple[float, float]:
    """Seconds that a micro-batch's activations take from stage `index` to the next, and its gradients back.

    All devices send at once; those that have several partners send to one after the other.
    """
    here, there = plan.stages[index], plan.stages[index + 1]
    if here.mesh == there.mesh and plan.rows_of(here) == plan.rows_of(there) and here.shardings == there.shardings:
        forward, backward = boundary_bytes(graph, plan, index)
        return _slowest_pair(cluster, here.devices, there.devices, forward), _slowest_pair(
            cluster, there.devices, here.devices, backward
        )
    found = crossings(graph, plan, index)
    activations = [(item.row_bytes, item.share_before, item.share_behind) for item in found]
    gradients = [(item.row_bytes, item.share_behind, item.share_before) for item in found if item.has_gradient]
    return _slowest(cluster, _unlike_flows(plan, here, there, activations)), _slowest(
        cluster, _unlike_flows(plan, there, here, gradients)
    )


Flow = tuple[int, int, float]  # from, to, bytes


def _unlike_flows(plan: Plan, here: Stage, there: Stage, tensors: Sequence[tuple[float, float, float]]) -> list[Flow]:
    """Who sends how much to whom where the stages lay out rows or tensors differently.

    `tensors`: bytes of a row, and what share of its rows' tensor a device of `here` holds and one of `there` wants.
    Each device gets every element that it wants once; devices that hold the same take turns.
    """
    found: dict[tuple[int, int], float] = {}
    inner, wanting = here.mesh.cp * here.mesh.tp, there.mesh.cp * there.mesh.tp
    for d, (low, high) in enumerate(_row_ranges(plan, here)):
        for e, (begin, end) in enumerate(_row_ranges(plan, there)):
            rows = min(high, end) - max(low, begin)
            if rows <= 0:
                continue
            for row_bytes, share_held, share_wanted in tensors:
                parts, wanted = max(1, round(1 / share_held)), max(1, round(1 / share_wanted))
                copies, readers = max(1, inner // parts), max(1, wanting // wanted)
                for j in range(wanting):
                    part, target = j // readers, there.devices[e * wanting + j]
                    for i in range(parts):
                        common = min((i + 1) / parts, (part + 1) / wanted) - max(i / parts, part / wanted)
                        if common > 1e-12:
                            source = here.devices[d * inner + i * copies + (e * wanting + j) % copies]
                            size = found.get((source, target), 0.0)
                            found[source, target] = size + row_bytes * rows * common
    return [(source, target, size) for (source, target), size in found.items()]


def _row_ranges(plan: Plan, stage: Stage) -> list[tuple[int, int]]:
    ends = list(accumulate(plan.rows_of(stage)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _slowest_pair(cluster: Cluster, sources: Sequence[int], targets: Sequence[int], size: float) -> float:
    """Seconds until the last device has its message, each from the device at its own place."""
    kinds = _kept_kinds(cluster, sources, targets)
    return max((send_recv_time_s(size, group, flows_per_node=flows) for group, flows in kinds), default=0.0)


Kinds = tuple[tuple[GroupShape, int], ...]  # of links, with the flows that share a node's
_kinds: dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[Cluster, Kinds]] = {}
_MANY_KINDS = 256


def _kept_kinds(cluster: Cluster, sources: Sequence[int], targets: Sequence[int]) -> Kinds:
    key = id(cluster), tuple(sources), tuple(targets)
    if key not in _kinds:
        if len(_kinds) >= _MANY_KINDS:
            _kinds.clear()
        _kinds[key] = cluster, _pair_kinds(cluster, sources, targets)  # kept, so that its id is not used again
    return _kinds[key][1]


def _pair_kinds(cluster: Cluster, sources: Sequence[int], targets: Sequence[int]) -> Kinds:
    """The distinct links between devices at the same places."""
    node_of, uniform = cluster.node_of, cluster.is_uniform
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    leaving: dict[int, int] = {}
    for pair in zip(sources, targets, strict=True):
        nodes = here, there = node_of[pair[0]], node_of[pair[1]]
        if pair[0] != pair[1]:  # chunks of one group send nothing
            pairs.setdefault(nodes, pair)
        leaving[here] = leaving.get(here, 0) + (here != there)
    kinds: dict[tuple[int, ...], tuple[GroupShape, int]] = {}
    for nodes, pair in pairs.items():
        sharing = leaving[nodes[0]] if nodes[0] != nodes[1] else 1
        kind = (int(nodes[0] == nodes[1]), sharing) if uniform else nodes
        if kind not in kinds:
            kinds[kind] = cluster.group(pair), sharing
    return tuple(kinds.values())


def _slowest(cluster: Cluster, flows: Sequence[Flow]) -> float:
    """Seconds until the last device has sent and received."""
    nodes = [(cluster.node_of[source], cluster.node_of[target]) for source, target, _ in flows]
    leaving: dict[int, set[int]] = {}
    for (source, _, _), (node, other) in zip(flows, nodes, strict=True):
        if node != other:
            leaving.setdefault(node, set()).add(source)
    kept: dict[tuple[int, int, float], float] = {}
    sent: dict[int, float] = {}
    received: dict[int, float] = {}
    for (source, target, size), pair in zip(flows, nodes, strict=True):
        if source == target:
            continue  # chunks of one group
        if (*pair, size) not in kept:
            sharing = len(leaving[pair[0]]) if pair[0] in leaving and pair[0] != pair[1] else 1
            kept[*pair, size] = send_recv_time_s(size, cluster.group((source, target)), flows_per_node=sharing)
        time = kept[*pair, size]
        sent[source] = sent.get(source, 0.0) + time
        received[target] = received.get(target, 0.0) + time
    return max((*sent.values(), *received.values()), default=0.0)
