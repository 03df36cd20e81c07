"""What the page shows of a plan, as plain JSON values: cluster, stages, timeline, memory, blocks, bounds.

Everything that repeats is folded: nodes alike and with the same stages, devices of one pipeline rank, layers of one
class in one stage. So the picture of 16,384 devices is as small as that of 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Any

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.cluster.part import ranges
from autopar.graph.model_graph import Block, BlockClass, ModelGraph, Op
from autopar.plan.plan import Plan, is_layer
from autopar.plan.text import mesh_text, recompute_text, schedule_text
from autopar.search.explain import split_text
from autopar.sharding.joint import factor_text, placement_text
from autopar.sharding.reshard import Collective
from autopar.sharding.rewrites import rewritten
from autopar.sharding.state import R
from autopar.simulate.block_cost import Charge, block_charges
from autopar.simulate.class_costs import ClassCosts
from autopar.simulate.stage_cost import class_costs_of, slowest_device
from autopar.simulate.timeline import MAX_DRAWN, ActionEvent, GroupTimeline, Timeline, drawn

VERSION = 1
GIB = 2**30
FULL_MEMORY = 0.9  # of what is usable: from here memory is named as what limits a plan
_DIGITS = 7


def picture(graph: ModelGraph, cluster: Cluster, plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """The page's data. Times in seconds, sizes in GiB, rates in GB/s; `timeline` is the plan's on the cluster."""
    graph = rewritten(graph, plan.rewrites)
    report = timeline.report()
    classes, shown = _pictured(graph, cluster, plan)
    step = _timeline(cluster, plan, timeline)
    notes = [*plan.notes, *(note for note in timeline.notes if note not in plan.notes)]
    if (number := sum(row["drawn"] for row in step["rows"])) < len(step["rows"]):
        notes.append(f"the step is drawn for {number} of {len(step['rows'])} pipeline ranks: all have too many actions")
    return {
        "version": VERSION,
        "model": plan.model_name,
        "settings": {
            "cluster": plan.cluster_name, "devices": plan.num_devices, "global_batch": plan.global_batch,
            "sequence": plan.seq_len, "micro_batch": plan.micro_batch, "num_micro_batches": plan.num_micro_batches,
            "schedule": schedule_text(plan), "dtype": plan.dtype, "param_dtype": plan.param_dtype,
            "optimizer": plan.optimizer, "sequence_parallel": plan.sequence_parallel, "compile": plan.compile,
        },
        "numbers": {
            key: report[key] for key in (
                "step_time_s", "tokens_per_s_per_device", "mfu", "bubble_fraction", "feasible", "infeasible_reason",
            )
        },
        "breakdown_s": report["breakdown_s"],
        "limits": limits(cluster, plan, timeline),
        "certificate": _certificate(plan),
        "baselines": [
            {"name": b.name, "step_time_s": b.step_time_s, "feasible": b.feasible, "summary": b.summary}
            for b in plan.baselines
        ],
        "cluster": {"name": plan.cluster_name, "types": _types(cluster), "nodes": _nodes(cluster, plan)},
        "stages": [_stage(cluster, plan, i, graph, shown) for i in range(plan.num_stages)],
        "timeline": step,
        "classes": classes,
        "notes": notes,
    }


def limits(cluster: Cluster, plan: Plan, timeline: Timeline) -> list[str]:
    """What keeps the step from being shorter, the largest share first, in words."""
    parts, step = timeline.breakdown, timeline.step_time_s
    words = {
        "compute": "compute on the busiest device",
        "tp_comm": "collectives inside the layers",
        "dp_comm": "gathering parameters and summing gradients",
        "pp_comm": "sending activations from stage to stage",
        "bubble": "waiting for other stages (the pipeline's bubble)",
        "optimizer": "the optimizer's step",
    }
    for key, link in _links_of_busiest(cluster, plan, timeline).items():
        words[key] += f", over {link}"
    shares = sorted(((getattr(parts, key) / step, text) for key, text in words.items()), reverse=True)
    found = [f"{share:.0%} of the step: {text}" for share, text in shares if share >= 0.05]
    full: list[tuple[float, int]] = []
    for group in timeline.groups:
        usable = min(cluster.device(rank).usable_memory_bytes for rank in group.ranks)
        if group.memory.total >= FULL_MEMORY * usable:
            full.append((group.memory.total / usable, group.stage))
    if full:
        share, stage = max(full)
        others = f" and those of {len(full) - 1} more nearly so" if len(full) > 1 else ""
        found.append(
            f"memory: the devices of stage {stage} are {share:.0%} full{others}; what needs more of it (less "
            f"recomputation, larger micro-batches) does not fit there"
        )
    return found


def _links_of_busiest(cluster: Cluster, plan: Plan, timeline: Timeline) -> dict[str, str]:
    """By part of the step, the slowest link that the busiest devices' traffic takes."""
    ranks = timeline.groups[timeline.critical].ranks
    own = [at for at, stage in enumerate(plan.stages) if stage.devices[0] in ranks]
    found: dict[str, list[tuple[int, ...]]] = {"tp_comm": [], "dp_comm": [], "pp_comm": []}
    for at in own:
        stage = plan.stages[at]
        inner = prod(size for _, size in stage.mesh.inner)
        found["tp_comm"].append(stage.devices[:inner])
        found["dp_comm"].append(stage.devices[::inner])
        found["pp_comm"] += [
            (plan.stages[other].devices[0], stage.devices[0])
            for other in (at - 1, at + 1) if 0 <= other < plan.num_stages
        ]
    return {
        key: _slowest_link(cluster, [group for group in groups if len(set(group)) > 1])
        for key, groups in found.items() if any(len(set(group)) > 1 for group in groups)
    }


