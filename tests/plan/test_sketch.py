"""Bars, boxes and the time split of the printed plan."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autopar.plan.sketch import bar, box_lines, clip, stage_boxes, time_split

STAGE = {"blocks": "layers.0 .. layers.3 (4)", "ranks": "0-3", "num_devices": 4, "mesh": "tp 4", "peak_gib": 3.0,
         "limit_gib": 4.0}


@given(st.floats(-1, 3), st.integers(1, 50))
def test_a_bar_is_as_wide_as_it_is_told_and_as_full(share: float, width: int) -> None:
    drawn = bar(share, width)
    assert len(drawn) == width
    assert drawn.count("█") == int(round(min(max(share, 0.0), 1.0) * width * 8) / 8)


@pytest.mark.parametrize(("share", "drawn"), [(0.0, "░░░░"), (0.5, "██░░"), (1.0, "████"), (0.125, "▌░░░")])
def test_bars(share: float, drawn: str) -> None:
    assert bar(share, 4) == drawn


@given(st.text(max_size=60), st.integers(3, 30))
def test_clipped_text_fits(text: str, most: int) -> None:
    assert len(clip(text, most)) <= most
    assert clip(text, most) == text or "…" in clip(text, most)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_all_stages_have_a_box_and_all_but_the_last_an_arrow(count: int) -> None:
    text = stage_boxes([box_lines(i, STAGE) for i in range(count)]).plain
    assert [f"stage {i} " in text for i in range(count)] == [True] * count
    assert (text.count("┌"), text.count("┘"), text.count("──▶")) == (count, count, count - 1)
    assert "75% full" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_time_split_names_each_part_with_its_share() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(time_split({"compute": 0.75, "bubble": 0.25, "tp_comm": 0.0}, 1.0))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert lines[0].split()[:4] == ["compute", "750", "ms", "75.0%"]
    assert lines[0].count("█") == 30 and lines[1].count("█") == 10
