"""The sweep: a row for every point, what twice the devices buy; a stop or a point that fails loses nothing."""

import csv
from pathlib import Path

import pytest

from autopar.cli_sweep import COLUMNS, doublings
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
    assert all(gain["words"].startswith("Twice the devices (1x1xH100-80GB to 2x1xH100-80GB) at the same batch of 4, ")
               for gain in run.value["doublings"])
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


def test_weak_scaling_keeps_the_rows_of_a_device(autopar, llama: Path, tmp_path: Path) -> None:
    words = ("--cluster", "1x2xH100-80GB", "--nodes", "1,2,3", "--seq-len", "32", "--scaling", "weak")
    run = autopar("sweep", llama, *words, "--global-batch", "4", "-o", tmp_path / "s.csv", "--json")
    assert run.code == 0, run.err
    assert [(row["devices"], row["global_batch"], row["first_batch"]) for row in run.value["rows"]] == [
        (2, 4, 4), (4, 8, 4), (6, 12, 4)]
    (gain,) = run.value["doublings"]
    assert (gain["global_batch"], gain["to_global_batch"]) == (4, 8)
    assert "and twice the batch (4 to 8)" in gain["words"]
    refused = autopar("sweep", llama, *words, "--nodes", "2,3", "--global-batch", "3", "-o", tmp_path / "t.csv")
    assert refused.code == 2 and "multiple of 4" in refused.err


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
            "seq_len": 9, "feasible": rate is not None, "tokens_per_s": rate,
            "step_time_s": 9 * batch / rate if rate else None}


def test_twice_the_devices_are_compared_at_the_same_batch_and_at_twice_the_batch() -> None:
    found = doublings([point("a", 1, 10.0), point("b", 2, 15.0), point("c", 4, None), point("d", 2, 19.98, batch=16),
                       point("e", 2, 99.0, batch=24)])
    assert [(gain["from"], gain["to"], gain["speedup"]) for gain in found] == [
        ("a", "b", 1.5), ("a", "d", 1.998), ("b", "c", None)]
    assert [gain["words"] for gain in found] == [
        "Twice the devices (a to b) at the same batch of 8, sequence 9: 1.50 times the tokens/s, a step takes 4.8 s "
        "instead of 7.2 s, and each token takes 33% more of the devices' time",
        "Twice the devices (a to d) and twice the batch (8 to 16), sequence 9: 2.00 times the tokens/s, a step "
        "takes 7.207 s instead of 7.2 s, and each token takes as much of the devices' time",
        "Twice the devices (b to c) at the same batch of 8, sequence 9: only b has a plan that fits",
    ]