def _slowest_link(cluster: Cluster, groups: Sequence[tuple[int, ...]]) -> str:
    shapes = [cluster.group(group) for group in groups]
    link, between = min(
        ((shape.network, True) if shape.num_nodes > 1 else (shape.link, False) for shape in shapes),
        key=lambda found: found[0].bandwidth_bytes_per_s,
    )
    rate = f"{link.name}, {link.bandwidth_bytes_per_s / 1e9:.3g} GB/s"
    return f"the network between nodes ({rate} a node)" if between else f"the links inside a node ({rate} a device)"


def _certificate(plan: Plan) -> dict[str, Any] | None:
    found = plan.certificate
    if found is None:
        return None
    return {
        "upper_bound_s": found.upper_bound_s, "lower_bound_s": found.lower_bound_s,
        "gap": found.gap if found.lower_bound_s > 0 else None, "searched": found.searched,
        "not_searched": list(found.not_searched), "stopped_early": found.stopped_early,
        "order_bound_s": found.order_bound_s,
    }


def _types(cluster: Cluster) -> dict[str, Any]:
    return {
        node.device.name: {
            "memory_gib": node.device.memory_bytes / GIB, "usable_gib": node.device.usable_memory_bytes / GIB,
            "memory_gb_per_s": node.device.memory_bandwidth_bytes_per_s / 1e9,
            "peak_tflops": {name: rate / 1e12 for name, rate in node.device.peak_flops},
        }
        for node in cluster.nodes
    }


def _nodes(cluster: Cluster, plan: Plan) -> list[dict[str, Any]]:
    """Runs of nodes that are alike and whose devices run the same stages: [stages of device] and how many there are."""
    stages_of: dict[int, list[int]] = {}
    for i, stage in enumerate(plan.stages):
        for rank in stage.devices:
            stages_of.setdefault(rank, []).append(i)
    rows: list[tuple[Node, tuple[tuple[int, ...], ...], int]] = []
    first = 0
    for node in cluster.nodes:
        own = tuple(tuple(stages_of.get(rank, ())) for rank in range(first, first + node.num_devices))
        rows.append((node, own, first))
        first += node.num_devices
    found = []
    for (node, own), run in groupby(rows, key=lambda row: row[:2]):
        same = list(run)
        found.append({
            "count": len(same), "first_rank": same[0][2], "device": node.device.name,
            "stages": [list(stages) for stages in own], "link": _link(node.link), "network": _link(node.network),
        })
    return found


