"""One checkpoint through three layouts, and saves that are cut short: the one before is there, and whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import runtime_models
import torch
from local_machines import slow_cluster
from test_checkpoint import train
from test_parity import captured_of, graph_of, plan_of
from torch import Tensor
from torch.distributed.checkpoint import save as save_foreign

from autopar.errors import InputError
from autopar.plan.plan import Plan
from autopar.runtime import checkpoint
from autopar.runtime.checkpoint import read_files
from autopar.runtime.chunks import HeldTensor
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, make_model, precision
from autopar.search.degrees import Degrees, plan_from_degrees


def one_device() -> Plan:
    return fully_sharded(1)


def fully_sharded(size: int) -> Plan:
    wanted = Degrees(
        global_batch=8, micro_batch=8 // size, dp_shard=size, zero=3 if size > 1 else 0, dtype="float64",
        param_dtype="float64", optimizer="sgd",
    )
    return plan_from_degrees(graph_of("llama", "float64"), slow_cluster(size), wanted)


def make_trainer(plan: Plan, seed: int) -> Trainer:
    model, _, _ = make_model(runtime_models.llama, "float64", seed)
    return Trainer(
        model, plan, captured_of("llama", "float64"), lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-6)
    )


def go_on(plan: Plan, source: str | None, target: str) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    """Load (or train), save again; what was saved, the next losses, and those once more after loading it anew.

    Last, for how many elements of tensors a rank makes room when it loads.
    """
    made = []

    def count(wanted: dict[str, Any], **keywords: Any) -> None:
        made.append(sum(value.local.numel() for value in wanted.values() if isinstance(value, HeldTensor)))
        read_files(wanted, **keywords)

    trainer = make_trainer(plan, seed=0 if source is None else 5)
    if source is None:
        train(trainer, 0, 3)
    else:
        trainer.load(source)
    trainer.save(target)
    state = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    losses = train(trainer, 3, 6)
    with patch.object(checkpoint, "read_files", count):
        trainer.load(target)
    again = train(trainer, 3, 6)
    trainer.close()
    return state, losses, again, made[0]


@pytest.mark.processes
def test_two_axes_then_shards_then_one_process(pool: LocalPool, tmp_path: Path) -> None:
    """Parameters stay equal to the last bit; a resumed run repeats its losses to the last bit, others to rounding."""
    places = [str(tmp_path / name) for name in ("first", "second", "third")]
    runs = [
        pool.run(go_on, plan_of("llama", "tp2xpp2_m2", "float64"), None, places[0], num_ranks=4)[0],
        pool.run(go_on, fully_sharded(4), places[0], places[1], num_ranks=4)[0],
        go_on(one_device(), places[1], places[2]),
    ]
    first, losses, _, _ = runs[0]
    for state, next_losses, again, _ in runs:
        assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in first)
        assert next_losses == again, "resuming repeats the numbers exactly"
        assert next_losses == pytest.approx(losses, rel=1e-12)
    plain, example, _ = make_model(runtime_models.llama, "float64", 9)
    plain.load_state_dict(first)
    with precision("float64"):
        assert plain(**make_batch(example, 8, 3)).loss.item() == pytest.approx(losses[0], rel=1e-12)
    rooms, alone = [room for *_, room in runs], runs[2][3]
    assert rooms[0] < 0.3 * alone and rooms[1] < 0.3 * alone, "of four ranks each reads what it holds"
    for place in places[:2]:
        sizes = [file.stat().st_size for file in Path(place).glob("*.distcp")]
        assert len(sizes) == 4 and max(sizes) < 0.35 * sum(sizes), "and writes it"


class CutError(Exception):
    """The end of a process in the middle of a save."""


def saved_and_trained(folder: Path) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer that saved its state and then trained on, and that state."""
    trainer = make_trainer(one_device(), seed=0)
    trainer.save(folder)
    state = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    train(trainer, 0, 1)
    return trainer, state


def is_state(trainer: Trainer, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in trainer.full_state_dict().items())


@pytest.mark.parametrize("moment", ["writing", "taking away", "putting there", "removing the old"])
def test_a_save_that_is_cut_short_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tmp_path / "state"
    trainer, state = saved_and_trained(folder)
    later = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    assert not is_state(trainer, state)
    write, rename, remove = checkpoint.write_files, Path.rename, shutil.rmtree

    def cut_write(*args: Any, **keywords: Any) -> Any:
        write(*args, **keywords)
        partial = keywords["checkpoint_id"]
        (partial / ".metadata").unlink()
        for file in partial.iterdir():
            os.truncate(file, file.stat().st_size // 2)
        raise CutError

    def cut_rename(path: Path, target: Path) -> Path:
        if path.name == ("state" if moment == "taking away" else "state.partial"):
            raise CutError
        return rename(path, target)

    def cut_remove(path: Path, **keywords: Any) -> None:
        if path.name == "state.old" and path.exists():
            raise CutError
        remove(path, **keywords)

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(checkpoint, "write_files", cut_write)
        elif moment == "removing the old":
            patch.setattr(checkpoint.shutil, "rmtree", cut_remove)
        else:
            patch.setattr(Path, "rename", cut_rename)
        with pytest.raises(CutError):
            trainer.save(folder)
    trainer.load(folder)
    assert is_state(trainer, later if moment == "removing the old" else state)
    train(trainer, 1, 2)
    trainer.save(folder)
    newest = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    train(trainer, 2, 3)
    trainer.load(folder)
    assert is_state(trainer, newest)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("damage", ["data", "metadata", "missing"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    trainer, _ = saved_and_trained(tmp_path / "state")
    before = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    file = tmp_path / "state" / ".metadata"
    if damage != "metadata":
        (file,) = (tmp_path / "state").glob("*.distcp")
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match="is damaged") as caught:
        trainer.load(tmp_path / "state")
    assert "\n" not in str(caught.value)
    assert is_state(trainer, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [(lambda value: ["a list"], "has no tensor"), (lambda value: None, "has no"),
     (lambda value: value[:1], "not of shape")],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, other: Callable[[Tensor], object], message: str
) -> None:
    """Files of torch.distributed.checkpoint that others wrote may hold anything under a parameter's name."""
    trainer, _ = saved_and_trained(tmp_path / "state")
    before = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    foreign: dict[str, object] = {f"model.{name}": value for name, value in before.items()}
    param = min(trainer.graph.param)
    name = f"model.{param}"
    foreign[name] = other(before[param])
    if foreign[name] is None:
        del foreign[name]
    save_foreign(foreign, checkpoint_id=tmp_path / "foreign", no_dist=True)
    with pytest.raises(InputError, match=f"{message}.*of another model") as caught:
        trainer.load(tmp_path / "foreign")
    assert "\n" not in str(caught.value)
    assert is_state(trainer, before)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, state = saved_and_trained(tmp_path / "state")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_files", full)
        with pytest.raises(InputError, match=r"No space left on device.*is as it was"):
            trainer.save(tmp_path / "state")
    trainer.load(tmp_path / "state")
    assert is_state(trainer, state)
