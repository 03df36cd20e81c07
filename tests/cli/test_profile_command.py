"""profile: what it refuses in one line, and what an interrupt leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_local_commands import PROFILE

from autopar.cluster.measured import CollectiveFit, OpSample, OpTensor, Piece
from autopar.profiler import load_profile, save_profile
from autopar.profiler.local import ProfileInterrupted
from autopar.profiler.op_cases import grid_cases
from autopar.profiler.profile import with_ops


def sample(numel: int) -> OpSample:
    return OpSample(
        target="aten.silu.default", settings="*", dtype="float32", forward_s=1e-9 * numel, backward_s=0.0,
        operands=(OpTensor(shape=(numel,), dtype="float32"),), outputs=(OpTensor(shape=(numel,), dtype="float32"),),
    )


FIT = CollectiveFit(
    collective="all_reduce", backend="gloo", num_ranks=2, num_nodes=1, per_node=2, groups_per_node=1,
    pieces=(Piece(from_bytes=0.0, latency_s=1e-4, bytes_per_s=1e9),), relative_error=0.05, points=((1024, 1e-4),),
)


@pytest.mark.parametrize(("words", "said"), [
    (("links", "--num-processes", 1), "torchrun"),
    (("links", "--model", "gpt2"), "measures no ops"),
    (("ops", "--plan", "plan.json"), "--model"),
    (("ops", "--rows", "1,x"), "--rows '1,x'"),
    (("ops", "--rows", "0"), "whole numbers"),
    (("ops", "--tp", "2,"), "--tp '2,'"),
    (("ops", "--merge", "nowhere.json"), "cannot read the profile nowhere.json"),
    (("ops", "--dtype", "int3"), "int3"),
    (("ops", "--model", "no-such-model", "--no-grid"), "no model 'no-such-model'"),
    (("ops", "-o", "nowhere/profile.json"), "nowhere"),
    (("everything",), "everything"),
])
def test_bad_input_is_one_line(autopar: Any, words: tuple[object, ...], said: str) -> None:
    run = autopar("profile", *words)
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    assert said in run.err


def test_links_of_a_job_take_no_number_of_processes(autopar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = autopar("profile", "links", "--num-processes", 2)
    assert run.code == 2
    assert "torchrun" in run.err


def test_an_interrupt_leaves_a_valid_file(autopar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise ProfileInterrupted(with_ops(PROFILE, (sample(64),), (FIT,)))

    monkeypatch.setattr("autopar.profiler.profile_local", stopped)
    path = tmp_path / "profile.json"
    run = autopar("profile", "all", "--no-grid", "--num-processes", 2, "-o", path)
    assert run.code == 130
    assert "interrupted: what was measured until then is kept" in run.out
    assert "all-reduce among 2 on 1 nodes" in run.out
    assert len(load_profile(path).ops.samples) == 1
    run = autopar("profile", "all", "--no-grid", "--num-processes", 2, "--json")
    assert run.code == 130
    assert len(run.value["fits"]) == 1


def test_merging_measures_nothing_twice(autopar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, path, asked = tmp_path / "earlier.json", tmp_path / "profile.json", []
    save_profile(with_ops(PROFILE, (sample(64),), ()), earlier)

    def measure(*_: object, **options: Any) -> Any:
        asked.append(options["cases"])
        return with_ops(PROFILE, (sample(128),), ())

    monkeypatch.setattr("autopar.profiler.profile_local", measure)
    assert autopar("profile", "ops", "--num-processes", 2, "-o", path).code == 0
    assert autopar("profile", "ops", "--num-processes", 2, "--merge", earlier, "-o", path).code == 0
    assert len(asked[0]) == len(asked[1]) > 100, "the earlier profile has none of the grid's ops"
    assert [item.operands[0].shape for item in load_profile(path).ops.samples] == [(64,), (128,)]
    known = grid_cases("float32", device_type="cpu")[0]
    whole = OpSample(
        target=known.target, settings=known.settings, dtype=known.dtype, forward_s=1.0, backward_s=1.0,
        operands=tuple(item.tensor for item in known.operands), outputs=known.outputs,
    )
    save_profile(with_ops(PROFILE, (whole,), ()), earlier)
    assert autopar("profile", "ops", "--num-processes", 2, "--merge", earlier, "-o", path).code == 0
    assert len(asked[2]) == len(asked[0]) - 1
    assert json.loads(path.read_text())["ops"]["samples"]
