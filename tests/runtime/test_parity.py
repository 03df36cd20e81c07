"""Every plan's loss and gradients against one process: float64 to 1e-9 relative, float32 to 1e-4."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import runtime_models
from local_machines import slow_cluster

from autopar.graph.capture import Captured
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Recompute, Schedule, is_layer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, compare, distributed_numbers, relative_error
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.state import Kind, R, shard

pytestmark = pytest.mark.processes

FULL = Recompute.FULL
DEGREES: dict[str, dict[str, Any]] = {
    "dp2": dict(dp_replicate=2, micro_batch=2),
    "fsdp2_zero1": dict(dp_shard=2, zero=1, micro_batch=2),
    "fsdp2_zero2": dict(dp_shard=2, zero=2, micro_batch=2),
    "fsdp2_zero3": dict(dp_shard=2, zero=3, micro_batch=2, recompute=FULL),
    "hsdp2x2": dict(dp_replicate=2, dp_shard=2, zero=2, micro_batch=1),
    "tp2": dict(tp=2, micro_batch=8, recompute=FULL),
    "tp2_sequence": dict(tp=2, sequence_parallel=True, micro_batch=4, recompute=FULL),
    "tp4": dict(tp=4, micro_batch=8),
    "pp2_m2": dict(pp=2, micro_batch=4, recompute=FULL),
    "pp2_m4": dict(pp=2, micro_batch=2),
    "pp2_gpipe": dict(pp=2, micro_batch=2, schedule=Schedule.GPIPE),
    "dp2xtp2": dict(dp_replicate=2, tp=2, micro_batch=2),
    "fsdp2xtp2": dict(dp_shard=2, zero=3, tp=2, micro_batch=2, recompute=FULL),
    "tp2xpp2_m2": dict(tp=2, pp=2, micro_batch=4, sequence_parallel=True, recompute=FULL),
    "tp2xpp2_m4": dict(tp=2, pp=2, micro_batch=2),
    "pp2xdp2_m2": dict(pp=2, dp_replicate=2, micro_batch=2),
    "pp2xdp2_m4": dict(pp=2, dp_replicate=2, micro_batch=1, recompute=FULL),
    "pp2xfsdp2_zero1": dict(pp=2, dp_shard=2, zero=1, micro_batch=1),
    "pp2xfsdp2_zero3": dict(pp=2, dp_shard=2, zero=3, micro_batch=1),
}
REQUIRED = ("dp2", "fsdp2_zero3", "tp2", "tp2_sequence", "pp2_m2", "pp2_m4", "dp2xtp2", "fsdp2xtp2", "tp2xpp2_m2",
            "tp2xpp2_m4", "pp2xdp2_m4")


@cache
def captured_of(model: str, dtype: str) -> Captured:
    """The model captured once a session; capturing costs more than a plan's steps, and every rank would do it."""
    return capture_for(getattr(runtime_models, model), dtype)


def graph_of(model: str, dtype: str) -> ModelGraph:
    return captured_of(model, dtype).graph


def plan_of(model: str, name: str, dtype: str) -> Plan:
    degrees = DEGREES[name]
    size = 1
    for axis in ("tp", "pp", "dp_replicate", "dp_shard"):
        size *= degrees.get(axis, 1)
    wanted = Degrees(global_batch=8, dtype=dtype, param_dtype=dtype, optimizer="sgd", **degrees)
    cluster = slow_cluster(size)
    plan = plan_from_degrees(graph_of(model, dtype), cluster, wanted)
    assert_splits(graph_of(model, dtype), plan)
    return plan


def num_split(plan: Plan) -> int:
    """How many parameters of the block classes are stored in shards of the tensor axis."""
    return sum(state.kind is Kind.SHARDED for choice in plan.shardings for state in choice.params)


