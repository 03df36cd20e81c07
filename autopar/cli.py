"""The command `autopar`. Each command answers in text or, with --json, in one JSON object; errors are one line.

Rooms are imported inside the commands that need them, so that `autopar --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from autopar.cli_output import (
    Answer,
    Interrupted,
    answer,
    check_writable,
    dry_run_table,
    only_answers,
    print_json,
    progress,
    report_table,
)
from autopar.cli_profile import profile
from autopar.cli_requests import SimulateRequest, Simulations
from autopar.errors import AutoparError, InfeasibleError, InputError
from autopar.files import write_text
from autopar.plan.dtypes import SHORT_NAMES, param_dtype, torch_dtype
from autopar.plan.plan import Recompute, Schedule

INTERRUPTED = 130

app = typer.Typer(add_completion=False, help="Plans, checks and runs the parallel training of PyTorch models.",
                  pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(profile)


class Attention(StrEnum):
    SDPA = "sdpa"
    EAGER = "eager"


class Target(StrEnum):
    TORCHTITAN = "torchtitan"
    MEGATRON = "megatron"


Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A Hugging Face config.json or its folder, a preset (llama-3.1-8b), or file.py:factory.")]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="As for `plan`.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that `autopar plan -o` wrote.")]
ClusterText = Annotated[str, typer.Option(
    "--cluster", metavar="C", help="A YAML file, or shorthand such as 4x8xH100-80GB@3200Gbps, or `local`.")]
OptionalCluster = Annotated[str | None, typer.Option("--cluster", metavar="C", help="As for `plan`.")]
GlobalBatch = Annotated[int, typer.Option("--global-batch", metavar="N", min=1, help="Rows of one training step.")]
OptionalGlobalBatch = Annotated[int | None, typer.Option("--global-batch", metavar="N", min=1)]
SeqLen = Annotated[int | None, typer.Option(
    "--seq-len", metavar="S", min=1, help="Tokens a row; the model's own if left out.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"Compute dtype: {', '.join(SHORT_NAMES)}.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, adam or sgd.")]
AttentionKind = Annotated[Attention, typer.Option("--attention", help="Fused (sdpa) or plain (eager) attention.")]
SearchedMicroBatch = Annotated[int | None, typer.Option(
    "--micro-batch", metavar="M", min=1, help="Rows of a micro-batch; searched if left out.")]
SearchSeconds = Annotated[float | None, typer.Option(
    "--max-search-seconds", metavar="T", min=0, help="Stop the search then, with the best plan so far.")]
MeshOption = Annotated[str | None, typer.Option(
    "--mesh", metavar="AXIS=N,...", help="Fix axes (pp, dp, dp_replicate, dp_shard, cp, tp); the rest is searched.")]
Compile = Annotated[bool, typer.Option("--compile", help="The model runs under torch.compile.")]
OffloadOption = Annotated[bool, typer.Option(
    "--offload/--no-offload", help="Let activations and optimizer state rest in host memory where that pays.")]
UnlikeStages = Annotated[bool, typer.Option(
    "--unlike-stages/--no-unlike-stages",
    help="On a cluster of unlike nodes, let stages have meshes and ZeRO levels of their own.")]
OffloadActivations = Annotated[bool, typer.Option(
    "--offload-activations", help="Keep what every layer saves for its backward in host memory.")]
OffloadOptimizer = Annotated[bool, typer.Option(
    "--offload-optimizer", help="Keep the optimizer's state in host memory.")]
PlanOption = Annotated[Path | None, typer.Option("--plan", metavar="PLAN", help="Simulate this plan file.")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree.")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="Pipeline-parallel degree.")]
VirtualStages = Annotated[int, typer.Option(
    "--virtual-stages", metavar="V", min=1, help="Chunks of each pipeline rank.")]
Cp = Annotated[int, typer.Option("--cp", min=1, help="Context-parallel degree.")]
Ep = Annotated[int, typer.Option("--ep", min=1, help="Expert-parallel degree.")]
DpReplicate = Annotated[int | None, typer.Option("--dp-replicate", metavar="R", min=1, help="Replicas of the model.")]
DpShard = Annotated[int | None, typer.Option(
    "--dp-shard", metavar="D", min=1, help="Devices that share the states of a replica.")]
Zero = Annotated[int | None, typer.Option("--zero", min=0, max=3, help="ZeRO level: what --dp-shard splits.")]
MicroBatch = Annotated[int, typer.Option("--micro-batch", metavar="M", min=1, help="Rows of a micro-batch.")]
RecomputeOption = Annotated[Recompute, typer.Option("--recompute", help="Activations to compute again.")]
ScheduleOption = Annotated[Schedule | None, typer.Option("--schedule", help="The pipeline's schedule.")]
SequenceParallel = Annotated[bool, typer.Option("--sequence-parallel", help="Split the sequence between blocks.")]
Trace = Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Write the step as a Chrome trace.")]
DryRunOption = Annotated[bool, typer.Option(
    "--dry-run", help="Run each distinct rank's program on fake tensors: communication, shapes, memory.")]
Requests = Annotated[Path | None, typer.Option(
    "--requests", metavar="FILE", help="Many at once: one JSON object a line, with these options as keys.")]
To = Annotated[Target, typer.Option("--to", help="The system to write settings for.")]
ExplainOption = Annotated[str | None, typer.Option(
    "--explain", metavar="[LAYER]", help="Say why a layer is sharded so and what the next best would cost: a block's "
    "name or class; the first layer if left out.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it to this file.")]
DemoFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder for plan.json and trace.json.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help="The plan's model, as for `plan`.")]
PictureModel = Annotated[str | None, typer.Option(
    "--model", metavar="MODEL", help="The plan's model, for a plan that was saved without its picture.")]
CheckedDtype = Annotated[str | None, typer.Option(
    "--dtype", help="Compare in this dtype; the plan's own if left out, fp32 for a plan in two bytes.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps to compare.")]
ProfileOption = Annotated[Path | None, typer.Option(
    "--profile", metavar="FILE", help="Use the rates that `autopar profile -o` measured.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def demo(output: DemoFolder = Path("autopar-demo"), json_: Json = False) -> None:
    """Plan a small Llama for this machine, train it on 4 processes, and compare with one process."""
    from autopar.demo import run_demo

    with answer(as_json=json_) as reply:
        reply.value = run_demo(output, show=reply.show)
    _require_equal(reply.value["parity"])


@app.command()
def plan(
    model: Model, cluster: ClusterText, global_batch: GlobalBatch, seq_len: SeqLen = None, dtype: Dtype = "bf16",
    optimizer: Optimizer = "adamw", micro_batch: SearchedMicroBatch = None, max_search_seconds: SearchSeconds = None,
    compile_: Compile = False, attention: AttentionKind = Attention.SDPA, profile: ProfileOption = None,
    offload: OffloadOption = True, unlike_stages: UnlikeStages = True, mesh: MeshOption = None,
    explain: ExplainOption = None, output: Output = None, json_: Json = False,
) -> None:
    """Find the fastest plan for a model on a cluster, with no device needed."""
    from autopar.plan.file import save_plan
    from autopar.plan.text import plan_json, plan_table
    from autopar.search.candidates import parse_mesh
    from autopar.search.explain import explain as explain_block
    from autopar.search.explain import find_block
    from autopar.search.explain_text import explain_json, explain_table
    from autopar.search.planner import PlanRequest, find_plan
    from autopar.simulate.simulator import simulate as simulate_plan
    from autopar.viz.picture import picture

    check_writable(output)
    simulations = Simulations()
    name = torch_dtype(dtype)
    with answer(as_json=json_) as reply:
        with progress("planning", as_json=json_) as news:
            machine = simulations.cluster(cluster, profile)
            graph = simulations.graph(model, seq_len, name, attention)
            if explain is not None:
                find_block(graph, explain)  # a name that is none is told before the search
            request = PlanRequest(
                global_batch=global_batch, seq_len=graph.sequence_length, dtype=name,
                param_dtype=param_dtype(name), optimizer=optimizer,
                micro_batch=micro_batch, max_search_seconds=max_search_seconds, compile=compile_,
                offload=offload, unlike_stages=unlike_stages, mesh=parse_mesh(mesh) if mesh is not None else (),
            )
            found = find_plan(graph, machine, request, progress=_settled(news) if news else None)
            timeline = simulate_plan(graph, machine, found)
            report = timeline.report()
            explained = explain_block(graph, machine, found, explain) if explain is not None else None
        if output is not None:
            save_plan(found, output, picture(graph, machine, found, timeline))
        reply.value = plan_json(found, report) | {"costs": report["notes"]}
        reply.show(plan_table(found, report))
        if profile is not None:
            reply.show(*(f"note: {note}" for note in report["notes"]))
        if explained is not None:
            reply.value["explain"] = explain_json(explained)
            reply.show("", explain_table(explained))
        if output is not None:
            reply.show(f"written to {output}")


def _settled(news: Callable[[str], None]) -> Callable[[int, int, float | None], None]:
    """Tells how far a search is, in words."""
    def tell(settled: int, total: int, best_s: float | None) -> None:
        news(f"{settled} of {total} settings settled" + (f", best step {best_s:.4g} s" if best_s else ""))

    return tell


@app.command()
def simulate(
    model: OptionalModel = None, cluster: OptionalCluster = None, global_batch: OptionalGlobalBatch = None,
    seq_len: SeqLen = None, dtype: Dtype = "bf16", optimizer: Optimizer = "adamw",
    attention: AttentionKind = Attention.SDPA, plan_: PlanOption = None, tp: Tp = 1, pp: Pp = 1,
    virtual_stages: VirtualStages = 1, cp: Cp = 1, ep: Ep = 1, dp_replicate: DpReplicate = None,
    dp_shard: DpShard = None, zero: Zero = None, micro_batch: MicroBatch = 1,
    recompute: RecomputeOption = Recompute.NONE, schedule: ScheduleOption = None,
    sequence_parallel: SequenceParallel = False, offload_activations: OffloadActivations = False,
    offload_optimizer: OffloadOptimizer = False, compile_: Compile = False, profile: ProfileOption = None,
    trace: Trace = None, dry_run: DryRunOption = False, requests: Requests = None, json_: Json = False,
) -> None:
    """Predict time and memory of one training step, of a plan file or of degrees that you choose."""
    if requests is not None:
        _simulate_requests(requests, as_json=json_)
        return
    for name, value in (("MODEL", model), ("--cluster", cluster), ("--global-batch", global_batch)):
        if value is None:
            raise InputError(f"simulate needs {name} (or --requests FILE); see `autopar simulate --help`")
    check_writable(trace)
    request = SimulateRequest.parse(dict(
        model=model, cluster=cluster, global_batch=global_batch, seq_len=seq_len, dtype=dtype, optimizer=optimizer,
        attention=str(attention), plan=str(plan_) if plan_ else None, tp=tp, pp=pp, virtual_stages=virtual_stages,
        cp=cp, ep=ep, dp_replicate=dp_replicate, dp_shard=dp_shard, zero=zero, micro_batch=micro_batch,
        recompute=recompute, schedule=schedule, sequence_parallel=sequence_parallel,
        offload_activations=offload_activations, offload_optimizer=offload_optimizer,
        compile=compile_, profile=str(profile) if profile else None,
    ))
    with answer(as_json=json_) as reply:
        simulated, timeline = Simulations().simulate(request, as_run=dry_run)
        reply.value = timeline.report()
        reply.show(report_table(reply.value))
        for note in (*simulated.notes, *reply.value["notes"]):
            reply.show(f"note: {note}")
        if trace is not None:
            from autopar.viz.trace import chrome_trace

            write_text(trace, json.dumps(chrome_trace(timeline)))
            reply.show(f"trace written to {trace}: open it in ui.perfetto.dev or chrome://tracing")
        if dry_run:
            from autopar.runtime.dry_run import dry_run_of

            with progress("dry run", as_json=json_) as news:
                ran = dry_run_of(request.model, simulated, timeline, seq_len=seq_len, dtype=torch_dtype(dtype),
                                 attention=str(attention), progress=news)
            reply.value["dry_run"] = ran.report()
            reply.show(dry_run_table(reply.value["dry_run"]), *(f"note: {note}" for note in ran.notes))
    if dry_run and (problems := reply.value["dry_run"]["problems"]):
        typer.echo(f"autopar: the dry run fails: {problems[0]}", err=True)
        raise typer.Exit(1)


def _simulate_requests(path: Path, *, as_json: bool) -> None:
    answers = Simulations().answers(path)
    if as_json:
        with only_answers() as stream:
            for result in answers:
                print_json(result, stream)
        return
    reply = Answer(as_json=False)
    for number, result in enumerate(answers, start=1):
        if "error" in result:
            reply.show(f"{number}: {result['error']}")
        else:
            fits = "fits" if result["feasible"] else f"does not fit: {result['infeasible_reason']}"
            reply.show(f"{number}: {result['step_time_s']:.4g} s a step, {fits}")


@app.command()
def show(path: PlanFile, json_: Json = False) -> None:
    """Print a plan file as a table."""
    from autopar.plan.file import load_plan, plan_to_json
    from autopar.plan.text import plan_table
    from autopar.plan.verify import verify_plan

    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        verify_plan(loaded, None)
        reply.value = json.loads(plan_to_json(loaded))
        reply.show(plan_table(loaded))


@app.command()
def viz(
    path: PlanFile, output: Output = None, model: PictureModel = None, cluster: OptionalCluster = None,
    seq_len: SeqLen = None, attention: AttentionKind = Attention.SDPA, profile: ProfileOption = None,
    json_: Json = False,
) -> None:
    """Draw a plan as one HTML page that opens from disk: cluster, timeline, memory, layers, bounds."""
    from autopar.plan.file import load_picture, load_plan
    from autopar.plan.verify import verify_plan
    from autopar.simulate.simulator import simulate as simulate_plan
    from autopar.viz.page import page_html
    from autopar.viz.picture import picture

    target = output if output is not None else path.with_suffix(".html")
    check_writable(target)
    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        drawn = load_picture(path) if model is None else None
        if model is not None:
            simulations = Simulations()
            with progress("simulating", as_json=json_):
                machine = simulations.cluster(cluster or loaded.cluster_name, profile)
                graph = simulations.graph(model, seq_len or loaded.seq_len, loaded.dtype, attention)
                verify_plan(loaded, graph, machine)
                drawn = picture(graph, machine, loaded, simulate_plan(graph, machine, loaded))
        if drawn is None:
            raise InputError(f"{path}: the plan was saved without its picture; give its model with --model MODEL")
        page = page_html(drawn)
        write_text(target, page)
        reply.value = {"page": str(target), "size_bytes": len(page.encode())}
        reply.show(f"written to {target}: open it in a browser")


@app.command()
def export(path: PlanFile, to: To, output: Output = None, json_: Json = False) -> None:
    """Print a plan as another training system's settings, and what those cannot say."""
    from autopar.export.megatron import to_megatron
    from autopar.export.torchtitan import to_torchtitan
    from autopar.plan.file import load_plan
    from autopar.plan.verify import verify_plan

    check_writable(output)
    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        verify_plan(loaded, None)
        settings = {Target.TORCHTITAN: to_torchtitan, Target.MEGATRON: to_megatron}[to](loaded)
        reply.value = {"target": settings.target, "settings": settings.text, "not_expressed": settings.not_expressed}
        if output is not None:
            write_text(output, settings.text)
        else:
            reply.show(settings.text.rstrip("\n"))
        if not json_:
            for gap in settings.not_expressed:
                typer.echo(f"not expressed: {gap}", err=True)


