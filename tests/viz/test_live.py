"""A run's trace beside the prediction: read with care, paired row by row, and refused where it is of another plan."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from drawn_page import Drawn
from live_runs import SLOWER, slower_run

from autopar.cli import main
from autopar.errors import InputError
from autopar.viz.live import Trace, live, load_trace


@pytest.fixture
def trace_file(drawn: Drawn, tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(slower_run(drawn)))
    return path


def test_every_predicted_row_has_a_measured_one_below(drawn: Drawn, trace_file: Path) -> None:
    found = live(drawn.picture, load_trace(trace_file), name="run.json")
    assert found["step"] == 1  # the first one is left out
    assert found["measured_s"] == pytest.approx(SLOWER * found["predicted_s"], rel=1e-3)
    rows = found["timeline"]["rows"]
    assert [row["words"] for row in rows] == ["predicted", "measured"] * 2
    forward = found["timeline"]["kinds"].index("F")
    for predicted, measured in zip(rows[::2], rows[1::2], strict=True):
        pairs = zip(*([event for event in row["events"] if event[0] == forward] for row in (predicted, measured)),
                    strict=True)
        for one, other in pairs:
            assert other[3:] == pytest.approx([SLOWER * time for time in one[3:]], rel=1e-5, abs=1e-9)


def test_the_differences_are_in_the_table(drawn: Drawn, trace_file: Path) -> None:
    table = live(drawn.picture, load_trace(trace_file), name="run.json")["table"]
    of_actions = [row for row in table if row["what"].startswith(("forward", "backward", "optimizer"))]
    for stage in (0, 1):
        words = {row["what"] for row in of_actions if row["stage"] == stage}
        assert words in (
            {"forward of a micro-batch", *backward, "optimizer"}
            for backward in ({"backward of a micro-batch"}, {"backward of inputs", "backward of weights"})
        )
    for row in of_actions:
        assert row["measured_s"] == pytest.approx(SLOWER * row["predicted_s"], rel=1e-4)


def test_times_of_another_machine_are_told(drawn: Drawn) -> None:
    trace = slower_run(drawn)
    trace["otherData"] |= {"device": "cpu", "optimizer": "SGD", "dtype": "float32"}
    notes = " ".join(live(drawn.picture, _read(trace), name="run")["notes"])
    assert "CPU processes" in notes and "SGD" in notes and "float32" in notes


def _read(value: Any) -> Trace:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        path.write_text(json.dumps(value))
        return load_trace(path)


@pytest.mark.parametrize(("key", "value"), [
    ("num_ranks", 9), ("num_stages", 1), ("global_batch", 7), ("model", "other"), ("num_micro_batches", 99),
])
def test_a_run_of_another_plan_is_refused(drawn: Drawn, key: str, value: object) -> None:
    trace = slower_run(drawn)
    trace["otherData"][key] = value
    with pytest.raises(InputError, match="another plan"):
        live(drawn.picture, _read(trace), name="run.json")


def _with(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(trace: dict[str, Any]) -> dict[str, Any]:
        change(trace)
        return trace

    return changed


@pytest.mark.parametrize("spoil", [
    lambda trace: [], lambda trace: {"traceEvents": []},
    _with(lambda trace: trace["otherData"].update(version=9)),
    _with(lambda trace: trace.update(traceEvents=3)),
    _with(lambda trace: trace["traceEvents"].append({"ph": "X"})),
    _with(lambda trace: trace["traceEvents"].append(dict(trace["traceEvents"][1], pid=99))),
    _with(lambda trace: trace["traceEvents"][1].update(dur=-1)),
    _with(lambda trace: trace["otherData"].update(step_times_s=[])),
])
def test_what_is_no_trace_is_one_line(
    drawn: Drawn, tmp_path: Path, spoil: Callable[[Any], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "run.json", tmp_path / "page.html"
    path.write_text(json.dumps(spoil(slower_run(drawn))))
    assert main(["viz", str(drawn.plan), "--live", str(path), "-o", str(page)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "run.json" in line
    assert not page.exists()


def test_the_command_writes_the_page_and_says_the_differences(
    drawn: Drawn, trace_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["viz", str(drawn.plan), "--live", str(trace_file), "-o", str(page)]) == 0
    said = capfd.readouterr().out
    assert "the whole step" in said and "3.00" in said
    assert '"live":{' in page.read_text()