def _link(link: Link) -> dict[str, Any]:
    return {"name": link.name, "gb_per_s": link.bandwidth_bytes_per_s / 1e9, "latency_us": link.latency_s * 1e6}


def _stage(
    cluster: Cluster, plan: Plan, index: int, graph: ModelGraph, shown: Mapping[tuple[int, str], int]
) -> dict[str, Any]:
    stage = plan.stages[index]
    blocks = graph.blocks[stage.first : stage.last]
    types: dict[str, int] = {}
    for rank in stage.devices:
        types[cluster.device(rank).name] = types.get(cluster.device(rank).name, 0) + 1
    return {
        "index": index, "chunk": stage.virtual, "ranks": ranges(stage.devices), "num_devices": len(stage.devices),
        "types": types, "mesh": mesh_text(stage.mesh), "zero": stage.zero, "recompute": recompute_text(stage),
        "layers": list(plan.layers(stage)) if plan.blocks else [stage.first, stage.last],
        "blocks": [
            {"cls": cls, "entry": shown[index, cls], "first": names[0], "last": names[-1], "count": len(names)}
            for cls, names in _runs(blocks)
        ],
    }


def _runs(blocks: Iterable[Block]) -> list[tuple[str, list[str]]]:
    """Neighbouring blocks of one class that are layers, or not, together."""
    return [
        (cls, [block.name for block in run])
        for (cls, _), run in groupby(blocks, key=lambda block: (block.cls, is_layer(block.name)))
    ]