@app.command()
def verify(
    path: PlanFile, model: ModelOption, dtype: CheckedDtype = None, seq_len: SeqLen = None, steps: Steps = 1,
    json_: Json = False,
) -> None:
    """Run a plan on local processes, and compare loss and every gradient with one process."""
    from autopar.local_check import check_locally
    from autopar.plan.file import load_plan

    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        with progress("running", as_json=json_):
            report = check_locally(loaded, model, dtype=torch_dtype(dtype) if dtype else None, steps=steps,
                                   seq_len=seq_len)
        reply.value = report.to_dict()
        name, error = report.worst
        reply.show(
            f"plan: {report.plan_summary}",
            f"{loaded.num_devices} processes against one, in {report.dtype}, steps: {steps}",
            f"loss: largest relative error {report.loss_error:.1e}",
            f"{len(report.gradient_errors)} gradients: largest relative error {error:.1e}, of {name}",
            f"allowed: {report.tolerance:.0e}", *(f"note: {note}" for note in report.notes),
        )
    _require_equal(reply.value)


def _require_equal(parity: dict[str, Any]) -> None:
    """Ends the command with exit code 1 where a plan's numbers were not one process's."""
    if not parity["passed"]:
        typer.echo(f"autopar: the plan's numbers differ from one process's by {parity['worst_gradient_error']:.1e} in "
                   f"the gradient of {parity['worst_gradient']}, {parity['tolerance']:.0e} is allowed", err=True)
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 no feasible plan, 2 bad input, 130 interrupted."""
    words = _with_explain(list(sys.argv[1:] if arguments is None else arguments))
    _quiet_libraries()
    try:
        code = app(words or ["--help"], standalone_mode=False, prog_name="autopar")
    except AutoparError as error:
        return _fail(str(error), error.exit_code, words, infeasible=isinstance(error, InfeasibleError))
    except Interrupted:
        typer.echo("autopar: interrupted", err=True)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, words)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of the command line: a bug of ours
            raise
        return _fail(f"{error.format_message()} (see `autopar --help`)", 2, words)
    if code == INTERRUPTED:  # some versions of typer turn the interrupt into this code
        return _fail("interrupted", INTERRUPTED, words)
    return code if isinstance(code, int) else 0


def _with_explain(words: list[str]) -> list[str]:
    """The words, with the empty name after an `--explain` that has none."""
    given: list[str] = []
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        given += [word, ""] if word == "--explain" and following.startswith("-") else [word]
    return given


def _fail(message: str, code: int, words: Sequence[str], *, infeasible: bool = False) -> int:
    line = " ".join(message.split())
    if "--json" in words:
        value: dict[str, Any] = {"error": line, "exit_code": code}
        if infeasible:
            value |= {"feasible": False, "infeasible_reason": line}
        print_json(value, sys.stdout)
    typer.echo(f"autopar: {line}", err=True)
    return code


def _quiet_libraries() -> None:
    """A user's mistake is one line: what libraries have to say about themselves is no part of it."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
