"""How commands answer: text for people or one JSON object for programs, progress on a terminal, files written whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from autopar.errors import InputError

PIPED_WIDTH = 120  # columns of a table where no terminal says its own


class Interrupted(Exception):  # noqa: N818 - it is no error: the command has said what it kept
    """The user stopped the command, which has answered with what it had."""


class Answer:
    """What a command found out: `value` is printed under --json, what was given to `show` otherwise."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.value: dict[str, Any] = {}
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)

    def show(self, *parts: Any) -> None:
        """Prints text or a table at once, unless the answer is JSON."""
        if not self.as_json:
            for part in parts:
                self._console.print(part, markup=False) if isinstance(part, str) else self._console.print(part)


@contextmanager
def answer(*, as_json: bool) -> Iterator[Answer]:
    """The answer to fill in; under --json, nothing but it reaches standard output.

    Whatever else writes there meanwhile (a model's own prints, a library in C, a child process) goes to standard error.
    """
    reply = Answer(as_json=as_json)
    if not as_json:
        yield reply
        return
    with only_answers() as stream:
        yield reply
        print_json(reply.value, stream)


@contextmanager
def only_answers() -> Iterator[IO[str]]:
    """A stream to the real standard output, which everybody else loses to standard error meanwhile."""
    sys.stdout.flush()
    saved = os.dup(1)
    python_stdout = sys.stdout
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout = python_stdout
        os.dup2(saved, 1)
        os.close(saved)


def print_json(value: dict[str, Any], stream: IO[str]) -> None:
    """One object on one line; numbers that JSON cannot say (infinity) become null."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value))
    print(text, file=stream, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_writable(path: Path | None) -> None:
    """InputError where a file could not be written later: said before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"{path}: cannot be written there; name a file in a folder that exists")


def whole_numbers(option: str, text: str, most: int | None = None) -> tuple[int, ...]:
    """The positive whole numbers, up to `most`, of a list with commas; InputError that names the option."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(f"{option} {text!r}: give whole numbers from 1 on, with commas between them, such as 1,2,4")
    if most is not None and max(found) > most:
        raise InputError(f"{option} {text!r}: give at most {most}")
    return tuple(dict.fromkeys(found))


@contextmanager
def progress(label: str, *, as_json: bool) -> Iterator[Callable[[str], None] | None]:
    """A spinner on standard error, and what tells it news; None where nobody watches."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield None
        return
    with console.status(label) as status:
        yield lambda news: status.update(f"{label}: {news}")


def report_table(report: dict[str, Any]) -> Table:
    """The simulated step of `simulate`'s JSON as a table: the times, then the fullest device of each stage."""
    table = Table(title="Simulated step", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("step time", f"{report['step_time_s']:.4g} s")
    table.add_row("tokens/s on each device", f"{report['tokens_per_s_per_device']:,.0f}")
    if report.get("mfu") is not None:
        table.add_row("model FLOPs used", f"{report['mfu']:.1%}")
    table.add_row("bubble", f"{report['bubble_fraction']:.1%}")
    for part, time_s in report["breakdown_s"].items():
        table.add_row(f"  {part.replace('_', ' ')}", f"{time_s:.4g} s")
    fullest: dict[int, dict[str, Any]] = {}
    for device in report["devices"]:
        held = fullest.setdefault(device["stage"], device)
        if device["peak_memory_gib"] > held["peak_memory_gib"]:
            fullest[device["stage"]] = device
    for stage, device in sorted(fullest.items()):
        parts = ", ".join(f"{name} {size:.2f}" for name, size in device["memory_gib"].items())
        table.add_row(f"memory, stage {stage}", f"{device['peak_memory_gib']:.2f} GiB ({parts})")
    table.add_row("fits", "yes" if report["feasible"] else f"no: {report['infeasible_reason']}")
    return table


def parts_table(choice: dict[str, Any]) -> list[Any]:
    """Which devices were chosen, by what, and the parts of the cluster that were planned."""
    goal, value, gap = choice["goal"], choice["value"], choice["gap"]
    words = {
        "time": f"the fastest, {value:.4g} s a step", "cost": f"the cheapest, {value:.4g} a step",
        "devices": f"the fewest, {value:g}",
    }[goal]
    limit = f", with a step of at most {choice['max_step_time_s']:.4g} s" if choice["max_step_time_s"] else ""
    others = "were not planned" if choice["stopped_early"] or goal == "time" else "cannot be better by their bounds"
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("devices")
    for heading in ("number", "step s", "cost of a step"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for part in choice["parts"]:
        step_s, cost = part["step_time_s"], part["cost_per_step"]
        table.add_row(
            part["cluster"], str(part["num_devices"]), f"{step_s:.4g}" if step_s is not None else "",
            f"{cost:.4g}" if cost is not None else "", "chosen" if part["chosen"] else part["why_not"],
            style="bold" if part["chosen"] else None,
        )
    return [
        f"devices: {words}{limit}; {len(choice['parts'])} of {choice['num_parts']} parts of the cluster planned, the "
        f"others {others} (gap {gap:.1%})", table,
    ]


def dry_run_table(report: dict[str, Any]) -> Table:
    """What the programs of a dry run did, and the memory of each beside the prediction, in MiB."""
    passed = "passed" if report["passed"] else f"{len(report['problems'])} checks failed"
    table = Table(
        title=f"Dry run: {report['num_programs']} programs for {report['num_ranks']} ranks, "
        f"{report['num_collectives']} collectives and {report['num_messages']} messages in a step: {passed}",
        title_justify="left",
    )
    kinds = list(dict.fromkeys(row["kind"] for row in report["memory"]))
    for heading in ("rank", "stage", "ranks", *(f"{kind}: program / predicted" for kind in kinds)):
        table.add_column(heading, justify="right")
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in report["memory"]:
        rows.setdefault(row["rank"], []).append(row)
    for rank, found in rows.items():
        sizes = [f"{row['program_bytes'] / 2**20:,.1f} / {row['predicted_bytes'] / 2**20:,.1f}" for row in found]
        table.add_row(str(rank), str(found[0]["stage"]), str(found[0]["num_ranks"]), *sizes)
    return table


def live_table(live: dict[str, Any]) -> Table:
    """What a run took beside what was predicted."""
    from autopar.plan.text import seconds

    table = Table(title=f"{live['name']}: step {live['step'] + 1} of {len(live['step_times_s'])} that ran, on "
                  f"{live['device']}", title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("")
    for heading in ("predicted", "measured", "measured / predicted"):
        table.add_column(heading, justify="right")
    for row in live["table"]:
        both = [row["predicted_s"], row["measured_s"]]
        table.add_row("" if row["stage"] is None else str(row["stage"]), row["what"],
                      *("-" if value is None else seconds(value) for value in both),
                      f"{both[1] / both[0]:.2f}" if all(both) else "-")
    return table
