"""A plan as a person would sketch it in a terminal: boxes of stages, bars of memory and of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

# The parts of a step in the words for people, by their keys in `breakdown_s`.
PARTS = {
    "compute": "compute", "tp_comm": "inside layers", "dp_comm": "data parallel", "pp_comm": "between stages",
    "bubble": "bubble", "optimizer": "optimizer",
}
BOXES_A_ROW = 4
MOST_BOXES = 16  # of more stages the table alone is shown
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NEGLIGIBLE_S = 1e-9
_WIDEST = 23  # four boxes and their arrows are 120 columns


def bar(share: float, width: int) -> str:
    """`width` cells of which `share` (0 to 1) is full, in eighths of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    cells = "█" * full + (_EIGHTHS[rest] if rest else "")
    return cells + "░" * (width - len(cells))


def time_split(breakdown_s: Mapping[str, float], step_time_s: float) -> Table:
    """Where the step goes on its busiest device: each part's time, share and bar."""
    from autopar.plan.text import seconds

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for key, name in PARTS.items():
        time_s = breakdown_s.get(key, 0.0)
        if time_s < _NEGLIGIBLE_S:
            continue
        share = time_s / step_time_s
        table.add_row(name, seconds(time_s), f"{share:.1%}", bar(share, 40).rstrip("░"))
    return table


def stage_boxes(stages: Sequence[Sequence[str]]) -> Text:
    """Boxes of lines joined by arrows, in the order of the pipeline, several in a row."""
    rows: list[str] = []
    for first in range(0, len(stages), BOXES_A_ROW):
        group = stages[first : first + BOXES_A_ROW]
        high = max(map(len, group))
        widths = [max(map(len, lines)) for lines in group]
        more = first + BOXES_A_ROW < len(stages)
        for at in range(-1, high + 1):
            cells = [_edge(lines, width, at, high) for lines, width in zip(group, widths, strict=True)]
            arrow = "──▶" if at == high // 2 else "   "
            rows.append((arrow.join(cells) + (arrow if more else "")).rstrip())
    return Text("\n".join(rows), no_wrap=True, overflow="crop")


def _edge(lines: Sequence[str], width: int, at: int, high: int) -> str:
    if at in (-1, high):
        left, right = ("┌", "┐") if at == -1 else ("└", "┘")
        return left + "─" * (width + 2) + right
    return f"│ {lines[at] if at < len(lines) else '':<{width}} │"


def clip(text: str, most: int = _WIDEST) -> str:
    """The text, its middle left out where it is too long for a box."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head):]}"


def box_lines(index: int, stage: Mapping[str, Any]) -> list[str]:
    """The lines of one stage's box; `stage` has blocks, count, ranks, num_devices, mesh, peak_gib and limit_gib."""
    devices = f"{stage['num_devices']} device{'s' if stage['num_devices'] != 1 else ''}, {stage['ranks']}"
    lines = [f"stage {index}", clip(stage["blocks"]), clip(devices), clip(stage["mesh"])]
    peak, limit = stage["peak_gib"], stage["limit_gib"]
    if peak is not None and limit:
        lines.append(f"{bar(peak / limit, 10)} {peak / limit:.0%} full")
    return lines
