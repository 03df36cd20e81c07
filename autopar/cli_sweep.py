"""The command `autopar sweep`: the best plan at each batch, sequence and cluster size, as CSV and as a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from autopar.cli_options import (
    Attention,
    AttentionKind,
    Compile,
    Dtype,
    Json,
    Model,
    OffloadOption,
    Optimizer,
    ProfileOption,
    SearchedMicroBatch,
)
from autopar.cli_output import Interrupted, answer, check_writable, whole_numbers
from autopar.cli_requests import Simulations
from autopar.errors import AutoparError, InputError
from autopar.files import write_text
from autopar.plan.dtypes import param_dtype, torch_dtype
from autopar.plan.plan import MOST_ROWS

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster
    from autopar.graph.model_graph import ModelGraph
    from autopar.plan.plan import Plan
    from autopar.simulate.timeline import Timeline

MOST_POINTS = 10_000
# The columns of the CSV, and the keys of a row under --json.
COLUMNS = (
    "cluster", "nodes", "devices", "scaling", "first_batch", "global_batch", "seq_len", "feasible", "reason",
    "step_time_s", "tokens_per_s", "tokens_per_s_per_device", "mfu", "bubble_fraction", "memory_share", "gap", "stages",
    "mesh", "zero", "micro_batch", "num_micro_batches", "recompute", "price_per_million_tokens", "search_seconds",
    "stopped_early",
)

Clusters = Annotated[list[str], typer.Option("--cluster", metavar="C", help="As for `plan`; may be repeated.")]
Nodes = Annotated[str | None, typer.Option(
    "--nodes", metavar="N,...", help="Numbers of nodes to try of a cluster of like nodes; if left out with one "
    "cluster, its own number and twice that.")]
Batches = Annotated[str, typer.Option("--global-batch", metavar="N,...", help="Rows of one training step.")]
SeqLens = Annotated[str | None, typer.Option(
    "--seq-len", metavar="S,...", help="Tokens a row; the model's own if left out.")]
PointSeconds = Annotated[float | None, typer.Option(
    "--max-search-seconds", metavar="T", min=0, help="Stop the search of each point then, with its best plan so far.")]
Table_ = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write the CSV to this file.")]
Plot = Annotated[Path | None, typer.Option(
    "--plot", metavar="FILE", help="Write the page with the plot to this file; beside the CSV if left out.")]



class Scaling(StrEnum):
    STRONG = "strong"  # each batch at each size
    WEAK = "weak"  # as many rows for each device at every size


ScalingOption = Annotated[Scaling, typer.Option(
    help="strong: each batch on each size of cluster. weak: the batch is that of the smallest cluster and grows with "
    "the devices.")]

Row = dict[str, Any]


def sweep(
    model: Model, cluster: Clusters, global_batch: Batches, seq_len: SeqLens = None, nodes: Nodes = None,
    scaling: ScalingOption = Scaling.STRONG, dtype: Dtype = "bf16", optimizer: Optimizer = "adamw",
    micro_batch: SearchedMicroBatch = None, max_search_seconds: PointSeconds = None, compile_: Compile = False,
    attention: AttentionKind = Attention.SDPA, profile: ProfileOption = None, offload: OffloadOption = True,
    output: Table_ = Path("sweep.csv"), plot: Plot = None, json_: Json = False,
) -> None:
    """Plan at each batch, sequence and cluster size: a CSV, a plot, and what twice the nodes would buy, in words."""
    from autopar.search.planner import PlanRequest, find_plan
    from autopar.simulate.simulator import simulate
    from autopar.viz.page import page_html

    page = plot if plot is not None else output.with_suffix(".html")
    if page == output:
        raise InputError(f"{output}: the CSV and the plot need names of their own")
    check_writable(output)
    check_writable(page)
    batches = whole_numbers("--global-batch", global_batch, MOST_ROWS)
    lengths = whole_numbers("--seq-len", seq_len) if seq_len is not None else (None,)
    name = torch_dtype(dtype)
    simulations = Simulations()
    rows: list[Row] = []
    stopped = False
    failure: AutoparError | None = None
    with answer(as_json=json_) as reply:
        machines = _clusters(simulations, cluster, nodes, profile)
        points = list(product(machines, lengths, batches))
        smallest = min(machine.num_devices for machine in machines)
        if scaling is Scaling.WEAK:
            _check_weak(machines, batches, smallest)
        if len(points) > MOST_POINTS:
            raise InputError(f"{len(points)} points are more than {MOST_POINTS}: give fewer batches, lengths or sizes")
        with _bar(len(points), as_json=json_) as news:
            try:
                for machine, length, first in points:
                    batch = first * machine.num_devices // smallest if scaling is Scaling.WEAK else first
                    news(f"{machine.name}, batch {batch}" + (f", sequence {length}" if length else ""))
                    graph = simulations.graph(model, length, name, attention)
                    request = PlanRequest(
                        global_batch=batch, seq_len=graph.sequence_length, dtype=name, param_dtype=param_dtype(name),
                        optimizer=optimizer, micro_batch=micro_batch, max_search_seconds=max_search_seconds,
                        compile=compile_, offload=offload,
                    )
                    try:
                        found = find_plan(graph, machine, request)
                        row = point_row(machine, found, simulate(graph, machine, found))
                    except AutoparError as error:
                        failure = failure or error
                        row = failed_row(graph, machine, batch, error)
                    rows.append(row | {"scaling": str(scaling), "first_batch": first})
                    write_text(output, rows_csv(rows))
            except KeyboardInterrupt:
                stopped = True
        if rows and not any(row["feasible"] for row in rows) and failure is not None and not stopped:
            raise type(failure)(f"no point of the sweep has a plan, the first one: {failure}")
        gains = doublings(rows)
        reply.value = {"model": model, "rows": rows, "doublings": gains, "csv": str(output), "page": str(page),
                       "stopped": stopped, "num_points": len(points)}
        if rows:
            write_text(page, page_html({"sweep": {"model": model, "rows": rows, "doublings": gains}}))
            reply.show(_table(rows), *(f"{gain['words']}." for gain in gains))
            if early := sum(row["stopped_early"] is True for row in rows):
                reply.show(f"note: the search of {early} of {len(rows)} points was stopped early: there may be better "
                           "plans for them")
            reply.show(f"written to {output}, and the plot to {page}: open it in a browser")
        if stopped:
            reply.show(f"interrupted: {len(rows)} of {len(points)} points are kept")
    if stopped:
        raise Interrupted


def _clusters(
    simulations: Simulations, texts: Sequence[str], nodes: str | None, profile: Path | None
) -> list[Cluster]:
    """The clusters to sweep, each once."""
    from autopar.cluster.resize import with_nodes

    machines = [simulations.cluster(text, profile) for text in texts]
    if nodes is not None:
        sizes = whole_numbers("--nodes", nodes)
        machines = [with_nodes(machine, size) for machine in machines for size in sizes]
    elif len(machines) == 1 and machines[0].is_uniform and not machines[0].name.startswith("local"):
        machines.append(with_nodes(machines[0], 2 * len(machines[0].nodes)))
    return list({machine.name: machine for machine in machines}.values())


def _check_weak(machines: Sequence[Cluster], batches: Sequence[int], smallest: int) -> None:
    """InputError where a batch that grows with the devices would not be whole."""
    for machine, batch in product(machines, batches):
        if batch * machine.num_devices % smallest:
            raise InputError(
                f"--global-batch {batch} on {smallest} devices is no whole number of rows on the "
                f"{machine.num_devices} of {machine.name}: give a multiple of {smallest}"
            )


def point_row(cluster: Cluster, plan: Plan, timeline: Timeline) -> Row:
    """The row of a point that has a plan."""
    from autopar.plan.text import mesh_text, recompute_text

    tokens_per_s = timeline.tokens_per_s_per_device * plan.num_devices
    prices = [node.device.price_per_hour for node in cluster.nodes for _ in range(node.num_devices)]
    known = [price for price in prices if price is not None]
    shares = [
        stage.peak_memory_bytes / stage.memory_limit_bytes for stage in plan.stages
        if stage.peak_memory_bytes is not None and stage.memory_limit_bytes
    ]
    certificate = plan.certificate

    def alike(words: Sequence[Any]) -> str:
        return " | ".join(dict.fromkeys(map(str, words)))

    return _row(cluster, plan.global_batch, plan.seq_len) | {
        "feasible": True, "reason": "", "step_time_s": timeline.step_time_s, "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": timeline.tokens_per_s_per_device, "mfu": timeline.mfu,
        "bubble_fraction": timeline.bubble_fraction, "memory_share": max(shares, default=None),
        "gap": certificate.gap if certificate is not None and certificate.lower_bound_s > 0 else None,
        "stages": plan.num_stages, "mesh": alike([mesh_text(stage.mesh) for stage in plan.stages]),
        "zero": alike([stage.zero for stage in plan.stages]), "micro_batch": plan.micro_batch,
        "num_micro_batches": plan.num_micro_batches,
        "recompute": alike([recompute_text(stage) for stage in plan.stages]),
        "price_per_million_tokens": sum(known) / 3600 / tokens_per_s * 1e6 if len(known) == len(prices) else None,
        "search_seconds": certificate.search_seconds if certificate is not None else None,
        "stopped_early": certificate.stopped_early if certificate is not None else None,
    }


def failed_row(graph: ModelGraph, cluster: Cluster, global_batch: int, error: AutoparError) -> Row:
    """The row of a point without a plan: why."""
    return _row(cluster, global_batch, graph.sequence_length) | {"feasible": False, "reason": str(error)}


def _row(cluster: Cluster, global_batch: int, seq_len: int | None) -> Row:
    return dict.fromkeys(COLUMNS) | {
        "cluster": cluster.name, "nodes": len(cluster.nodes), "devices": cluster.num_devices,
        "global_batch": global_batch, "seq_len": seq_len, "device": cluster.nodes[0].device.name,
    }


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a heading; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def doublings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pairs of points that differ in having twice the devices alone, or twice the devices and the batch.

    `speedup`: how many times the tokens/s; `device_time`: how many times the devices' time that each token takes.
    """
    found = []
    for one, other in product(rows, rows):
        alike = all(one[key] == other[key] for key in ("seq_len", "device"))
        growth = other["global_batch"] / one["global_batch"]
        if not alike or other["devices"] != 2 * one["devices"] or other["nodes"] < one["nodes"] or growth not in (1, 2):
            continue
        both = one["feasible"] and other["feasible"]
        speedup = other["tokens_per_s"] / one["tokens_per_s"] if both else None
        found.append({
            "from": one["cluster"], "to": other["cluster"], "global_batch": one["global_batch"],
            "to_global_batch": other["global_batch"], "seq_len": one["seq_len"], "speedup": speedup,
            "device_time": 2 / speedup if speedup else None,
            "step_times_s": [one["step_time_s"], other["step_time_s"]] if both else None,
            "only": None if both else other["cluster"] if other["feasible"] else (
                one["cluster"] if one["feasible"] else "neither"
            ),
        })
    for gain in found:
        gain["words"] = doubling_line(gain)
    return found


