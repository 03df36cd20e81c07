"""Two plans side by side: `show --compare` in the terminal, `viz --compare` as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from autopar.errors import InputError

MOST_SPLITS = 24  # rows of the table of ops that are split otherwise; --json and the page have all


def compared(paths: tuple[Path, Path], draw: Callable[[Path], dict[str, Any]] | None = None) -> dict[str, Any]:
    """The data of two plan files' comparison; with `draw`, which gives a plan's picture, also both pictures."""
    from autopar.plan.file import load_picture, load_plan
    from autopar.plan.verify import verify_plan
    from autopar.viz.comparison import comparison

    one, other = (load_plan(path) for path in paths)
    for plan in (one, other):
        verify_plan(plan, None)
    pictures = [load_picture(path) if draw is None else draw(path) for path in paths]
    found = comparison((one, other), (pictures[0], pictures[1]), short_names(paths))
    return found if draw is None else {"comparison": found, "pictures": pictures}


def short_names(paths: tuple[Path, Path]) -> tuple[str, str]:
    """What to call two files: their names, or as much of their folders as tells them apart."""
    one, other = paths
    if str(one) == str(other):
        raise InputError(f"{one} is compared with itself: name two plan files")
    for length in range(1, max(len(one.parts), len(other.parts)) + 1):
        short = "/".join(one.parts[-length:]), "/".join(other.parts[-length:])
        if short[0] != short[1]:
            return short
    return str(one), str(other)


def comparison_table(found: dict[str, Any]) -> Group:
    """What was compared, for a terminal: first what it gains, then what differs."""
    names = found["names"]
    parts: list[Any] = [Text(line, style="bold" if i == 0 else "") for i, line in enumerate(found["gains"])]
    numbers = _table("", *names, "second / first", right=(1, 2, 3))
    for row in found["numbers"]:
        numbers.add_row(row["name"], *(_number(value, row["kind"]) for value in row["values"]), _ratio(row["values"]))
    for row in found["parts"]:
        numbers.add_row(f"  {row['name']}", *(_number(value, "seconds") for value in row["values"]),
                        _ratio(row["values"]))
    parts += [Text(), numbers]
    if found["settings"]:
        parts += _titled("Settings that differ", _filled(("", *names), found["settings"]))
    parts += _titled("Stages", _stages(found))
    parts += _titled("Where the blocks lie", _filled(
        ("blocks", f"stage in {names[0]}", "ranks", "mesh", f"stage in {names[1]}", "ranks", "mesh", ""),
        ([_span(row), row["stages"][0], row["ranks"][0], row["meshes"][0], row["stages"][1], row["ranks"][1],
          row["meshes"][1], "moved" if row["moved"] else "shared out otherwise" if row["reshaped"] else "stays"]
         for row in found["blocks"]),
    ))
    if found["splits"]:
        shown = found["splits"][:MOST_SPLITS]
        parts += _titled("Ops that are split otherwise", _filled(
            ("block", "module", "op", *names),
            ([row["cls"], row["module"], row["op"], *(value or "whole" for value in row["values"])] for row in shown),
        ))
        if len(found["splits"]) > len(shown):
            parts.append(Text(f"and {len(found['splits']) - len(shown)} more: --json has them all", style="dim"))
    if found["collectives"]:
        parts += _titled("Collectives inside a block", _filled(
            ("block", "collective", "axis", *names),
            ([row["cls"], row["collective"].replace("_", "-"), row["axis"],
              *(f"{count} x, {size / 2**20:,.1f} MiB" if count else "none"
                for count, size in zip(row["counts"], row["size_bytes"], strict=True))]
             for row in found["collectives"]),
        ))
    return Group(*parts)




def _titled(title: str, table: Table) -> list[Any]:
    return [Text(), Text(title, style="bold"), table]


def _table(*names: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(Text(name), justify="right" if i in right else "left")
    return table


def _filled(names: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> Table:
    table = _table(*names)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _stages(found: dict[str, Any]) -> Table:
    keys = ("blocks", "ranks", "mesh", "zero", "recompute")
    table = _table("stage", "plan", *keys, "memory GiB", right=(7,))
    for index, pair in enumerate(found["stages"]):
        for name, stage in zip(found["names"], pair, strict=True):
            if stage is None:
                continue
            peak = stage["peak_memory_gib"]
            table.add_row(str(index), name, *(Text(str(stage[key])) for key in keys),
                          "-" if peak is None else f"{peak:.3g}")
    return table


def _span(row: dict[str, Any]) -> str:
    return row["first"] if row["count"] == 1 else f"{row['first']} .. {row['last']} ({row['count']})"


def _number(value: float | None, kind: str) -> str:
    from autopar.plan.text import seconds

    if value is None:
        return "-"
    if kind == "seconds":
        return seconds(value)
    return f"{value:.1%}" if kind == "share" else f"{value:,.0f}"


def _ratio(values: list[float | None]) -> str:
    one, other = values
    return f"{other / one:.3f}" if one and other is not None else "-"