def _timeline(cluster: Cluster, plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """Devices of one pipeline rank as one row; events as [kind, stage, micro-batch, start, end] of their row.

    Of many rows with more events than can be seen some are `drawn`; the others have no events and no curve.
    """
    kinds = list(dict.fromkeys(event.kind for event in timeline.events))
    number = {kind: i for i, kind in enumerate(kinds)}
    own: list[list[ActionEvent]] = [[] for _ in timeline.groups]
    for event in timeline.events:
        own[event.group].append(event)
    shown = drawn(len(own), timeline.critical, 2 * plan.num_stages * plan.num_micro_batches, MAX_DRAWN)
    rows = []
    for at, (group, events) in enumerate(zip(timeline.groups, own, strict=True)):
        is_drawn = at in shown and bool(events or not timeline.events)
        rows.append({
            **_row(cluster, group, is_drawn=is_drawn),
            "events": [
                [number[e.kind], e.stage, e.micro_batch, _rounded(e.start_s), _rounded(e.end_s)]
                for e in sorted(events if is_drawn else (), key=lambda event: event.start_s)
            ],
        })
    return {"step_time_s": timeline.step_time_s, "kinds": kinds, "rows": rows}


def _row(cluster: Cluster, group: GroupTimeline, *, is_drawn: bool) -> dict[str, Any]:
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    return {
        "stage": group.stage, "ranks": ranges(group.ranks), "num_devices": len(group.ranks),
        "types": list(dict.fromkeys(group.types)), "busy_s": group.busy_s,
        "memory_gib": {name: getattr(group.memory, name) / GIB for name in parts},
        "usable_gib": min(cluster.device(rank).usable_memory_bytes for rank in group.ranks) / GIB,
        "drawn": is_drawn,
        "memory_curve": [
            [_rounded(at), _rounded(size / GIB)] for at, size in (group.memory_steps if is_drawn else ())
        ],
    }


def _rounded(value: float) -> float:
    """The value with as many digits as a drawing can show."""
    return float(f"{value:.{_DIGITS}g}")


def _pictured(
    graph: ModelGraph, cluster: Cluster, plan: Plan
) -> tuple[list[dict[str, Any]], dict[tuple[int, str], int]]:
    """Each block class with its ops, once for all stages that run it alike; and its number by (stage, class)."""
    entries: list[dict[str, Any]] = []
    number: dict[tuple[Any, ...], int] = {}
    shown: dict[tuple[int, str], int] = {}
    for index, stage in enumerate(plan.stages):
        device = slowest_device(cluster, stage.devices, plan.dtype)
        for name in dict.fromkeys(block.cls for block in graph.blocks[stage.first : stage.last]):
            group = cluster.group(stage.devices[: stage.mesh.tp])
            alike = (name, stage.mesh, device, group, stage.rows, plan.class_shardings(name, stage))
            if alike not in number:
                number[alike] = len(entries)
                entries.append(_class(graph, cluster, plan, index, device, graph.block_class[name]))
            shown[index, name] = number[alike]
    return entries, shown


def _class(
    graph: ModelGraph, cluster: Cluster, plan: Plan, index: int, device: DeviceType, cls: BlockClass
) -> dict[str, Any]:
    stage, mesh = plan.stages[index], plan.stages[index].mesh
    rows = plan.global_batch / (mesh.dp * plan.num_micro_batches)
    costs = class_costs_of(graph, cls, cluster, plan, stage, device=device, rows=rows)
    shardings = plan.class_shardings(cls.name, stage)
    charges = block_charges(costs, shardings) if shardings else ()
    block = next(block for block in graph.blocks if block.cls == cls.name)
    axes = [name for name, _ in mesh.inner]
    producer = cls.producer
    return {
        "cls": cls.name, "stage": index, "axes": [[name, size] for name, size in mesh.inner],
        "params": [
            {
                "name": full, "local": local, "shape": list(cls.tensor[local].shape),
                "at_rest": placement_text(tuple(own.params[i] for own in shardings)) or str(R),
            }
            for i, (full, local) in enumerate(zip(block.params, cls.params, strict=True))
        ],
        "ops": [
            {
                "name": op.name, "target": op.target.removeprefix("aten.").removesuffix(".default"),
                "module": op.module, "source": op.source, "shape": _shape(graph, cls, op, costs.rows),
                "from": sorted({producer[name].name for name in op.operands if name in producer}),
                "params": [name for name in op.operands if name in cls.params],
                "reads": [name for name in dict.fromkeys(op.operands) if name in cls.inputs],
                "axes": [
                    {
                        "axis": axis, "factor": factor_text(own.strategy[op.name].factor),
                        "words": split_text(
                            cls, op, own.strategy[op.name].inputs, own.strategy[op.name].outputs,
                            own.strategy[op.name].factor,
                        ),
                        "inputs": list(map(str, own.strategy[op.name].inputs)),
                        "outputs": list(map(str, own.strategy[op.name].outputs)),
                        "lowering": own.strategy[op.name].lowering,
                    }
                    for axis, own in zip(axes, shardings, strict=True)
                ],
                **_times(costs, op, tuple(own.strategy[op.name] for own in shardings) or None),
            }
            for op in cls.ops
        ],
        "collectives": [_charge(charge, axes, cls) for charge in charges],
    }


def _times(costs: ClassCosts, op: Op, strategy: Any) -> dict[str, float]:
    time = costs.op_time(op, strategy)
    return {"forward_s": time.forward_s, "backward_s": time.backward_s}


def _shape(graph: ModelGraph, cls: BlockClass, op: Op, rows: float) -> list[int]:
    """The whole first output's shape at this many rows, its dims that hold the rows scaled."""
    if not op.outputs or not op.outputs[0]:
        return []
    return [round(size * graph.scale(size, rows)) for size in cls.tensor[op.outputs[0]].shape]


def _charge(charge: Charge, axes: Sequence[str], cls: BlockClass) -> dict[str, Any]:
    maker = cls.producer.get(charge.subject)
    return {
        "collective": str(Collective(charge.collective)), "axis": axes[charge.axis], "subject": charge.subject,
        "op": maker.name if maker is not None else charge.subject, "size_bytes": charge.size_bytes,
        "time_s": charge.time_s, "backward": charge.is_backward, "src": charge.src, "dst": charge.dst,
        "lowering": charge.lowering,
    }
