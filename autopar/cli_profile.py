"""The command `autopar profile`: measures ops and links, on local processes or in a job that torchrun started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autopar.cli_output import Answer, Interrupted, answer, check_writable, whole_numbers
from autopar.errors import InputError
from autopar.files import write_text
from autopar.plan.dtypes import SHORT_NAMES, torch_dtype

if TYPE_CHECKING:
    from autopar.profiler import Profile
    from autopar.profiler.op_cases import OpCase

LINK_BUDGET_S = 4.0  # of each collective over each kind of group

News = Callable[[int, int, str], None]


class Measure(StrEnum):
    OPS = "ops"
    LINKS = "links"
    ALL = "all"


What = Annotated[Measure, typer.Argument(metavar="ops|links|all", help="What to measure.")]
Models = Annotated[list[str] | None, typer.Option(
    "--model", metavar="MODEL", help="Measure this model's ops too, as for `plan`; may be repeated.")]
Plans = Annotated[list[Path] | None, typer.Option(
    "--plan", metavar="PLAN", help="Measure the ops of this plan of the (one) --model, at its local shapes.")]
Rows = Annotated[str, typer.Option("--rows", metavar="M,...", help="Micro-batch rows at which to measure a model.")]
TensorAxes = Annotated[str | None, typer.Option(
    "--tp", metavar="T,...", help="Tensor-parallel degrees to measure a model's ops at, besides none.")]
Grid = Annotated[bool, typer.Option("--grid/--no-grid", help="Measure a general grid of ops, for what no model has.")]
Merge = Annotated[list[Path] | None, typer.Option(
    "--merge", metavar="FILE", help="Add what is measured to this profile, and measure no op that it has.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"Compute dtype of ops: {', '.join(SHORT_NAMES)}.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", metavar="S", min=1, help="Tokens a row of the models.")]
LargestMessage = Annotated[int, typer.Option(
    "--largest-message", metavar="MIB", min=1, help="Largest message of `links`, in MiB.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the profile to this file.")]
NumProcesses = Annotated[int | None, typer.Option(
    "--num-processes", min=1, help="Local processes that work at once; not under torchrun.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def profile(
    what: What = Measure.ALL, model: Models = None, plan: Plans = None, rows: Rows = "1,2,4", tp: TensorAxes = None,
    grid: Grid = True, merge: Merge = None, dtype: Dtype = "fp32", seq_len: SeqLen = None,
    largest_message: LargestMessage = 256, output: Output = None, num_processes: NumProcesses = None,
    json_: Json = False,
) -> None:
    """Measure this machine: its ops one by one, and its links, between local processes or under torchrun."""
    from autopar.cluster.local import local_cluster
    from autopar.profiler import load_profile, merge_profiles, profile_local
    from autopar.profiler.job import is_job, profile_job
    from autopar.profiler.local import ProfileInterrupted
    from autopar.profiler.profile import sample_key
    from autopar.profiler.worker import runtime_cases

    check_writable(output)
    name, sizes, axes = torch_dtype(dtype), whole_numbers("--rows", rows), whole_numbers("--tp", tp) if tp else ()
    if plan and (not model or len(model) != 1):
        raise InputError("--plan needs the plan's model: give --model MODEL once")
    if what is Measure.LINKS and (model or plan):
        raise InputError("`profile links` measures no ops, so that --model and --plan say nothing to it; use `all`")
    earlier = [load_profile(path) for path in merge or ()]
    job = is_job()
    if job and num_processes is not None:
        raise InputError("--num-processes is for local processes; under torchrun the job's own are measured")
    count = 1 if job else num_processes or local_cluster().num_devices
    links = what is not Measure.OPS
    if what is Measure.LINKS and not job and count == 1:
        raise InputError("links are measured between processes: run it under torchrun, or give --num-processes 2")
    with answer(as_json=json_) as reply:
        known = {sample_key(sample) for found in earlier for sample in found.ops.samples}
        cases = _cases(model or [], plan or [], name, sizes, axes, seq_len, grid) if what is not Measure.LINKS else []
        grouped = job or count > 1
        runtime = runtime_cases(name, grouped=grouped) if what is not Measure.LINKS and grid else ()
        options: dict[str, Any] = {
            "date": date.today().isoformat(), "cases": tuple(case for case in cases if case.key not in known),
            "runtime": runtime, "link_budget_s": LINK_BUDGET_S if links else 0.0,
            "largest_message_bytes": largest_message * 2**20,
        }
        stopped = False
        with _bar(as_json=json_) as news:
            try:
                if job:
                    measured = profile_job(
                        budget_s=5.0, dtypes=tuple(dict.fromkeys(("float32", name))), progress=news, **options
                    )
                else:
                    measured = profile_local(count, progress=news, **options)
            except ProfileInterrupted as interrupt:
                measured, stopped = interrupt.profile, True
        if measured is not None:  # rank 0 speaks for a job
            _tell(reply, merge_profiles(*earlier, measured), output, stopped)
    if stopped:
        raise Interrupted


def _cases(
    models: Sequence[str], plans: Sequence[Path], dtype: str, rows: tuple[int, ...], axes: tuple[int, ...],
    seq_len: int | None, grid: bool,
) -> list[OpCase]:
    """What to measure of ops, each once."""
    from autopar.cluster.local import local_cluster
    from autopar.graph.source import capture_source, load_source
    from autopar.plan.file import load_plan
    from autopar.plan.verify import verify_plan
    from autopar.profiler.op_cases import grid_cases, model_cases, plan_cases

    here = local_cluster()
    found: list[OpCase] = []
    for model in models:
        graph = capture_source(load_source(model, seq_len=None if ".py:" in model else seq_len, dtype=dtype))
        cluster = local_cluster(max((1, *axes)), device="cpu") if axes else here
        for path in plans:
            loaded = load_plan(path)
            verify_plan(loaded, graph)
            found += plan_cases(graph, loaded, cluster)
        if not plans:
            found += model_cases(graph, cluster, dtype, rows=rows, tensor_axes=[size for size in axes if size > 1])
    if grid:
        kind = "cpu" if here.device(0).name == "CPU" else "cuda"
        found += grid_cases(dtype, device_type=kind)
    return list({case.key: case for case in found}.values())


@contextmanager
def _bar(*, as_json: bool) -> Iterator[News | None]:
    """A progress bar on standard error; None where nobody watches."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def _tell(reply: Answer, measured: Profile, output: Path | None, stopped: bool) -> None:
    """Writes the profile and says what is in it."""
    from autopar.profiler import profile_to_json

    text = profile_to_json(measured)
    if output is not None:
        write_text(output, text)
    reply.value = json.loads(text)
    reply.show(f"{measured.machine}: {measured.num_processes} x {measured.device}, measured at once in "
               f"{measured.measuring_s:.1f} s")
    for dtype, flops in measured.peak_flops().items():
        reply.show(f"  {dtype} matrix products  {flops / 1e9:,.1f} GFLOP/s each")
    reply.show(f"  memory  {measured.memory_bandwidth_bytes_per_s / 1e9:,.1f} GB/s each")
    for name, link in (("send/receive", measured.send_recv), ("all-reduce", measured.all_reduce)):
        if link is not None:
            reply.show(f"  {name}  {link.bytes_per_s / 1e9:,.2f} GB/s, latency {link.latency_s * 1e6:,.0f} us")
    for fit in measured.fits:
        reply.show(
            f"  {fit.collective.replace('_', '-')} among {fit.num_ranks} on {fit.num_nodes} nodes: "
            f"{len(fit.pieces)} pieces, up to {fit.bytes_per_s / 1e9:,.2f} GB/s, fit error "
            f"{fit.relative_error:.0%} over {len(fit.points)} sizes"
        )
    if measured.ops.samples:
        errors = [item.median_error for item in measured.ops.errors]
        near = sum(error <= 0.1 for error in errors)
        reply.show(f"  {len(measured.ops.samples)} ops; left out one at a time, {near} of {len(errors)} families are "
                   "told within 10% from their other sizes")
    for note in measured.notes:
        reply.show(f"note: {note}")
    if stopped:
        reply.show("interrupted: what was measured until then is kept")
    if output is not None:
        reply.show(f"written to {output}; use it with --profile {output}")
