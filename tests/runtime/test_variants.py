"""Layers that recompute or offload run to the same gradients, and keep what the cost model says they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import runtime_models
import torch
from fused_norm import one_kernel
from local_machines import slow_cluster
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopar.cluster.tables import device_type
from autopar.errors import InputError
from autopar.graph.capture import Captured
from autopar.plan.plan import Plan, Recompute, Variant, is_layer
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, compare, distributed_numbers, relative_error
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.attention_core import attention_cores
from autopar.simulate.block_cost import block_cost
from autopar.simulate.recomputed import early_stop
from autopar.simulate.variant_cost import variant_cost

NONE, SELECTIVE, FULL = (Variant(recompute=word) for word in Recompute)
AWAY = Variant(offload=True)
FULL_AWAY = Variant(recompute=Recompute.FULL, offload=True)
SELECTIVE_AWAY = Variant(recompute=Recompute.SELECTIVE, offload=True)
MODELS = {
    "gpt2": runtime_models.gpt2, "gpt2_eager": runtime_models.gpt2_eager_dropout, "llama": runtime_models.llama,
    "llama_eager": runtime_models.llama_eager, "gpt2_plain": runtime_models.gpt2_eager,
}


@cache
def captured(model: str) -> Captured:
    return capture_for(MODELS[model], "float64")


def plan_of(model: str, variants: Sequence[Variant], *, optimizer: str = "sgd", offload_optimizer: bool = False,
            **degrees: Any) -> Plan:
    """A plan whose layers, over all stages, take these variants in order."""
    size = degrees.get("dp_shard", 1) * degrees.get("tp", 1) * degrees.get("pp", 1)
    given = Degrees(global_batch=8, dtype="float64", param_dtype="float64", optimizer=optimizer, **degrees)
    plan = plan_from_degrees(captured(model).graph, slow_cluster(size), given)
    rest, stages = list(variants), []
    for stage in plan.stages:
        own = plan.num_layers(stage)
        stages.append(replace(stage.with_variants(rest[:own]), offload_optimizer=offload_optimizer))
        rest = rest[own:]
    return replace(plan, stages=tuple(stages))


def trainer_of(model: str, plan: Plan, optimizer: Any = None) -> tuple[Trainer, dict[str, Tensor], torch.nn.Module]:
    torch.manual_seed(5)
    module, batch, _ = MODELS[model]()
    module = module.double()
    chosen = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1))
    return Trainer(module, plan, captured(model), chosen, device="cpu"), batch, module


def gradients(model: str, variants: Sequence[Variant]) -> tuple[float, dict[str, Tensor]]:
    trainer, batch, _ = trainer_of(model, plan_of(model, variants, micro_batch=4))
    torch.manual_seed(11)
    loss = trainer.forward_backward(batch).item()
    return loss, trainer.full_gradients()


@pytest.mark.parametrize("model", ["gpt2_eager", "llama_eager", "llama"])
@pytest.mark.parametrize("variants", [
    (SELECTIVE, SELECTIVE), (FULL, SELECTIVE), (AWAY, NONE), (FULL_AWAY, AWAY), (SELECTIVE_AWAY, SELECTIVE),
], ids=lambda pair: "+".join(map(str, pair)))
def test_gradients_are_those_of_keeping_everything(model: str, variants: tuple[Variant, ...]) -> None:
    """With dropout in gpt2_eager: the same random numbers come again."""
    loss, expected = gradients(model, (NONE, NONE))
    again, found = gradients(model, variants)
    assert again == pytest.approx(loss, rel=1e-12)
    assert found.keys() == expected.keys()
    worst = max(relative_error(found[name], value) for name, value in expected.items())
    assert worst < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
def test_recomputed_cores_compile_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout; torch.compile's own backends differ in rounding, aot_eager does not."""
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    numbers = []
    for compile_ in (False, True):
        monkeypatch.setattr(torch, "compile", compiled)
        plan = replace(plan_of("gpt2_eager", (SELECTIVE_AWAY, SELECTIVE), micro_batch=4), compile=compile_)
        trainer, batch, _ = trainer_of("gpt2_eager", plan)
        torch.manual_seed(3)
        loss = trainer.forward_backward(batch).item()
        numbers.append((loss, trainer.full_gradients()))
    assert numbers[0][0] == numbers[1][0]
    assert all(relative_error(numbers[1][1][name], value) < 1e-12 for name, value in numbers[0][1].items())


