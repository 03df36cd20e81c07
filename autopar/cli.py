"""The command `autopar`. Each command answers in text or, with --json, in one JSON object; errors are one line.

Rooms are imported inside the commands that need them, so that `autopar --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from autopar.cli_cluster import cluster_app
from autopar.cli_doctor import doctor
from autopar.cli_help import examples
from autopar.cli_options import (
    Attention,
    AttentionKind,
    CheckedDtype,
    ClusterText,
    Compile,
    Cp,
    DeadlineHours,
    DemoFolder,
    DpReplicate,
    DpShard,
    DryRunOption,
    Dtype,
    Ep,
    ExplainOption,
    GlobalBatch,
    IdleDevices,
    Json,
    MaxStepSeconds,
    MeshOption,
    MicroBatch,
    Model,
    ModelOption,
    ObjectiveOption,
    OffloadActivations,
    OffloadOptimizer,
    OffloadOption,
    Optimizer,
    OptionalCluster,
    OptionalGlobalBatch,
    OptionalModel,
    Output,
    PlanFile,
    PlanOption,
    Pp,
    ProfileOption,
    RecomputeOption,
    Requests,
    RunTrace,
    ScheduleOption,
    SearchedMicroBatch,
    SearchSeconds,
    SeqLen,
    SequenceParallel,
    Steps,
    Tokens,
    Tp,
    Trace,
    UnlikeStages,
    VirtualStages,
    Zero,
)
from autopar.cli_output import (
    Answer,
    Interrupted,
    answer,
    check_writable,
    dry_run_table,
    only_answers,
    parts_table,
    print_json,
    progress,
    report_table,
)
from autopar.cli_process import Ending, collect_seldom, import_quickly, keep_memory, replace_unprintable
from autopar.cli_profile import profile
from autopar.cli_requests import SimulateRequest, Simulations
from autopar.cli_sweep import sweep
from autopar.cli_viewing import export, show, viz
from autopar.errors import AutoparError, InfeasibleError, InputError
from autopar.files import write_text
from autopar.graph.lean_torch import lean_torch
from autopar.plan.dtypes import param_dtype, torch_dtype
from autopar.plan.goal import Goal
from autopar.plan.plan import Recompute

INTERRUPTED = 130

app = typer.Typer(help="Plans, checks and runs the parallel training of PyTorch models.",
                  pretty_exceptions_enable=False, rich_markup_mode=None)


def demo(output: DemoFolder = Path("autopar-demo"), json_: Json = False) -> None:
    """Plan a small Llama for this machine, train it on 4 processes, and compare with one process."""
    from autopar.demo import run_demo

    with answer(as_json=json_) as reply:
        reply.value = run_demo(output, show=reply.show)
    _require_equal(reply.value["parity"])


def plan(
    model: Model, cluster: ClusterText, global_batch: GlobalBatch, seq_len: SeqLen = None, dtype: Dtype = "bf16",
    optimizer: Optimizer = "adamw", micro_batch: SearchedMicroBatch = None, max_search_seconds: SearchSeconds = None,
    compile_: Compile = False, attention: AttentionKind = Attention.SDPA, profile: ProfileOption = None,
    offload: OffloadOption = True, unlike_stages: UnlikeStages = True, mesh: MeshOption = None,
    objective: ObjectiveOption = Goal.TIME, max_step_seconds: MaxStepSeconds = None,
    deadline_hours: DeadlineHours = None, tokens: Tokens = None, idle_devices: IdleDevices = False,
    explain: ExplainOption = None, output: Output = None, json_: Json = False,
) -> None:
    """Find the best plan for a model on a cluster, with no device needed."""
    from autopar.plan.file import save_plan
    from autopar.plan.text import plan_json, plan_table
    from autopar.search.candidates import parse_mesh
    from autopar.search.explain import explain as explain_block
    from autopar.search.explain import find_block
    from autopar.search.explain_text import explain_json, explain_table
    from autopar.search.fleet import choose_devices
    from autopar.search.objective import Objective, longest_step_s
    from autopar.search.planner import PlanRequest
    from autopar.simulate.simulator import simulate as simulate_plan
    from autopar.simulate.timeline import MAX_DRAWN
    from autopar.viz.picture import picture

    check_writable(output)
    simulations = Simulations()
    name = torch_dtype(dtype)
    with answer(as_json=json_) as reply:
        with progress("planning", as_json=json_) as news:
            machine = simulations.cluster(cluster, profile)
            if news:
                news("capturing the model")
            graph = simulations.graph(model, seq_len, name, attention)
            if news:
                news("searching")
            if explain is not None:
                find_block(graph, explain)  # a name that is none is told before the search
            request = PlanRequest(
                global_batch=global_batch, seq_len=graph.sequence_length, dtype=name,
                param_dtype=param_dtype(name), optimizer=optimizer,
                micro_batch=micro_batch, max_search_seconds=max_search_seconds, compile=compile_,
                offload=offload, unlike_stages=unlike_stages, mesh=parse_mesh(mesh) if mesh is not None else (),
            )
            aim = Objective(goal=objective, max_step_time_s=longest_step_s(
                max_step_seconds, deadline_hours, tokens, global_batch * (graph.sequence_length or 1)))
            choice = choose_devices(graph, machine, request, aim, idle=idle_devices,
                                    progress=_settled(news) if news else None)
            found, machine = choice.plan, choice.best.cluster
            timeline = simulate_plan(graph, machine, found, max_events=MAX_DRAWN)
            report = timeline.report()
            explained = explain_block(graph, machine, found, explain) if explain is not None else None
        if output is not None:
            save_plan(found, output, picture(graph, machine, found, timeline))
        reply.value = plan_json(found, report) | {"costs": report["notes"]}
        reply.show(plan_table(found, report))
        reply.value["objective"] = choice.report()
        if len(choice.planned) > 1 or objective is not Goal.TIME:
            reply.show("", *parts_table(reply.value["objective"]))
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
        simulations = Simulations()
        simulated, timeline = simulations.simulate(request, as_run=dry_run)
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

            as_dry_run = simulations.simulate(request, as_run=True, uncompiled=True) if simulated.compile else None
            _, held_against = as_dry_run or (simulated, timeline)
            with progress("dry run", as_json=json_) as news:
                ran = dry_run_of(request.model, simulated, held_against, seq_len=seq_len, dtype=torch_dtype(dtype),
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


def verify(
    path: PlanFile, model: ModelOption, dtype: CheckedDtype = None, seq_len: SeqLen = None, steps: Steps = 1,
    trace: RunTrace = None, json_: Json = False,
) -> None:
    """Run a plan on local processes, and compare loss and every gradient with one process."""
    from autopar.local_check import check_locally
    from autopar.plan.file import load_plan

    check_writable(trace)
    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        with progress("running", as_json=json_):
            report = check_locally(loaded, model, dtype=torch_dtype(dtype) if dtype else None, steps=steps,
                                   seq_len=seq_len, trace=trace)
        reply.value = report.to_dict() | ({"trace": str(trace)} if trace is not None else {})
        name, error = report.worst
        reply.show(
            f"plan: {report.plan_summary}",
            f"{loaded.num_devices} processes against one, in {report.dtype}, steps: {steps}",
            f"loss: largest relative error {report.loss_error:.1e}",
            f"{len(report.gradient_errors)} gradients: largest relative error {error:.1e}, of {name}",
            f"allowed: {report.tolerance:.0e}", *(f"note: {note}" for note in report.notes),
        )
        if trace is not None:
            reply.show(f"trace written to {trace}: autopar viz {path} --live {trace}")
    _require_equal(reply.value)


def _require_equal(parity: dict[str, Any]) -> None:
    """Ends the command with exit code 1 where a plan's numbers were not one process's."""
    if not parity["passed"]:
        typer.echo(f"autopar: the plan's numbers differ from one process's by {parity['worst_gradient_error']:.1e} in "
                   f"the gradient of {parity['worst_gradient']}, {parity['tolerance']:.0e} is allowed", err=True)
        raise typer.Exit(1)


for command in (demo, plan, simulate, sweep, show, viz, verify, export, profile, doctor):  # in the order of --help
    app.command(epilog=examples(command.__name__))(command)
app.add_typer(cluster_app, name="cluster")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 no feasible plan, 2 bad input, 130 interrupted."""
    words = _with_explain(list(sys.argv[1:] if arguments is None else arguments))
    _quiet_libraries()
    if arguments is not None:
        return _run(words)
    # The process is ours.
    ending = Ending()
    collect_seldom()
    import_quickly()
    replace_unprintable()
    alone = words[:1] in (["plan"], ["simulate"])  # they have no other processes
    if alone:
        keep_memory()
        lean_torch()
    code = _run(words)
    ending.begins()
    if alone:
        ending.code = code
    return code


