"""Stopping at a loss that is not finite, metrics in the log, weights read from files, and seeds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import runtime_models
import torch
from safetensors.torch import save_file
from test_parity import captured_of, plan_of
from torch import Tensor

import autopar
from autopar.errors import InputError, NotFiniteError
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, make_model
from autopar.runtime.weights import WeightFiles
from autopar.sharding.state import R


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def stops(plan: Plan) -> tuple[str, bool]:
    """What is said where a weight is NaN, and whether the others are as they were."""
    model, example, _ = make_model(runtime_models.llama, "float64", 0)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
    trainer = Trainer(model, plan, captured_of("llama", "float64"), sgd, stop_on_nan=True)
    before = {name: value.clone() for name, value in trainer.full_state_dict().items()}
    try:
        trainer.step(make_batch(example, 8, 0))
    except NotFiniteError as error:
        after = trainer.full_state_dict()
        return str(error), all(torch.equal(after[n], v) for n, v in before.items() if not v.isnan().any())
    return "", False


@pytest.mark.processes
def test_every_rank_stops_at_a_loss_that_is_not_finite(pool: LocalPool) -> None:
    for message, unchanged in pool.run(stops, plan_of("llama", "tp2xpp2_m2", "float64"), num_ranks=4):
        assert message.startswith("the loss is nan in step 1") and "\n" not in message
        assert unchanged


def measured(plan: Plan) -> tuple[list[str], Any]:
    model, example, _ = make_model(runtime_models.llama, "float64", 0)
    lines: list[str] = []
    logger, handler = logging.getLogger("autopar.training"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    trainer = Trainer(
        model, plan, captured_of("llama", "float64"), sgd, log_every=2, peak_flops=1e12
    )
    for step in range(5):
        trainer.step(make_batch(example, 8, step))
    logger.removeHandler(handler)
    return lines, trainer.metrics.last


@pytest.mark.processes
def test_metrics_go_to_the_log_of_rank_0(pool: LocalPool) -> None:
    (lines, last), (others, same) = pool.run(measured, plan_of("llama", "tp2", "float64"), num_ranks=2)
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"] and others == []
    assert last.tokens_per_s == pytest.approx(8 * runtime_models.LENGTH / last.step_time_s)
    weights = sum(p.numel() for n, p in runtime_models.llama()[0].named_parameters() if p.dim() == 2)
    least = 6 * weights * 8 * runtime_models.LENGTH  # 6 FLOPs a weight and token; attention comes on top
    assert least < last.mfu * 1e12 * last.step_time_s < 1.3 * least
    assert last.peak_memory_bytes == same.peak_memory_bytes > 2**20
    assert "tokens/s, MFU" in lines[0] and "peak memory" in lines[0]


# -- weights


def read_from(plan: Plan, folder: str, model_name: str) -> tuple[list[float], dict[str, Tensor]]:
    factory = getattr(runtime_models, model_name)
    captured = captured_of(model_name, "float64")
    torch.manual_seed(77)
    with autopar.empty_parameters():
        model = factory()[0]
    assert all(param.is_meta for param in model.parameters())
    example = runtime_models.causal_batch()
    trainer = Trainer(model, plan, captured, sgd, weights=folder)
    state = trainer.full_state_dict()
    return [trainer.step(make_batch(example, 8, step)).item() for step in range(2)], state


def start_with(plan: Plan, model_name: str) -> list[float]:
    model, example, _ = make_model(getattr(runtime_models, model_name), "float64", 0)
    trainer = Trainer(model, plan, captured_of(model_name, "float64"), sgd)
    return [trainer.step(make_batch(example, 8, step)).item() for step in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize(("model", "name"), [("llama", "fsdp2xtp2"), ("gpt2", "tp2xpp2_m2"), ("gpt2_uneven", "tp4")])
def test_weights_are_read_part_by_part(pool: LocalPool, tmp_path: Path, model: str, name: str) -> None:
    """From two files with an index, into a model without data; tied ones are there under one of their names."""
    whole = make_model(getattr(runtime_models, model), "float64", 0)[0].state_dict()
    stored = {key: value.clone() for key, value in whole.items() if key != "lm_head.weight"}
    keys = sorted(stored)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for file, own in parts.items():
        save_file({key: stored[key].contiguous() for key in own}, tmp_path / file)
    import json

    index = {"weight_map": {key: file for file, own in parts.items() for key in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_of(model, name, "float64")
    losses, state = pool.run(read_from, plan, str(tmp_path), model, num_ranks=4)[0]
    assert all(torch.equal(state[key], value) for key, value in whole.items())
    assert losses == pool.run(start_with, plan, model, num_ranks=4)[0]


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        WeightFiles(tmp_path)
    save_file({"w": torch.ones(3, 2)}, tmp_path / "x.safetensors")
    files = WeightFiles(tmp_path)
    assert torch.equal(files.part(["missing", "w"], (3, 2), R, None), torch.ones(3, 2))
    with pytest.raises(InputError, match="has no weight v; it has w"):
        files.part(["v"], (3, 2), R, None)
    with pytest.raises(InputError, match=r"w in .* is of shape \[3, 2\]; the model's is \[2, 3\]"):
        files.part(["w"], (2, 3), R, None)
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-8])
    with pytest.raises(InputError, match="is no safetensors file"):
        WeightFiles(tmp_path)


# -- seeds


def with_dropout(plan: Plan, seed: int) -> list[float]:
    captured = captured_of("gpt2_dropout", "float64")  # made once a process, from random numbers of its own
    torch.manual_seed(seed if torch.distributed.get_rank() == 0 else 99)  # rank 0's seed counts
    model, example, _ = runtime_models.gpt2_dropout()
    trainer = Trainer(model.double(), plan, captured, sgd)
    return [trainer.step(make_batch(example, 8, step)).item() for step in range(3)]


@pytest.mark.processes
def test_a_seed_decides_every_random_number(pool: LocalPool) -> None:
    plan = plan_of("gpt2_dropout", "fsdp2xtp2", "float64")
    first, again, other = (pool.run(with_dropout, plan, seed, num_ranks=4) for seed in (1, 1, 2))
    assert first == again and first[0] == first[3]
    assert first[0] != other[0]
