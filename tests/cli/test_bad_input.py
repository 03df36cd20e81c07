"""A user's mistake is one line on standard error, exit code 2 (or 1 where no plan fits), and never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.plan.file import load_plan

DATA_DEPENDENT = '''
import torch


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        if x.sum() > 0:
            return (x * self.weight).mean()
        return x.mean()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return self.gate(x)


def factory():
    return Net(), {"x": torch.ones(8, 4)}
'''


def check_one_line(run, code: int, *words: str) -> None:
    lines = run.err.splitlines()
    assert run.code == code, run
    assert len(lines) == 1, run.err
    assert lines[0].startswith("autopar: ")
    assert "Traceback" not in run.err
    for word in words:
        assert word.lower() in lines[0].lower(), f"{word!r} is not in {lines[0]!r}"


def test_unknown_gpu_names_the_nearest(autopar, llama) -> None:
    run = autopar("plan", llama, "--cluster", "8xH100-8GB", "--global-batch", 8)
    check_one_line(run, 2, "H100-8GB", "H100-80GB")
    assert run.out == ""


@pytest.mark.parametrize("cluster", ["", "8x", "0x8xH100-80GB", "8xH100-80GB@fastGbps", "no-such-file.yaml"])
def test_malformed_clusters(autopar, llama, cluster: str) -> None:
    check_one_line(autopar("plan", llama, "--cluster", cluster, "--global-batch", 8), 2)


def test_missing_config(autopar, tmp_path: Path) -> None:
    missing = tmp_path / "gone" / "config.json"
    check_one_line(autopar("plan", missing, "--cluster", "8xH100-80GB", "--global-batch", 8), 2, str(missing))


def test_unknown_preset_names_the_known(autopar) -> None:
    check_one_line(autopar("plan", "llama-3.1-9b", "--cluster", "8xH100-80GB", "--global-batch", 8), 2, "llama-3.1-8b")


def test_config_that_is_not_json(autopar, tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "llama", ')
    check_one_line(autopar("plan", broken, "--cluster", "8xH100-80GB", "--global-batch", 8), 2, "config.json")


def test_config_of_an_unknown_family(autopar, tmp_path: Path) -> None:
    odd = tmp_path / "config.json"
    odd.write_text('{"model_type": "nobody-made-this"}')
    check_one_line(autopar("plan", odd, "--cluster", "8xH100-80GB", "--global-batch", 8), 2, "nobody-made-this")


def test_a_batch_that_no_plan_divides(autopar, llama) -> None:
    run = autopar("plan", llama, "--cluster", "8xH100-80GB", "--global-batch", 7, "--micro-batch", 2)
    check_one_line(run, 1 if run.code == 1 else 2, "7")


def test_a_model_that_fits_nowhere_says_the_smallest_need(autopar) -> None:
    run = autopar("plan", "llama-3.1-405b", "--cluster", "1xT4", "--global-batch", 1, "--seq-len", 2048)
    check_one_line(run, 1, "GiB")


def test_json_of_an_infeasible_request_says_so(autopar) -> None:
    run = autopar("plan", "llama-3.1-405b", "--cluster", "1xT4", "--global-batch", 1, "--seq-len", 2048, "--json")
    assert run.code == 1
    assert run.value["feasible"] is False
    assert "GiB" in run.value["infeasible_reason"]


def test_data_dependent_control_flow_names_module_and_line(autopar, tmp_path: Path) -> None:
    source = tmp_path / "gated.py"
    source.write_text(DATA_DEPENDENT)
    line = 1 + DATA_DEPENDENT.splitlines().index("        if x.sum() > 0:")
    run = autopar("plan", f"{source}:factory", "--cluster", "8xH100-80GB", "--global-batch", 8)
    check_one_line(run, 2, "gate", f"gated.py:{line}")


@pytest.mark.parametrize(("text", "word"), [
    ("def other(): pass\n", "factory"),
    ("def factory(): return 3\n", "factory"),
    ("def factory(): raise ValueError('no such thing')\n", "no such thing"),
    ("def factory(: pass\n", "model.py"),
    ("import a_module_that_nobody_has\n", "a_module_that_nobody_has"),
])
def test_factories_that_fail(autopar, tmp_path: Path, text: str, word: str) -> None:
    source = tmp_path / "model.py"
    source.write_text(text)
    check_one_line(autopar("plan", f"{source}:factory", "--cluster", "8xH100-80GB", "--global-batch", 8), 2, word)


def test_truncated_plan_file(autopar, plan_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(plan_file.read_text()[:200])
    check_one_line(autopar("show", cut), 2, "cut.json")


@pytest.mark.parametrize("text", ["", "[]", '{"name": "something else"}', "\x00\x01"])
def test_foreign_plan_file(autopar, tmp_path: Path, text: str) -> None:
    foreign = tmp_path / "foreign.json"
    foreign.write_text(text)
    check_one_line(autopar("show", foreign), 2, "foreign.json")


def test_plan_from_another_format_version(autopar, plan_file: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.json"
    later.write_text(json.dumps(json.loads(plan_file.read_text()) | {"version": 99}))
    check_one_line(autopar("show", later), 2, "99")


def test_plan_for_another_model(autopar, plan_file: Path) -> None:
    run = autopar("simulate", "gpt2", "--cluster", "4xH100-80GB", "--global-batch", 8, "--plan", plan_file)
    check_one_line(run, 2, "model")


def test_plan_for_another_cluster(autopar, llama, plan_file: Path) -> None:
    run = autopar("simulate", llama, "--cluster", "4xA100-80GB", "--global-batch", 8, "--plan", plan_file)
    check_one_line(run, 2, "cluster")


def test_plan_for_another_batch(autopar, llama, plan_file: Path) -> None:
    run = autopar("simulate", llama, "--cluster", "4xH100-80GB", "--global-batch", 16, "--plan", plan_file)
    check_one_line(run, 2, "16")


def test_a_plan_and_degrees(autopar, llama, plan_file: Path, tmp_path: Path) -> None:
    words = ("simulate", llama, "--cluster", "4xH100-80GB", "--global-batch", 8, "--plan", plan_file)
    check_one_line(autopar(*words, "--tp", 2, "--recompute", "full"), 2, "tp, recompute")
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps(dict(model=str(llama), cluster="4xH100-80GB", global_batch=8, plan=str(plan_file),
                                        zero=3)) + "\n")
    assert "zero" in json.loads(autopar("simulate", "--requests", requests, "--json").out)["error"]


def test_plan_file_edited_into_nonsense(autopar, plan_file: Path, tmp_path: Path) -> None:
    edited = json.loads(plan_file.read_text())
    edited["stages"][0]["devices"] = [0, 0, 0, 0]
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(edited))
    check_one_line(autopar("show", path), 2, "device")
    edited["global_batch"] = 8_000_000_000
    path.write_text(json.dumps(edited))
    check_one_line(autopar("show", path), 2, "global_batch")


@pytest.mark.parametrize("words", [
    ("--bogus",),
    ("nonsense",),
    ("plan",),
    ("plan", "gpt2", "--cluster", "8xH100-80GB"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "many"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "0"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8000000000"),
    ("simulate", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8000000000"),
    ("sweep", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8,8000000000"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--dtype", "int3"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--optimizer", "magic"),
    ("plan", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "-o", "/no/such/folder/plan.json"),
    ("simulate",),
    ("simulate", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--zero", "4"),
    ("simulate", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--tp", "3"),
    ("simulate", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--dp-replicate", "3"),
    ("simulate", "gpt2", "--cluster", "8xH100-80GB", "--global-batch", "8", "--pp", "8", "--recompute", "some"),
    ("simulate", "--requests", "no-such-file.jsonl", "--json"),
    ("export", "plan.json", "--to", "paper"),
    ("verify", "no-such-plan.json", "--model", "gpt2"),
])
def test_wrong_words(autopar, words: tuple[str, ...]) -> None:
    check_one_line(autopar(*words), 2)


def test_json_errors_are_one_object_too(autopar) -> None:
    run = autopar("show", "no-such-plan.json", "--json")
    assert run.code == 2
    assert run.value["exit_code"] == 2
    assert "no-such-plan.json" in run.value["error"]


def test_the_installed_command_returns_the_code(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "autopar", "show", "gone.json"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [("show", "PLAN"), ("show", "PLAN", "--json"), ("show", "gone.json", "--json")])
def test_output_that_has_no_room_is_told(plan_file: Path, words: tuple[str, ...]) -> None:
    """A file that it was sent to would be cut short, and the exit code would say that all went well."""
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full here")
    with full.open("w") as nowhere:
        run = subprocess.run(
            [sys.executable, "-m", "autopar", *(str(plan_file) if word == "PLAN" else word for word in words)],
            stdout=nowhere, stderr=subprocess.PIPE, text=True,
        )
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "gone.json" in run.stderr if "gone.json" in words else "cannot be written" in run.stderr


def test_devices_and_links_that_are_written_stay_what_they_are(autopar, plan_file: Path, tmp_path: Path) -> None:
    """As root, a file put in the place of /dev/null would end much else."""
    link, pipe = tmp_path / "link.html", tmp_path / "pipe"
    link.symlink_to(tmp_path / "page.html")
    assert autopar("viz", plan_file, "-o", link).code == 0
    assert link.is_symlink()
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        assert autopar("viz", plan_file, "-o", pipe).code == 0
        assert reader.communicate()[0] == (tmp_path / "page.html").read_text()
    assert pipe.is_fifo()


def test_a_good_plan_file_is_the_plan_that_was_found(plan_file: Path) -> None:
    assert load_plan(plan_file).global_batch == 8


def test_a_plan_that_is_not_legal_is_not_drawn(autopar, plan_file: Path, tmp_path: Path) -> None:
    wrong, page = tmp_path / "wrong.json", tmp_path / "page.html"
    wrong.write_text(json.dumps(json.loads(plan_file.read_text()) | {"num_micro_batches": 999}))
    check_one_line(autopar("viz", wrong, "-o", page), 2, "not a legal plan", "global batch")
    assert not page.exists()


@pytest.mark.parametrize(("words", "word"), [
    (("show",), "--compare"),
    (("viz",), "--compare"),
    (("show", "PLAN", "--compare", "PLAN", "PLAN"), "--compare"),
    (("show", "--compare", "PLAN"), "2 arguments"),
    (("show", "--compare", "PLAN", "PLAN"), "itself"),
    (("show", "--compare", "PLAN", "gone.json"), "gone.json"),
])
def test_comparisons_need_two_plan_files(autopar, plan_file: Path, words: tuple[str, ...], word: str) -> None:
    check_one_line(autopar(*(str(plan_file) if text == "PLAN" else text for text in words)), 2, word)


def test_a_comparison_with_another_model_s_plan_writes_no_page(autopar, plan_file: Path, tmp_path: Path) -> None:
    other, page = tmp_path / "other.json", tmp_path / "page.html"
    other.write_text(json.dumps(json.loads(plan_file.read_text()) | {"model_name": "another"}))
    check_one_line(autopar("viz", "--compare", plan_file, other, "-o", page), 2, "one model")
    assert not page.exists()
