"""A plan for reading: a rich table and plain text for the terminal, and the JSON object of `plan --json`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from autopar.cluster.part import ranges
from autopar.plan.coverage import Coverage, TargetShare, coverage_line
from autopar.plan.plan import Certificate, Mesh, Plan, Stage
from autopar.plan.sketch import MOST_BOXES, bar, box_lines, stage_boxes, time_split

GIB = 2.0**30
Report = Mapping[str, Any]  # what Timeline.report() gives: DESIGN.md's keys


def plan_table(plan: Plan, report: Report | None = None) -> Group:
    """The printed plan: its settings, its stages, its certificate and its baselines, as a rich renderable.

    Several stages are sketched as boxes too; of `report`, the keys of the step's times are enough.
    """
    parts: list[Any] = [Text(headline(plan), style="bold")]
    if 1 < plan.num_stages <= MOST_BOXES:
        boxes = []
        for i, stage in enumerate(plan.stages):
            peak, limit = _memory_gib(plan, i, report)
            boxes.append(box_lines(i, {
                "blocks": _blocks_text(plan, stage, short=True), "ranks": ranges(stage.devices),
                "num_devices": len(stage.devices), "mesh": mesh_text(stage.mesh), "peak_gib": peak, "limit_gib": limit,
            }))
        parts.append(stage_boxes(boxes))
    parts.append(_stages_table(plan, report))
    if report is not None:
        parts += [Text(_performance(report)), time_split(report["breakdown_s"], report["step_time_s"])]
    if plan.certificate is not None:
        parts.append(Text(certificate_line(plan.certificate)))
        if plan.certificate.not_searched:
            parts.append(Text("not searched: " + "; ".join(plan.certificate.not_searched), style="dim"))
    if plan.coverage is not None:
        parts.append(Text(coverage_line(plan.coverage)))
    if plan.baselines:
        parts.append(_baselines_table(plan))
    parts.extend(Text(f"note: {note}", style="dim") for note in plan.notes)
    return Group(*parts)


def plan_text(plan: Plan, report: Report | None = None, *, width: int = 120) -> str:
    """The printed plan as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(plan_table(plan, report))
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def headline(plan: Plan) -> str:
    """Model, cluster and the choices that hold for all stages, in one paragraph."""
    sequence = f", sequence {plan.seq_len}" if plan.seq_len else ""
    parallel = ", sequence parallel" if plan.sequence_parallel else ""
    return (
        f"{plan.model_name} on {plan.cluster_name}: {_count(plan.num_devices, 'device')}, "
        f"{_count(plan.num_stages, 'stage')}, schedule {schedule_text(plan)}, "
        f"{_count(plan.num_micro_batches, 'micro-batch', 'es')} of {_count(plan.micro_batch, 'row')}, "
        f"global batch {plan.global_batch}{sequence}, {plan.dtype} compute, {plan.param_dtype} parameters, "
        f"{plan.optimizer}{parallel}{', compiled' if plan.compile else ''}"
    )


def schedule_text(plan: Plan) -> str:
    """The schedule's name, and whether the plan changes its order."""
    return f"{plan.schedule} in an order of its own" if plan.actions else str(plan.schedule)


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{plural if number != 1 else ''}"


def certificate_line(certificate: Certificate) -> str:
    """Upper bound, lower bound, gap and what was searched, in one line."""
    early = ", stopped early" if certificate.stopped_early else ""
    proved = (
        f"no plan of the searched space is under {seconds(certificate.lower_bound_s)} in this cost model "
        f"(gap {certificate.gap:.1%})" if certificate.lower_bound_s > 0
        else "no time is proved that no plan can beat"
    )
    order = "" if certificate.order_bound_s is None else (
        f"; in no order of micro-batches do its stages take under {seconds(certificate.order_bound_s)}"
    )
    return (
        f"step {seconds(certificate.upper_bound_s)}; {proved}{order}; "
        f"searched {certificate.searched} in {certificate.search_seconds:.1f} s{early}"
    )


def seconds(time_s: float) -> str:
    """A time with four digits and a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if time_s >= scale:
            return f"{time_s / scale:.4g} {unit}"
    return f"{time_s:.3g} s"


def mesh_text(mesh: Mesh) -> str:
    """The axes above 1, outermost first: "dp_replicate 2 x tp 4", or "1 device"."""
    axes = (("dp_replicate", mesh.dp_replicate), ("dp_shard", mesh.dp_shard), ("cp", mesh.cp), ("tp", mesh.tp))
    named = [f"{name} {size}" for name, size in axes if size > 1]
    return (" x ".join(named) or "1 device") + (f", ep {mesh.ep}" if mesh.ep > 1 else "")


def _blocks_text(plan: Plan, stage: Stage, *, short: bool = False) -> str:
    """The stage's blocks as first, last and number; `short`: "h.3" for "transformer.h.3"."""
    names = plan.blocks[stage.first : stage.last]
    if short:
        names = tuple(".".join(name.split(".")[-2:]) for name in names)
    if not names:
        return f"blocks {stage.first}-{stage.last - 1}"
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def recompute_text(stage: Stage) -> str:
    """How many layers take which variant, in their order, or the one that all take; and what else is offloaded."""
    counts = ", ".join(f"{count} {variant}" for variant, count in stage.variants) or str(stage.recompute)
    return counts + ("; optimizer offloaded" if stage.offload_optimizer else "")