def doubling_line(gain: dict[str, Any]) -> str:
    """What twice the devices buy, in words."""
    from autopar.plan.text import seconds

    grown = gain["to_global_batch"] != gain["global_batch"]
    batch = f"and twice the batch ({gain['global_batch']} to {gain['to_global_batch']})" if grown else (
        f"at the same batch of {gain['global_batch']}")
    where = f", sequence {gain['seq_len']}" if gain["seq_len"] else ""
    head = f"Twice the devices ({gain['from']} to {gain['to']}) {batch}{where}: "
    if gain["speedup"] is None:
        return head + ("neither fits" if gain["only"] == "neither" else f"only {gain['only']} has a plan that fits")
    before, after = map(seconds, gain["step_times_s"])
    told = head + f"{gain['speedup']:.2f} times the tokens/s, a step takes {after} instead of {before}"
    waste = gain["device_time"] - 1
    if abs(waste) < 0.005:
        return f"{told}, and each token takes as much of the devices' time"
    return f"{told}, and each token takes {abs(waste):.0%} {'more' if waste > 0 else 'less'} of the devices' time"


def _table(rows: Sequence[Row]) -> Table:
    from autopar.plan.text import seconds

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("cluster", "batch", "sequence", "step", "tokens/s", "a device", "MFU", "memory", "plan"):
        table.add_column(heading, justify="left" if heading in ("cluster", "plan") else "right")
    for row in rows:
        head = (row["cluster"], str(row["global_batch"]), str(row["seq_len"] or "-"))
        if not row["feasible"]:
            table.add_row(*head, "-", "-", "-", "-", "-", Text(row["reason"]))
            continue
        shape = f"{row['stages']} stage{'s' if row['stages'] > 1 else ''}, {row['mesh']}, ZeRO {row['zero']}, " \
                f"{row['num_micro_batches']} x {row['micro_batch']} rows"
        share = row["memory_share"]
        table.add_row(
            *head, seconds(row["step_time_s"]), f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s_per_device']:,.0f}",
            f"{row['mfu']:.1%}", "-" if share is None else f"{share:.0%}", Text(shape),
        )
    return table


@contextmanager
def _bar(total: int, *, as_json: bool) -> Iterator[Callable[[str], None]]:
    """Told the label of each point as it begins; a bar on standard error where somebody watches."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda label: None
        return
    columns = (TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda label: bar.update(task, advance=1, description=label)