def test_dropout_is_really_on() -> None:
    trainer, batch, _ = trainer_of("gpt2_eager", plan_of("gpt2_eager", (SELECTIVE, FULL), micro_batch=4))
    assert trainer.forward_backward(batch).item() != trainer.forward_backward(batch).item()


def kept_bytes(model: str, variants: Sequence[Variant]) -> tuple[float, float]:
    """Bytes of distinct storages that autograd keeps on the device, and in host memory, after one forward."""
    trainer, batch, _ = trainer_of(model, plan_of(model, variants, micro_batch=8))
    (stage,) = trainer.stages
    skip = {t.untyped_storage()._cdata for t in (*stage.module.parameters(), *stage.module.buffers(), *batch.values())}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.untyped_storage()._cdata not in skip and (tensor.requires_grad or tensor.grad_fn is not None):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    rows = trainer.batch.micro_batches(batch, trainer.plan.stages[0], 0, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), one_kernel():
        produced = stage.module({**rows[0]}, trainer._factors(rows))
    offloader = stage.module._autopar_offloader
    host = 0 if offloader is None else offloader.host_bytes()
    with one_kernel():
        produced[captured(model).graph.loss].backward()
    assert offloader is None or offloader.host_bytes() == 0, "the backward gives host memory back"
    return sum(storages.values()), host


def predicted_bytes(model: str, variants: Sequence[Variant]) -> tuple[float, float]:
    graph, rest = captured(model).graph, iter(variants)
    held = host = 0.0
    for block in graph.blocks:
        cost = block_cost(
            graph, graph.block_class[block.cls], None, tp=1, rows=8, device=device_type("H100-80GB"), tp_group=None,
            dtype="float64",
        )
        found = variant_cost(cost, next(rest) if is_layer(block.name) else NONE, device_type("H100-80GB"))
        held, host = held + found.held_bytes, host + found.host_bytes
    return held, host


def executed_flops(model: str, variants: Sequence[Variant]) -> float:
    """Of the products of one micro-batch, forward and backward, with what is recomputed."""
    trainer, batch, _ = trainer_of(model, plan_of(model, variants, micro_batch=8))
    with FlopCounterMode(display=False) as counter:
        trainer.forward_backward(batch)
    return float(counter.get_total_flops())


def flops_again(model: str, variant: Variant) -> float:
    """Of what runs again in a layer where recomputation stops as the cost model has it."""
    graph = captured(model).graph
    cls = graph.block_class[next(block.cls for block in graph.blocks if is_layer(block.name))]
    total = 0.0
    for names in ([op.name for op in cls.ops],) if variant == FULL else (core.ops for core in attention_cores(cls)):
        ops = [op for op in cls.ops if op.name in names]
        stop = early_stop(ops, lambda op: True)
        end = [op.name for op in ops].index(stop.op) + stop.runs
        total += sum(op.flops for op in ops[:end])
    return total * 8 / graph.rows


@pytest.mark.parametrize("model", ["llama_eager", "gpt2_plain"])
@pytest.mark.parametrize("variant", [FULL, SELECTIVE], ids=str)
def test_recomputation_stops_where_it_is_counted_to(model: str, variant: Variant) -> None:
    """A layer's last product, or a core's, is not computed again: it gives nothing that the backward reads."""
    more = executed_flops(model, (variant, NONE)) - executed_flops(model, (NONE, NONE))
    assert more == pytest.approx(flops_again(model, variant))


