"""Training on one CUDA device: one process's numbers, with every memory technique, and what the profiler measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import autopar
from autopar.cluster.local import local_cluster
from autopar.graph.capture import capture
from autopar.plan.plan import Recompute
from autopar.runtime.engine import Trainer
from autopar.search.degrees import Degrees, plan_from_degrees

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Torch's compiler, about torch: what it imports, and what it reads of inputs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

ROWS, LENGTH = 4, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two micro-batches": {"micro_batch": ROWS // 2},
    "recompute": {"recompute": Recompute.FULL},
    "selective recompute": {"recompute": Recompute.SELECTIVE},
    "offloaded activations": {"offload_activations": True},
    "offloaded optimizer": {"offload_optimizer": True},
    "compiled": {"compile": True},
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config: Any
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=128, n_head=4, vocab_size=512, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def make_batch(device: str = "cpu") -> dict[str, Tensor]:
    ids = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def trainer_of(family: str, dtype: str = "float32", optimizer: Any = sgd, **degrees: Any) -> Trainer:
    """A trainer on the CUDA device. Parameters rest in float32."""
    model, batch = make_model(family), make_batch()
    graph = capture(model, batch, tag_rows=True, dtype=dtype).graph
    plan = plan_from_degrees(graph, local_cluster(1), Degrees(
        global_batch=ROWS, dtype=dtype, param_dtype="float32", **{"micro_batch": ROWS, **degrees}
    ))
    return autopar.parallelize(model, batch, optimizer, plan=plan)


def plain_gradients(family: str) -> tuple[float, dict[str, Tensor]]:
    model = make_model(family).cuda()
    loss = model(**make_batch("cuda")).loss
    loss.backward()
    return loss.item(), {name: param.grad.cpu() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_losses_and_gradients_are_those_of_plain_pytorch(family: str, option: str) -> None:
    expected, gradients = plain_gradients(family)
    trainer = trainer_of(family, **OPTIONS[option])
    loss = trainer.forward_backward(make_batch())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, found in trainer.full_gradients().items():
        if name in gradients:
            error = (found - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-12)
            assert error < 1e-4, (name, error)
    trainer.close()


@pytest.mark.parametrize("option", ["plain", "two micro-batches", "recompute", "offloaded optimizer", "compiled"])
def test_training_in_bfloat16_follows_float32(option: str) -> None:
    """Three steps of AdamW with float32 master weights: FSDP2 over NCCL on one device."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of("llama", dtype, adamw, **(OPTIONS[option] if dtype == "bfloat16" else {}))
        losses[dtype] = [trainer.step(make_batch()).item() for _ in range(4)]
        assert {param.dtype for param in trainer.named_parameters().values()} == {torch.float32}
        trainer.close()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]


def test_checkpoints_clipping_evaluation_and_traces(tmp_path: Path) -> None:
    trainer = trainer_of("gpt2", "bfloat16", adamw)
    trainer.step(make_batch())
    trainer.save(tmp_path / "saved")
    trainer.forward_backward(make_batch())
    norm = trainer.clip_gradients(0.1)
    trainer.optimizer_step()
    following = trainer.evaluate(make_batch()).item()
    assert norm > 0.1
    with trainer.trace(tmp_path / "trace.json"):
        trainer.step(make_batch())
    assert (tmp_path / "trace.json").stat().st_size > 0
    trainer.load(tmp_path / "saved")
    trainer.forward_backward(make_batch())
    trainer.clip_gradients(0.1)
    trainer.optimizer_step()
    assert trainer.evaluate(make_batch()).item() == pytest.approx(following, rel=1e-3)
    trainer.close()


def test_offloading_keeps_optimizer_state_in_host_memory() -> None:
    trainer = trainer_of("llama", "float32", adamw, offload_optimizer=True)
    trainer.step(make_batch())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()
              if isinstance(value, Tensor) and value.dim() > 0]
    assert states and all(not value.is_cuda or value.untyped_storage().size() == 0 for value in states)
    trainer.close()


def test_the_planner_plans_for_the_device_at_hand() -> None:
    trainer = autopar.parallelize(make_model("gpt2"), make_batch(), adamw, dtype="bf16", log_every=1)
    first = trainer.step(make_batch()).item()
    for _ in range(3):
        last = trainer.step(make_batch()).item()
    assert last < first
    assert trainer.metrics.last is not None and trainer.metrics.last.peak_memory_bytes > 0
    trainer.close()


def test_the_profiler_measures_the_device() -> None:
    from autopar.profiler import profile_local
    from autopar.profiler.op_cases import grid_cases

    cases = [case for case in grid_cases("bfloat16", device_type="cuda") if "linear" in case.target][:2]
    dtypes = ("float32", "bfloat16")
    profile = profile_local(1, budget_s=1.0, dtypes=dtypes, device="cuda", date="2026-01-01", cases=cases)
    cluster = profile.apply(local_cluster(1))
    assert len(profile.ops.samples) == len(cases)
    for sample in profile.ops.samples:
        assert 0 < sample.forward_s < 0.1 and 0 < sample.backward_s < 0.1
    assert cluster.device(0).peak("bfloat16") > 1e13
