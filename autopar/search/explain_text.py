"""An explanation for reading, and as the JSON object `explain`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from autopar.plan.text import certificate_line, seconds
from autopar.search.explain import Alternative, Explanation, block_s

LEGEND = (
    "R: whole on every rank; S(d): dim d split over the ranks; P: every rank has a part of a sum; RP: whole, with a "
    "gradient that is still to be summed"
)
MAX_ALTERNATIVES = 16  # printed; --json has all


def explain_table(found: Explanation) -> Group:
    """The printed explanation, as a rich renderable."""
    axes = " x ".join(f"{name} {size}" for name, size in found.axes)
    parts: list[Any] = [Text(_headline(found, axes), style="bold"), Text(_cost_line(found))]
    if found.axes:
        parts += [Text(LEGEND, style="dim"), _params_table(found, axes), _ops_table(found), *_charges(found)]
        parts += _alternatives(found)
    else:
        parts.append(Text("no axis splits its ops: each device runs the whole block on its own rows"))
    parts += _data(found)
    parts += _others(found)
    if found.certificate is not None:
        parts.append(Text(f"the plan: {certificate_line(found.certificate)}"))
    parts += [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(*parts)


def _headline(found: Explanation, axes: str) -> str:
    same = f", one of {found.num_blocks} of class {found.cls}" if found.num_blocks > 1 else f", class {found.cls}"
    return f"why {found.block} is sharded so (stage {found.stage}{same}){f': {axes}' if axes else ''}"


def _cost_line(found: Explanation) -> str:
    cost = found.cost
    return (
        f"a micro-batch of {found.rows:g} rows takes {seconds(found.block_s)} in it: compute forward "
        f"{seconds(cost.forward_compute_s)}, backward {seconds(cost.backward_compute_s)}; communication inside the "
        f"block forward {seconds(cost.forward_tp_comm_s)}, backward {seconds(cost.backward_tp_comm_s)}"
    )


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("bytes", "time", "block then", "worse by", "forward", "backward", "step", "times a step")
        table.add_column(column, justify="right" if right else "left")
    return table


def _params_table(found: Explanation, axes: str) -> Table:
    table = _table("parameter", "shape", f"at rest on {axes}")
    for param in found.params:
        table.add_row(param.name, " x ".join(map(str, param.shape)), param.placement)
    return table


def _ops_table(found: Explanation) -> Table:
    table = _table("op", "axis", "what the axis does", "states", "forward", "backward")
    for op in found.ops:
        states = f"{', '.join(op.inputs)} -> {', '.join(op.outputs)}"
        table.add_row(_op_name(op.module, op.target), op.axis, op.split, states, seconds(op.forward_s),
                      seconds(op.backward_s))
    return table


def _op_name(module: str, target: str) -> str:
    return f"{module} ({target.split('.')[1]})" if module else target.split(".")[1]


def _charges(found: Explanation) -> list[Any]:
    if not found.charges:
        return [Text("no collective runs inside the block")]
    table = _table("collective", "when", "axis", "of", "why", "bytes", "time")
    for item in found.charges:
        why = f"{item.src} -> {item.dst}" if item.src else item.lowering.replace("_", " ")
        table.add_row(str(item.collective), "backward" if item.is_backward else "forward", found.axes[item.axis][0],
                      item.subject, why, f"{item.size_bytes:,.0f}", seconds(item.time_s))
    return [table]


def _alternatives(found: Explanation) -> list[Any]:
    if not found.alternatives:
        return [Text("no op of weight has another split")]
    table = _table("instead", "axis", "split so", "block then", "worse by")
    for item in found.alternatives[:MAX_ALTERNATIVES]:
        table.add_row(_alternative_name(item), item.axis, item.split, seconds(item.block_s), _harm(item, found))
    least = next((item for item in found.alternatives if item.harm_s > 0), None)
    more = len(found.alternatives) - MAX_ALTERNATIVES
    parts: list[Any] = [Text(
        "what the block would cost at best with one op split otherwise and all else chosen anew"
        + (f"; the next best is {_harm(least, found)} worse" if least is not None else ""), style="bold",
    ), table]
    return [*parts, Text(f"and {more} that cost more; --json lists them", style="dim")] if more > 0 else parts


def _alternative_name(item: Alternative) -> str:
    return f"{item.module} ({item.op})" if item.module else item.op


def _harm(item: Alternative, found: Explanation) -> str:
    if abs(item.harm_s) < 1e-12:
        return "0"
    sign = "-" if item.harm_s < 0 else ""
    return f"{sign}{seconds(abs(item.harm_s))} ({item.harm_s / found.block_s:+.1%})"


def _data(found: Explanation) -> list[Any]:
    if not found.data:
        return [Text("no data axis: nothing of it is gathered or reduced over data ranks")]
    table = _table("data axes", "collective", "ranks", "times a step", "bytes", "time")
    for item in found.data:
        table.add_row(item.what, str(item.collective), str(item.num_ranks), str(item.times_a_step),
                      f"{item.size_bytes:,.0f}", seconds(item.time_s))
    return [table, Text("mostly behind the compute of other blocks; the step counts what is not", style="dim")]


def _others(found: Explanation) -> list[Any]:
    if not found.others:
        return []
    own = found.certificate.upper_bound_s if found.certificate is not None else None
    table = _table("the whole plan with", "step", "against this plan")
    for other in found.others:
        time_s = other.step_time_s
        ratio = f"{time_s / own:.3f}x" if time_s is not None and own else "-"
        table.add_row(other.name, seconds(time_s) if time_s is not None else "-",
                      ratio if time_s is not None else other.why_not)
    return [table, Text("cuts, schedule, recomputation and rows of a micro-batch as they are", style="dim")]


def explain_json(found: Explanation) -> dict[str, Any]:
    """The explanation as the JSON object `explain`."""
    cost = found.cost
    certificate = found.certificate
    return {
        "block": found.block, "class": found.cls, "num_blocks": found.num_blocks, "stage": found.stage,
        "axes": dict(found.axes), "rows": found.rows,
        "cost_s": {
            "block": block_s(cost), "forward_compute": cost.forward_compute_s,
            "backward_compute": cost.backward_compute_s, "forward_comm": cost.forward_tp_comm_s,
            "backward_comm": cost.backward_tp_comm_s,
        },
        "params": [asdict(param) for param in found.params],
        "ops": [asdict(op) for op in found.ops],
        "collectives": [
            {**asdict(item), "collective": str(item.collective), "axis": found.axes[item.axis][0]}
            for item in found.charges
        ],
        "alternatives": [asdict(item) for item in found.alternatives],
        "data": [{**asdict(item), "collective": str(item.collective)} for item in found.data],
        "other_plans": [asdict(item) for item in found.others],
        "certificate": None if certificate is None else {
            "upper_bound_s": certificate.upper_bound_s, "lower_bound_s": certificate.lower_bound_s,
            "gap": certificate.gap if certificate.lower_bound_s > 0 else None,
        },
        "notes": list(found.notes),
    }
