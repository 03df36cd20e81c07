"""The commands' answers: tables for people, the promised keys in one JSON object for programs."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.cli_output import print_json

SIMULATE_KEYS = {"step_time_s", "tokens_per_s_per_device", "mfu", "bubble_fraction", "feasible", "infeasible_reason",
                 "breakdown_s", "devices"}
PLAN_KEYS = SIMULATE_KEYS | {"micro_batch", "num_micro_batches", "schedule", "stages", "lower_bound_s", "gap",
                             "search_seconds", "baselines"}
DEGREES = ("--tp", 2, "--pp", 2, "--dp-shard", 2, "--zero", 3, "--micro-batch", 1, "--sequence-parallel")


def test_plan_json_has_the_promised_keys(autopar, llama: Path) -> None:
    value = autopar("plan", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "--json").value
    assert set(value) >= PLAN_KEYS
    assert value["feasible"] is True
    assert value["lower_bound_s"] <= value["step_time_s"]
    ranks = sorted(rank for stage in value["stages"] for rank in stage["devices"])
    assert ranks == [device["rank"] for device in value["devices"]] == [0, 1, 2, 3]
    assert value["stages"][0]["layers"][0] == 0
    assert value["stages"][-1]["layers"][1] == 4
    for stage in value["stages"]:
        assert set(stage) >= {"layers", "devices", "mesh", "zero", "recompute"}
    fitting = [baseline["step_time_s"] for baseline in value["baselines"] if baseline["feasible"]]
    assert fitting
    assert value["step_time_s"] <= min(fitting) * (1 + 1e-9)


def test_plan_is_the_same_whatever_the_hash_seed(llama: Path, tmp_path: Path) -> None:
    texts = []
    for seed in ("0", "1"):
        path = tmp_path / f"plan-{seed}.json"
        subprocess.run([sys.executable, "-m", "autopar", "plan", str(llama), "--cluster", "4xH100-80GB",
                        "--global-batch", "8", "-o", str(path)], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True)
        plan = json.loads(path.read_text())
        plan["certificate"].pop("search_seconds")
        texts.append(json.dumps(plan))
    assert texts[0] == texts[1]


MODEL_THAT_LEAVES = """
import atexit, tempfile
from torch import nn, ones
folder = tempfile.TemporaryDirectory(dir={folder!r})
def make():
    atexit.register(print, "left")
    print(end="made ")
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (ones(2, 8),), lambda output, batch: output.mean()
"""


@pytest.mark.parametrize("cluster", ["2xH100-80GB", "2xNoSuchGPU"])
def test_a_process_ends_quickly_but_whole(tmp_path: Path, cluster: str) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL_THAT_LEAVES.format(folder=str(tmp_path)))
    for command in (["plan"], ["simulate", "--dp-shard", "2"]):
        words = [*command, f"{file}:make", "--cluster", cluster, "--global-batch", "8"]
        run = subprocess.run([sys.executable, "-m", "autopar", *words], capture_output=True, text=True, check=False)
        known = cluster == "2xH100-80GB"
        assert run.returncode == (0 if known else 2), run.stderr
        assert run.stderr.count("autopar: ") == (0 if known else 1)
        assert run.stdout.startswith("made ") == run.stdout.endswith("left\n") == known
        assert not list(tmp_path.glob("tmp*"))


def test_numbers_that_json_cannot_say_are_null() -> None:
    stream = io.StringIO()
    print_json({"a": [1.5, math.inf], "b": {"c": math.nan, "d": (2, "x", True, None)}}, stream)
    print_json({"a": (1, 2.5)}, stream)
    assert stream.getvalue() == '{"a": [1.5, null], "b": {"c": null, "d": [2, "x", true, null]}}\n{"a": [1, 2.5]}\n'


def test_plan_prints_a_table(autopar, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    run = autopar("plan", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "-o", path)
    assert run.code == 0
    assert run.err == ""
    for word in ("stage", "baseline", "gap", str(path)):
        assert word in run.out
    assert path.exists()


def test_simulate_json_has_the_promised_keys(autopar, llama: Path) -> None:
    run = autopar("simulate", llama, "--cluster", "8xH100-80GB", "--global-batch", 16, *DEGREES, "--json")
    assert run.code == 0
    value = run.value
    assert set(value) >= SIMULATE_KEYS
    assert set(value["breakdown_s"]) == {"compute", "tp_comm", "dp_comm", "pp_comm", "bubble", "optimizer"}
    assert len(value["devices"]) == 8
    for device in value["devices"]:
        assert set(device) >= {"rank", "type", "stage", "peak_memory_gib", "memory_gib"}
        assert set(device["memory_gib"]) >= {"parameters", "gradients", "optimizer", "activations", "buffers"}


def test_simulate_a_plan_file_gives_the_planned_time(autopar, llama: Path, plan_file: Path) -> None:
    words = (llama, "--cluster", "4xH100-80GB", "--global-batch", 8)
    planned = autopar("plan", *words, "--json").value
    simulated = autopar("simulate", *words, "--plan", plan_file, "--json").value
    assert simulated["step_time_s"] == pytest.approx(planned["step_time_s"], rel=1e-12)


def test_simulate_prints_a_table(autopar, llama: Path) -> None:
    run = autopar("simulate", llama, "--cluster", "8xH100-80GB", "--global-batch", 16, *DEGREES)
    assert run.code == 0
    assert run.err == ""
    assert "step time" in run.out
    assert "stage 1" in run.out


def test_simulate_writes_a_chrome_trace(autopar, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    words = (llama, "--cluster", "8xH100-80GB", "--global-batch", 16, *DEGREES)
    run = autopar("simulate", *words, "--trace", path, "--json")
    assert run.code == 0
    events = json.loads(path.read_text())["traceEvents"]
    end_s = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") * 1e-6
    assert end_s == pytest.approx(run.value["step_time_s"], rel=1e-3)


def test_requests_answer_line_by_line_in_order(autopar, llama: Path, tmp_path: Path) -> None:
    good = dict(model=str(llama), cluster="8xH100-80GB", global_batch=16, tp=2, pp=2, dp_shard=2, dp_replicate=1,
                zero=3, micro_batch=1, sequence_parallel=True, schedule="1f1b", recompute="none", dtype="bf16",
                optimizer="adamw", attention="sdpa", virtual_stages=1, cp=1, ep=1, compile=False, seq_len=64)
    lines = [json.dumps(good), "not json", json.dumps(good | {"bogus": 1}), json.dumps(good | {"cluster": "8xNoGPU"}),
             "[]", json.dumps(good | {"tp": "two"}), json.dumps(good | {"micro_batch": 3}), json.dumps(good)]
    path = tmp_path / "requests.jsonl"
    lines.insert(1, json.dumps(good | {"model": "modèle"}, ensure_ascii=False))
    text = "\n".join(lines) + "\n\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("latin-1"))  # an editor's mark, and one line that is not UTF-8
    run = autopar("simulate", "--requests", path, "--json")
    assert run.code == 0
    assert run.err == ""
    answers = [json.loads(line) for line in run.out.splitlines()]
    assert len(answers) == len(lines)
    assert [sorted(answer) == ["error"] for answer in answers] == [False] + [True] * 7 + [False]
    assert answers[0] == answers[-1]
    assert answers[1]["error"] == "line 2 is not UTF-8"
    assert "bogus" in answers[3]["error"]
    assert "NoGPU" in answers[4]["error"]
    assert "tp" in answers[6]["error"]


def test_show_and_export_read_the_plan_file(autopar, plan_file: Path, tmp_path: Path) -> None:
    assert "stage" in autopar("show", plan_file).out
    shown = autopar("show", plan_file, "--json").value  # all but what only `viz` draws
    assert "picture" not in shown
    assert shown | {"picture": json.loads(plan_file.read_text())["picture"]} == json.loads(plan_file.read_text())
    settings = tmp_path / "settings.toml"
    assert autopar("export", plan_file, "--to", "torchtitan", "-o", settings).code == 0
    assert "[parallelism]" in settings.read_text()
    exported = autopar("export", plan_file, "--to", "megatron", "--json").value
    assert "--tensor-model-parallel-size" in exported["settings"]


def test_json_is_alone_on_standard_output_whatever_the_model_prints(autopar, tmp_path: Path) -> None:
    source = tmp_path / "chatty.py"
    source.write_text(
        "import os, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x).square().mean()\n"
        "def factory():\n"
        "    print('hello from Python')\n"
        "    os.write(1, b'hello from below')\n"
        "    return Net(), {'x': torch.ones(4, 8)}\n"
    )
    words = (f"{source}:factory", "--cluster", "2xH100-80GB", "--global-batch", 8)
    run = autopar("plan", *words, "--dtype", "fp32", "--json")
    assert run.code == 0
    assert run.value["feasible"] is True
    assert "hello from Python" in run.err
    assert "hello from below" in run.err


def test_a_table_where_the_terminal_knows_ascii_alone(plan_file: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "autopar", "show", str(plan_file)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (run.returncode, run.stderr) == (0, "")
    assert "stage" in run.stdout


def test_help_needs_no_torch() -> None:
    script = "import sys; from autopar.cli import main; main(['--help']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


def test_an_interrupt_is_one_line_and_code_130(autopar, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autopar.plan.file.load_plan", interrupted)
    run = autopar("show", "plan.json")
    assert run.code == 130
    assert run.err.split() == ["autopar:", "interrupted"]


def test_plan_explains_a_layer(autopar, llama: Path) -> None:
    words = ("plan", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "--mesh", "tp=2")
    found = autopar(*words, "--explain", "--json").value["explain"]
    assert found["block"] == "model.layers.0"
    assert found["axes"] == {"tp": 2}
    assert {"params", "ops", "collectives", "alternatives", "other_plans", "certificate"} <= set(found)
    run = autopar(*words, "--explain", "model.layers.2")
    assert run.code == 0
    assert "why model.layers.2 is sharded so" in run.out
    wrong = autopar(*words, "--explain", "layer 7")
    assert wrong.code == 2
    assert "no block 'layer 7' to explain" in wrong.err


def test_a_dry_run_of_a_plan(autopar, llama: Path, plan_file: Path) -> None:
    words = ("simulate", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "--plan", plan_file, "--dry-run")
    value = autopar(*words, "--json").value["dry_run"]
    degrees = (*words[:6], "--pp", 2, "--schedule", "zb", "--micro-batch", 2, "--dry-run", "--json")
    assert autopar(*degrees).value["dry_run"]["problems"] == []
    assert (value["passed"], value["problems"], value["num_ranks"]) == (True, [], 4)
    assert {row["kind"] for row in value["memory"]} == {
        "parameters", "optimizer", "activations", "gradients and buffers", "peak"
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dry_run_holds_what_was_predicted_of_its_devices(autopar, llama: Path, compiled: bool) -> None:
    words = ("simulate", llama, "--cluster", "1xH100-80GB", "--global-batch", 64, "--micro-batch", 64, "--dry-run",
             "--json", *(["--compile"] if compiled else []))
    value = autopar(*words).value["dry_run"]
    (peak,) = (row for row in value["memory"] if row["kind"] == "peak")
    assert value["problems"] == []
    assert peak["program_bytes"] < peak["predicted_bytes"]  # which has some room for libraries
    assert [("uncompiled" in note) for note in value["notes"]] == [True] * compiled


def test_two_plans_are_shown_side_by_side(autopar, llama: Path, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    words = ("plan", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "--mesh", "pp=2", "-o", other, "--json")
    slower = autopar(*words).value["step_time_s"]
    run = autopar("show", "--compare", plan_file, other)
    assert run.code == 0
    assert "other.json is" in run.out and "Where the blocks lie" in run.out
    value = autopar("show", "--compare", plan_file, other, "--json").value
    (steps,) = (row["values"] for row in value["numbers"] if row["key"] == "step_time_s")
    assert steps[1] == pytest.approx(slower)
    assert value["names"] == ["plan.json", "other.json"]
