"""What goes wrong on one rank ends the others with one line that names it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from dataclasses import replace

import pytest
import runtime_models
import torch
import torch.distributed as dist
from test_parity import captured_of, plan_of

from autopar.errors import AutoparError, InputError, PlanMismatchError, RankFailedError
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool, LocalRunError
from autopar.runtime.parity import make_batch, make_model
from autopar.runtime.watch import Sign, Watch, _beat, end_beat, verdict


def test_a_rank_that_says_nothing_any_more_is_dead() -> None:
    before = {1: Sign(beat=3, step=2), 2: Sign(beat=5, step=2, where="a.py:1 in f")}
    after = {1: Sign(beat=7, step=2), 2: Sign(beat=5, step=2, where="a.py:1 in f")}
    assert verdict(before, after) == "rank 2 died: its last sign came from step 2 at a.py:1 in f"
    gone = {1: Sign(beat=3, lost=True), 2: Sign(beat=5, lost=True)}
    assert "every rank" in verdict(gone, gone)


def test_a_rank_that_is_behind_hangs_or_else_one_that_does_not_wait() -> None:
    before = {rank: Sign(beat=1) for rank in (1, 2, 3)}
    late = {1: Sign(beat=9, step=4, waits=True), 2: Sign(beat=9, step=3, still_s=7.2, where="data.py:5 in read"),
            3: Sign(beat=9, step=4, waits=True)}
    assert verdict(before, late) == "rank 2 hangs: it has not moved for 7 s, in step 3 at data.py:5 in read"
    busy = {1: Sign(beat=9, step=4, still_s=9, waits=True), 2: Sign(beat=9, step=4, still_s=8, where="x.py:1 in y"),
            3: Sign(beat=9, step=4, still_s=9, waits=True)}
    assert verdict(before, busy).startswith("rank 2 hangs")
    assert verdict(before, {**busy, 2: Sign(beat=9, step=4, lost=True)}).startswith("rank 1 hangs")


def test_a_beat_has_ended_before_its_process_ends() -> None:
    said, speaks = [], threading.Event()

    class Slow(Watch):
        def _sign(self) -> Sign:
            return Sign()

        def _say(self, sign: Sign) -> None:
            speaks.set()
            time.sleep(0.2)  # in a store, which is C++: Python may not end meanwhile
            said.append(sign)

    watch, stop = Slow(alone=True), threading.Event()
    thread = threading.Thread(target=_beat, args=(weakref.ref(watch), stop), daemon=True)
    thread.start()
    assert speaks.wait(10.0)
    end_beat(stop, thread)
    assert not thread.is_alive()
    assert len(said) == 1


def trainer_of(plan: Plan, timeout_s: float = 60.0) -> tuple[Trainer, dict[str, object]]:
    model, example, _ = make_model(runtime_models.llama, "float64", 0)
    captured = captured_of("llama", "float64")
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.SGD(params, lr=0.1), timeout_s=timeout_s)
    return trainer, dict(example)


def one_rank_differs(plan: Plan, kind: str) -> str:
    """What this rank is told where rank 1 does something else."""
    odd = dist.get_rank() == 1
    try:
        if kind == "plan" and odd:
            plan = replace(plan, notes=("another",))
        trainer, example = trainer_of(plan, timeout_s=8.0)
        batch = make_batch(example, 8, 0)
        trainer.step(batch)
        if kind == "hang" and odd:
            time.sleep(16)
        trainer.step(batch)
    except AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.processes
def test_ranks_with_other_plans_are_told(pool: LocalPool) -> None:
    for message in pool.run(one_rank_differs, plan_of("llama", "pp2_m2", "float64"), "plan", num_ranks=2):
        assert message.startswith("PlanMismatchError: rank 1 has another plan than rank 0") and "\n" not in message


@pytest.mark.processes
@pytest.mark.parametrize("name", ["pp2_m2", "tp2"])
def test_a_rank_that_hangs_is_named(pool: LocalPool, name: str) -> None:
    first, _ = pool.run(one_rank_differs, plan_of("llama", name, "float64"), "hang", num_ranks=2)
    assert first.startswith("RankFailedError: rank 1 hangs: it has not moved for") and "\n" not in first
    assert "in step 1 at test_failures.py" in first and "in one_rank_differs" in first


def dies(plan: Plan) -> None:
    trainer, example = trainer_of(plan)
    trainer.step(make_batch(example, 8, 0))
    if dist.get_rank() == 1:
        os._exit(3)
    try:
        trainer.step(make_batch(example, 8, 1))
    except RankFailedError as error:
        raise RuntimeError(f"survivor: {error}") from None  # not a user's mistake to the pool, which says who died


@pytest.mark.processes
def test_a_rank_that_dies_is_named(pool: LocalPool) -> None:
    began = time.monotonic()
    with pytest.raises(LocalRunError, match="rank 1, running dies: died with exit code 3") as caught:
        pool.run(dies, plan_of("llama", "pp2_m2", "float64"), num_ranks=2)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 60, "long before a timeout"


@pytest.mark.processes
def test_a_plan_for_another_number_of_processes_is_refused(pool: LocalPool) -> None:
    with pytest.raises(PlanMismatchError, match="is for 4 devices, and the job has 2 processes"):
        pool.run(only_compiles, plan_of("llama", "tp4", "float64"), num_ranks=2)


def only_compiles(plan: Plan) -> None:
    trainer_of(plan)


@pytest.mark.processes
def test_a_batch_of_another_shape_is_refused_on_every_rank_and_training_goes_on(pool: LocalPool) -> None:
    for message, loss in pool.run(wrong_then_right, plan_of("llama", "tp2", "float64"), num_ranks=2):
        assert "has shape [4, 16]; the plan takes [8, 16]" in message and "\n" not in message
        assert loss > 0


def wrong_then_right(plan: Plan) -> tuple[str, float]:
    trainer, example = trainer_of(plan)
    message = ""
    try:
        trainer.step(make_batch(example, 4, 0))
    except InputError as error:
        message = str(error)
    return message, trainer.step(make_batch(example, 8, 0)).item()