def assert_splits(graph: ModelGraph, plan: Plan) -> None:
    """A tensor axis of these plans splits weights and products of every layer, and hidden states where it is asked."""
    if plan.stages[0].mesh.tp == 1:
        return
    layers = {block.cls for block in graph.blocks if is_layer(block.name)}
    for name in layers:
        choice, cls = plan.sharding[name], graph.block_class[name]
        products = [op for op in cls.ops if op.flops and cls.tensor[op.outputs[0]].requires_grad and
                    any(operand in cls.params for operand in op.operands)]
        whole = [op.name for op in products if not choice.strategy[op.name].factor]
        assert products and not whole, f"{name} repeats {whole}"
        matrices = [s for s, p in zip(choice.params, cls.params, strict=True) if len(cls.tensor[p].shape) == 2]
        assert sum(state.kind is Kind.SHARDED for state in matrices) >= 0.7 * len(matrices), f"{name}: {matrices}"
        expected = shard(1) if plan.sequence_parallel else R
        assert expected in choice.inputs and choice.outputs == (expected,)


def check(pool: LocalPool, model: str, name: str, dtype: str, steps: int = 2) -> None:
    report = compare(
        getattr(runtime_models, model), plan_of(model, name, dtype), steps=steps, pool=pool,
        captured=captured_of(model, dtype),
    )
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    assert report.loss_error <= report.tolerance
    assert len(report.gradient_errors) == len(graph_of(model, dtype).params)
    assert len(report.losses) == steps


@pytest.mark.parametrize("name", DEGREES)
def test_gpt2_in_float64(pool: LocalPool, name: str) -> None:
    check(pool, "gpt2", name, "float64")


def hash_of_a_word() -> int:
    return hash("a word")


def test_ranks_need_no_common_hash_seed() -> None:
    """Interpreters of their own, as torchrun starts them; those of `pool` are forked from one."""
    with LocalPool(4, preloaded=False) as pool:
        assert len(set(pool.run(hash_of_a_word))) == 4
        for model, name in (("gpt2", "tp2xpp2_m2"), ("llama", "fsdp2xtp2"), ("llama", "pp2xfsdp2_zero3")):
            check(pool, model, name, "float64")


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("model", ["llama", "llama_untied"])
def test_llama_in_float64(pool: LocalPool, model: str, name: str) -> None:
    check(pool, model, name, "float64")


@pytest.mark.parametrize("name", ["fsdp2_zero2", "tp2_sequence", "fsdp2xtp2", "pp2xdp2_m4"])
@pytest.mark.parametrize("model", ["gpt2", "llama", "llama_untied"])
def test_float32(pool: LocalPool, model: str, name: str) -> None:
    check(pool, model, name, "float32")


@pytest.mark.parametrize("name", ["fsdp2_zero3", "tp2_sequence", "pp2xfsdp2_zero1"])
def test_bfloat16_keeps_the_loss_and_nearly_the_gradients(pool: LocalPool, name: str) -> None:
    plan = replace(plan_of("llama", name, "float32"), dtype="bfloat16")
    assert (num_split(plan) > 0) == (plan.stages[0].mesh.tp > 1)
    report = compare(runtime_models.llama, plan, pool=pool)
    assert report.loss_error < 1e-3
    assert report.worst[1] < 2e-2


@pytest.mark.parametrize("name", ["tp2", "tp2_sequence", "fsdp2_zero3", "tp2xpp2_m4"])
def test_recomputation_repeats_the_random_numbers(pool: LocalPool, name: str) -> None:
    once = plan_of("gpt2_dropout", name, "float64")
    numbers = []
    for recompute in (Recompute.NONE, Recompute.FULL):
        plan = replace(once, stages=tuple(replace(stage, recompute=recompute) for stage in once.stages))
        args = (runtime_models.gpt2_dropout, plan, "float64", 2, 0, captured_of("gpt2_dropout", "float64"))
        numbers.append(pool.run(distributed_numbers, *args, num_ranks=plan.num_devices)[0])
    assert numbers[0].losses == pytest.approx(numbers[1].losses, rel=1e-12)
    for kept, repeated in zip(numbers[0].gradients, numbers[1].gradients, strict=True):
        assert kept.keys() == repeated.keys()
        assert max(relative_error(repeated[key], kept[key]) for key in kept) < 1e-12