def _stages_table(plan: Plan, report: Report | None) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name in ("stage", "blocks", "devices", "mesh", "zero", "recompute"):
        table.add_column(name)
    table.add_column("memory GiB (peak / limit)", justify="right")
    for index, stage in enumerate(plan.stages):
        peak, limit = _memory_gib(plan, index, report)
        drawn = f"{bar(peak / limit, 10)} " if peak is not None and limit else ""
        table.add_row(
            str(index), _blocks_text(plan, stage), ranges(stage.devices), mesh_text(stage.mesh), str(stage.zero),
            recompute_text(stage), f"{drawn}{_gib(peak)} / {_gib(limit)}",
        )
    return table


def _memory_gib(plan: Plan, index: int, report: Report | None) -> tuple[float | None, float | None]:
    """Peak and limit of a stage's fullest device, as the plan or else the report knows them."""
    stage = plan.stages[index]
    peak = stage.peak_memory_bytes / GIB if stage.peak_memory_bytes is not None else _peaks(report).get(index)
    return peak, stage.memory_limit_bytes / GIB if stage.memory_limit_bytes is not None else None


def _peaks(report: Report | None) -> dict[int, float]:
    peaks: dict[int, float] = {}
    for device in (report or {}).get("devices", ()):
        stage = device["stage"]
        peaks[stage] = max(peaks.get(stage, 0.0), device["peak_memory_gib"])
    return peaks


def _gib(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size:.1f}" if size >= 1 else f"{size:.3f}"


def _performance(report: Report) -> str:
    return (
        f"step {seconds(report['step_time_s'])}, {report['tokens_per_s_per_device']:.4g} tokens/s a device, "
        f"MFU {report['mfu']:.1%}, bubble {report['bubble_fraction']:.1%}"
    )


def _baselines_table(plan: Plan) -> Table:
    own = plan.certificate.upper_bound_s if plan.certificate else None
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("baseline")
    table.add_column("step", justify="right")
    table.add_column("against this plan", justify="right")
    table.add_column("settings")
    for baseline in plan.baselines:
        time_s = baseline.step_time_s
        ratio = f"{time_s / own:.2f}x" if time_s is not None and own else "-"
        table.add_row(
            baseline.name, seconds(time_s) if time_s is not None else "-", ratio, baseline.summary,
        )
    return table


def plan_json(plan: Plan, report: Report) -> dict[str, Any]:
    """The object that `plan --json` prints: the simulator's keys, then the plan's own."""
    certificate = plan.certificate
    return {
        **report,
        "model": plan.model_name,
        "cluster": plan.cluster_name,
        "num_devices": plan.num_devices,
        "global_batch": plan.global_batch,
        "seq_len": plan.seq_len,
        "dtype": plan.dtype,
        "optimizer": plan.optimizer,
        "micro_batch": plan.micro_batch,
        "num_micro_batches": plan.num_micro_batches,
        "schedule": str(plan.schedule),
        "sequence_parallel": plan.sequence_parallel,
        "compile": plan.compile,
        "stages": [
            {
                "layers": list(plan.layers(stage)),
                "blocks": list(plan.blocks[stage.first : stage.last]),
                "devices": list(stage.devices),
                "mesh": {
                    "dp_replicate": stage.mesh.dp_replicate, "dp_shard": stage.mesh.dp_shard, "tp": stage.mesh.tp,
                    "cp": stage.mesh.cp, "ep": stage.mesh.ep,
                },
                "zero": stage.zero,
                "recompute": stage.recompute_word,
                "recompute_layers": stage.recompute_layers(plan.num_layers(stage)),
                "offload_layers": stage.num_offloaded,
                "offload_optimizer": stage.offload_optimizer,
            }
            for stage in plan.stages
        ],
        "lower_bound_s": certificate.lower_bound_s if certificate else None,
        "gap": certificate.gap if certificate and certificate.lower_bound_s > 0 else None,
        "order_bound_s": certificate.order_bound_s if certificate else None,
        "search_seconds": certificate.search_seconds if certificate else None,
        "searched": certificate.searched if certificate else "",
        "not_searched": list(certificate.not_searched) if certificate else [],
        "stopped_early": certificate.stopped_early if certificate else False,
        "baselines": [
            {"name": b.name, "step_time_s": b.step_time_s, "feasible": b.feasible, "summary": b.summary}
            for b in plan.baselines
        ],
        "coverage": _coverage_json(plan.coverage) if plan.coverage is not None else None,
        "notes": list(plan.notes),
    }


def _coverage_json(coverage: Coverage) -> dict[str, Any]:
    def shares(found: tuple[TargetShare, ...]) -> list[dict[str, Any]]:
        return [{"target": item.target, "time_share": item.time_share} for item in found]

    return {
        "num_ops": coverage.num_ops, "num_ruled": coverage.num_ruled, "without_rule": shares(coverage.without_rule),
        "tp": coverage.tp, "num_repeated": coverage.num_repeated, "repeated_time_share": coverage.repeated_share,
        "repeated": shares(coverage.repeated),
    }
