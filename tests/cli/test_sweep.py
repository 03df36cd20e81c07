"""The sweep: a row for every point, what twice the devices buy; a stop or a point that fails loses nothing."""

import csv
from pathlib import Path

import pytest

from autopar.cli_sweep import COLUMNS, doubling_line, doublings
from autopar.errors import InfeasibleError
from autopar.search import planner

REAL = planner.find_plan


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_point_is_the_plan_that_plan_finds(autopar, llama: Path, tmp_path: Path) -> None:
    table, page = tmp_path / "s.csv", tmp_path / "s.html"
    words = ("--cluster", "1x1xH100-80GB", "--global-batch", "4", "--seq-len", "32,64", "-o", table)
    run = autopar("sweep", llama, *words, "--json")
    assert run.code == 0, run.err
    rows = run.value["rows"]
    assert [(row["cluster"], row["seq_len"]) for row in rows] == [
        ("1x1xH100-80GB", 32), ("1x1xH100-80GB", 64), ("2x1xH100-80GB", 32), ("2x1xH100-80GB", 64)]
    written = csv_rows(table)
    assert tuple(written[0]) == COLUMNS
    assert [float(row["step_time_s"]) for row in written] == [row["step_time_s"] for row in rows]
    planned = autopar("plan", llama, "--cluster", "2x1xH100-80GB", "--global-batch", 4, "--seq-len", 64, "--json").value
    assert rows[3]["step_time_s"] == planned["step_time_s"]
    assert rows[3]["tokens_per_s"] == pytest.approx(4 * 64 / planned["step_time_s"])
    expected = [rows[i + 2]["tokens_per_s"] / rows[i]["tokens_per_s"] for i in (0, 1)]
    assert [gain["speedup"] for gain in run.value["doublings"]] == expected
    assert '{"sweep":' in page.read_text()


def test_a_point_without_a_plan_is_a_row_that_says_why(
    autopar, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(graph, cluster, request, **_):
        if request.global_batch == 6:
            raise InfeasibleError("needs 99 GiB")
        return REAL(graph, cluster, request)

    monkeypatch.setattr(planner, "find_plan", find)
    table = tmp_path / "s.csv"
    words = ("--cluster", "1xH100-80GB", "--nodes", "1", "--seq-len", "32", "-o", table)
    run = autopar("sweep", llama, *words, "--global-batch", "4,6")
    assert run.code == 0, run.err
    assert [row["feasible"] for row in csv_rows(table)] == ["True", "False"]
    assert csv_rows(table)[1]["reason"] == "needs 99 GiB" and "needs 99 GiB" in run.out
    run = autopar("sweep", llama, *words, "--global-batch", "6")
    assert run.code == 1
    assert run.err.splitlines() == ["autopar: no point of the sweep has a plan, the first one: needs 99 GiB"]


def test_an_interrupt_keeps_what_is_done(
    autopar, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def find(*words, **options):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return REAL(*words, **options)

    monkeypatch.setattr(planner, "find_plan", find)
    table = tmp_path / "s.csv"
    words = ("--cluster", "1xH100-80GB", "--nodes", "1", "--seq-len", "32", "--global-batch", "2,4,6", "-o", table)
    run = autopar("sweep", llama, *words)
    assert (run.code, run.err.split()) == (130, ["autopar:", "interrupted"])
    assert [row["global_batch"] for row in csv_rows(table)] == ["2"]
    assert "1 of 3 points are kept" in run.out
    assert (tmp_path / "s.html").exists()


@pytest.mark.parametrize(("words", "word"), [
    (("--global-batch", "0"), "--global-batch"), (("--global-batch", "8,x"), "--global-batch"),
    (("--global-batch", "8", "--nodes", "one"), "--nodes"), (("--global-batch", "8", "--seq-len", "-1"), "--seq-len"),
    (("--global-batch", "8", "--plot", "s.csv"), "names of their own"),
    (("--global-batch", "8", "--plot", "/no/such/folder/p.html"), "cannot be written"),
    (("--global-batch", "8", "--nodes", "2", "--cluster", "1x8xA100-80GB+1x4xT4@100Gbps"), "unlike nodes"),
    (("--global-batch", ",".join(map(str, range(1, 10_003)))), "points"),
])
def test_bad_input_is_one_line_and_no_file(
    autopar, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = autopar("sweep", llama, "--cluster", "2xH100-80GB", "-o", "s.csv", *words)
    assert run.code == 2, run
    assert len(run.err.splitlines()) == 1 and word in run.err
    assert list(tmp_path.iterdir()) == []


def point(cluster: str, devices: int, rate: float | None, batch: int = 8) -> dict[str, object]:
    return {"cluster": cluster, "devices": devices, "nodes": devices, "device": "T4", "global_batch": batch,
            "seq_len": 9, "feasible": rate is not None, "tokens_per_s": rate}


def test_twice_the_devices_are_compared_at_the_same_batch_alone() -> None:
    found = doublings([point("a", 1, 10.0), point("b", 2, 15.0), point("c", 4, None), point("d", 2, 99.0, batch=16)])
    assert [(gain["from"], gain["to"], gain["speedup"]) for gain in found] == [("a", "b", 1.5), ("b", "c", None)]
    assert "1.50x the throughput (75% of twice)" in doubling_line(found[0])
    assert "only b has a plan" in doubling_line(found[1])