@pytest.mark.parametrize("model", ["llama_eager", "gpt2_plain"])
def test_saved_bytes_are_the_predicted_ones(model: str) -> None:
    base, least = None, float("inf")
    for variants in ((NONE, NONE), (SELECTIVE, NONE), (SELECTIVE, SELECTIVE), (FULL, SELECTIVE), (FULL, FULL),
                     (FULL_AWAY, AWAY)):
        held, host = kept_bytes(model, variants)
        expected, expected_host = predicted_bytes(model, variants)
        base = base or (held, expected)
        assert held < least
        least = held
        assert host == pytest.approx(expected_host, rel=0.05)
        # What is dropped, against what the cost model says is dropped.
        assert base[0] - held == pytest.approx(base[1] - expected, rel=0.05)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_offloaded_optimizer_steps_alike(kind: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(lr=0.05, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    losses, states = [], []
    for offloaded in (False, True):
        plan = plan_of("llama", (NONE, NONE), micro_batch=4, offload_optimizer=offloaded)
        trainer, batch, module = trainer_of("llama", plan, lambda params: kind(params, **settings))
        losses.append([trainer.step(batch).item() for _ in range(3)])
        states.append(trainer.full_state_dict())
        if offloaded:
            assert trainer.offloaded_state is not None
            per_param = 16 if kind is torch.optim.AdamW else 8
            assert trainer.offloaded_state.host_bytes() == per_param * sum(p.numel() for p in module.parameters())
            held = [v for state in trainer.optimizer.state.values() for v in state.values() if v.dim()]
            assert held and all(value.untyped_storage().nbytes() == 0 for value in held)
        trainer.save(tmp_path / str(offloaded))
        losses[-1] += [trainer.step(batch).item()]
        for source in (False, True):
            if (tmp_path / str(source)).exists():
                trainer.load(tmp_path / str(source))
                losses[-1] += [trainer.step(batch).item()]
    assert losses[0][:4] == losses[1][:4]
    assert len({*losses[0][3:], *losses[1][3:]}) == 1
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Mixing(torch.optim.Optimizer):
    """Steps all parameters by one number of them all."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def test_an_optimizer_that_mixes_parameters_is_not_offloaded() -> None:
    with pytest.raises(InputError, match="Mixing is none: plan without offload"):
        trainer_of("llama", plan_of("llama", (NONE, NONE), micro_batch=8, offload_optimizer=True), Mixing)


@pytest.mark.processes
@pytest.mark.parametrize(("model", "variants", "degrees"), [
    ("gpt2", (FULL, SELECTIVE), dict(dp_shard=2, zero=3, micro_batch=2)),
    ("llama_eager", (FULL_AWAY, SELECTIVE), dict(tp=2, micro_batch=4)),
    ("llama_eager", (AWAY, SELECTIVE), dict(pp=2, micro_batch=2)),
    ("gpt2", (SELECTIVE_AWAY, AWAY), dict(dp_shard=2, zero=2, micro_batch=2, offload_optimizer=True)),
], ids=["zero3", "tp2", "pp2", "zero2"])
def test_parity_with_one_process(
    pool: LocalPool, model: str, variants: tuple[Variant, ...], degrees: dict[str, Any]
) -> None:
    plan = plan_of(model, variants, **degrees)
    report = compare(MODELS[model], plan, steps=2, pool=pool, captured=captured(model))
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    assert "selective" in report.plan_summary


@pytest.mark.processes
def test_random_numbers_come_again_on_a_split_axis(pool: LocalPool) -> None:
    numbers = []
    for variants in ((NONE, NONE), (SELECTIVE, AWAY)):
        plan = plan_of("gpt2_eager", variants, tp=2, micro_batch=4)
        numbers.append(pool.run(
            distributed_numbers, MODELS["gpt2_eager"], plan, "float64", 1, 0, captured("gpt2_eager"), num_ranks=2
        )[0])
    for name, value in numbers[0].gradients[0].items():
        assert relative_error(numbers[1].gradients[0][name], value) < 1e-12
