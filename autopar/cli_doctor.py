"""The command `autopar doctor`: what on this machine is missing or slow, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from autopar.cli_options import Json
from autopar.cli_output import answer, progress

STYLES = {"ok": "green", "slow": "yellow", "stops": "bold red"}

NumProcesses = Annotated[int, typer.Option(
    "--num-processes", metavar="N", min=1, help="How many local processes to judge the machine for; the demo has 4.")]
Measure = Annotated[bool, typer.Option(
    "--measure", help="Also time matrix products and memory for some seconds, against the tables.")]


def doctor(num_processes: NumProcesses = 4, measure: Measure = False, json_: Json = False) -> None:
    """Say what on this machine is missing or slow, each with its remedy; exit code 1 if something stops autopar."""
    from autopar.doctor import Verdict, examine

    with answer(as_json=json_) as reply:
        with progress("looking", as_json=json_):
            found = list(examine(processes=num_processes, measure=measure))
        stops = [finding for finding in found if finding.verdict is Verdict.STOPS]
        slow = [finding for finding in found if finding.verdict is Verdict.SLOW]
        reply.value = {"works": not stops, "checks": [asdict(finding) for finding in found]}
        table = Table(show_edge=False, pad_edge=False, show_header=False, box=None)
        for finding in found:
            words = finding.found + (f"\n-> {finding.remedy}" if finding.remedy else "")
            table.add_row(Text(str(finding.verdict), style=STYLES[str(finding.verdict)]), finding.check, Text(words))
        reply.show(table, "")
        if stops:
            reply.show(f"autopar does not work here: {', '.join(finding.check for finding in stops)}")
        elif slow:
            reply.show(f"autopar works here; less well than it could: {', '.join(finding.check for finding in slow)}")
        else:
            reply.show("autopar works here")
    if stops:
        raise typer.Exit(1)
