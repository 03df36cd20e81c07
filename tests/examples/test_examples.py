"""The examples run as they are, each as its own program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SAID = {
    "custom_op": r"with the rule:  a step of [\d.]+ ms\n",
    "images": r"step 9: loss [\d.]+\n",
    "mixed_cluster": r"look at (\S+plan\.html) in a browser\n",
    "mixture_of_experts": r"(\d+) of \1 operators are split over the tensor axis\n",
    "read_plan": r"where the step goes: compute [\d.]+ s",
}

LOOPS = {
    "hugging_face_loop": "tensors are back in the Hugging Face model",
    "hugging_face_trainer": "parameters is saved as any other",
}


def run(folder: Path, *command: str) -> str:
    """What a program printed that ran in a folder of its own."""
    (folder / "tmp").mkdir()
    env = dict(os.environ, TMPDIR=str(folder / "tmp"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]


def test_every_example_is_run() -> None:
    elsewhere = {"train"}  # tests/runtime/test_api.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAID, *LOOPS, *elsewhere}


@pytest.mark.parametrize("name", SAID)
def test_example(name: str, tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / f"{name}.py"))
    assert re.search(SAID[name], printed), printed
    found = losses(printed)
    assert not found or found[-1] < 0.95 * found[0]
    if name == "mixed_cluster":
        (page,) = (tmp_path / "tmp").rglob("plan.html")
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    if name == "custom_op":
        before, after = (float(text) for text in re.findall(r"a step of ([\d.]+) ms", printed))
        assert after < before


@pytest.mark.processes
@pytest.mark.parametrize("name", LOOPS)
def test_loops_print_the_same_on_two_processes(name: str, tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    alone.mkdir()
    pair.mkdir()
    path = str(EXAMPLES / f"{name}.py")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path)
    expected, printed = losses(run(alone, path)), run(pair, *launch)
    assert LOOPS[name] in printed
    assert len(expected) == 3
    assert expected[-1] < 0.95 * expected[0]
    assert losses(printed) == pytest.approx(expected, abs=2e-4)
