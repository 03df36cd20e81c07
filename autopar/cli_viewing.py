"""The commands that look at plan files: show, viz and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from autopar.cli_compare import compared, comparison_table
from autopar.cli_options import (
    Attention,
    AttentionKind,
    Compare,
    Json,
    Live,
    OptionalCluster,
    OptionalPlanFile,
    Output,
    PictureModel,
    PlanFile,
    ProfileOption,
    ScriptModel,
    SeqLen,
    Target,
    To,
)
from autopar.cli_output import answer, check_writable, live_table, progress
from autopar.cli_requests import Simulations
from autopar.errors import InputError
from autopar.files import write_text


def show(path: OptionalPlanFile = None, compare: Compare = None, json_: Json = False) -> None:
    """Print a plan file as a table, or two of one model side by side."""
    from autopar.plan.file import load_picture, load_plan, plan_to_json
    from autopar.plan.text import plan_table
    from autopar.plan.verify import verify_plan

    _one_or_two("show", path, compare)
    with answer(as_json=json_) as reply:
        if compare is not None:
            reply.value = compared(compare)
            reply.show(comparison_table(reply.value))
            return
        assert path is not None
        loaded = load_plan(path)
        verify_plan(loaded, None)
        reply.value = json.loads(plan_to_json(loaded))
        drawn = load_picture(path)
        reply.show(plan_table(loaded, {**drawn["numbers"], "breakdown_s": drawn["breakdown_s"]} if drawn else None))


def viz(
    path: OptionalPlanFile = None, compare: Compare = None, output: Output = None, model: PictureModel = None,
    cluster: OptionalCluster = None, seq_len: SeqLen = None, attention: AttentionKind = Attention.SDPA,
    profile: ProfileOption = None, live: Live = None, json_: Json = False,
) -> None:
    """Draw a plan as one HTML page that opens from disk: cluster, timeline, memory, layers, bounds; or compare two."""
    from autopar.viz.live import live as live_beside
    from autopar.viz.live import load_trace
    from autopar.viz.page import page_html

    _one_or_two("viz", path, compare)
    if live is not None and compare is not None:
        raise InputError("--live lays a run beside one plan: leave --compare out")
    target = output if output is not None else path.with_suffix(".html") if path is not None else Path("compare.html")
    check_writable(target)
    with answer(as_json=json_) as reply:
        with progress("drawing", as_json=json_):
            draw = _drawer(model, cluster, seq_len, attention, profile)
            if compare is not None:
                data = compared(compare, draw)
            else:
                assert path is not None
                data = draw(path)
                if live is not None:
                    data = {**data, "live": live_beside(data, load_trace(live), name=live.name)}
        page = page_html(data)
        write_text(target, page)
        reply.value = {"page": str(target), "size_bytes": len(page.encode())}
        if "live" in data:
            beside = data["live"]
            reply.value["live"] = {key: value for key, value in beside.items() if key != "timeline"}
            reply.show(live_table(beside), *(f"note: {note}" for note in beside["notes"]))
        reply.show(f"written to {target}: open it in a browser")


def export(path: PlanFile, to: To, model: ScriptModel = None, output: Output = None, json_: Json = False) -> None:
    """Print a plan as a script of plain PyTorch or another system's settings, and what those cannot say."""
    from autopar.export.megatron import to_megatron
    from autopar.export.torchtitan import to_torchtitan
    from autopar.plan.file import load_plan
    from autopar.plan.verify import verify_plan

    check_writable(output)
    with answer(as_json=json_) as reply:
        loaded = load_plan(path)
        verify_plan(loaded, None)
        if to is Target.SCRIPT:
            from autopar.export.script import script_model, to_script

            if model is None:
                raise InputError("a script builds the model: give --model MODEL, as for `autopar plan`")
            settings = to_script(loaded, script_model(model, loaded))
        else:
            settings = {Target.TORCHTITAN: to_torchtitan, Target.MEGATRON: to_megatron}[to](loaded)
        reply.value = {"target": settings.target, "settings": settings.text, "not_expressed": settings.not_expressed}
        if output is not None:
            write_text(output, settings.text)
        else:
            reply.show(settings.text.rstrip("\n"))
        if not json_:
            for gap in settings.not_expressed:
                typer.echo(f"not expressed: {gap}", err=True)


def _one_or_two(command: str, path: Path | None, compare: tuple[Path, Path] | None) -> None:
    if (path is None) == (compare is None):
        raise InputError(f"{command} needs one plan file, or --compare and two: see `autopar {command} --help`")


def _drawer(
    model: str | None, cluster: str | None, seq_len: int | None, attention: Attention, profile: Path | None
) -> Callable[[Path], dict[str, Any]]:
    """Gives the picture of a plan file: the one that it holds, or of its model where one is named."""
    simulations = Simulations()

    def draw(path: Path) -> dict[str, Any]:
        from autopar.plan.file import load_picture, load_plan
        from autopar.plan.verify import machine_of, verify_plan
        from autopar.simulate.simulator import simulate as simulate_plan
        from autopar.viz.picture import picture

        loaded = load_plan(path)
        if model is None:
            verify_plan(loaded, None)
            found = load_picture(path)
            if found is None:
                raise InputError(f"{path}: the plan was saved without its picture; give its model with --model MODEL")
            return found
        machine = machine_of(loaded, simulations.cluster(cluster or loaded.cluster_name, profile))
        graph = simulations.graph(model, seq_len or loaded.seq_len, loaded.dtype, attention)
        verify_plan(loaded, graph, machine)
        return picture(graph, machine, loaded, simulate_plan(graph, machine, loaded))

    return draw