def _run(words: list[str]) -> int:
    try:
        code = app(words or ["--help"], standalone_mode=False, prog_name="autopar")
        sys.stdout.flush()
    except AutoparError as error:
        return _fail(str(error), error.exit_code, words, infeasible=isinstance(error, InfeasibleError))
    except Interrupted:
        typer.echo("autopar: interrupted", err=True)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, words)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        return _fail(f"the output cannot be written ({error.strerror}); make room, or send it elsewhere", 2, words)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of the command line: a bug of ours
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "autopar")
        return _fail(f"{error.format_message()} (see `{where} --help`)", 2, words)
    if code == INTERRUPTED:  # some versions of typer turn the interrupt into this code
        return _fail("interrupted", INTERRUPTED, words)
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """What is still to come on standard output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _with_explain(words: list[str]) -> list[str]:
    """The words, with the empty name after an `--explain` that has none."""
    given: list[str] = []
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        given += [word, ""] if word == "--explain" and following.startswith("-") else [word]
    return given


def _fail(message: str, code: int, words: Sequence[str], *, infeasible: bool = False) -> int:
    line = " ".join(message.split())
    if "--json" in words:
        value: dict[str, Any] = {"error": line, "exit_code": code}
        if infeasible:
            value |= {"feasible": False, "infeasible_reason": line}
        try:
            print_json(value, sys.stdout)
        except OSError:  # nobody reads it, or it has no room: the line below says what there is to say
            _drop_output()
    typer.echo(f"autopar: {line}", err=True)
    return code


def _quiet_libraries() -> None:
    """A user's mistake is one line: what libraries have to say about themselves is no part of it."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
