"""Sequences split through attention on two processes: queries against gathered keys, and all-to-all between heads.

The strategies are restricted, so that these tiny models are split as long sequences would be; the rest is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import runtime_models
from local_machines import slow_cluster
from test_parity import captured_of, graph_of, plan_of

from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.plan.plan import Plan, Recompute, is_layer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.intra_op import shard_class
from autopar.search.shardings import at_rows
from autopar.sharding.lowering import Lowering
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import Collective, conversion
from autopar.sharding.state import RP, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.class_costs import ClassCosts

pytestmark = pytest.mark.processes
SIZE = 2
QUERIES, HEADS = 2, 1  # dims of the scores and of attention's output


def restricted(cls: BlockClass, dim: int, ring: bool) -> Mapping[str, tuple[Strategy, ...]]:
    """Attention, fused or written out, splits only `dim` of its output, in a ring or not; no weight matrix is split."""
    kept = dict(class_strategies(cls, SIZE))
    for op in cls.ops:
        if any(word in op.target for word in ("attention", "softmax", "matmul")):
            kept[op.name] = tuple(
                s for s in kept[op.name]
                if s.outputs[0] == shard(dim) and (s.lowering == Lowering.RING_ATTENTION) is ring
            )
        weights = [i for i, name in enumerate(op.operands) if name in cls.params and len(cls.tensor[name].shape) == 2]
        if weights:
            kept[op.name] = tuple(s for s in kept[op.name] if s.factor and all(s.inputs[i] == RP for i in weights))
    return kept


def layer_sharding(graph: ModelGraph, cls: BlockClass, dim: int, ring: bool) -> ClassSharding:
    cluster = slow_cluster(SIZE)
    costs = ClassCosts(
        graph, cls, tp=SIZE, rows=4, device=cluster.nodes[0].device, tp_group=cluster.group((0, 1)), dtype="float64"
    )
    found = shard_class(cls, restricted(cls, dim, ring), shard(1), costs, parameter_weight=0.0)
    assert found is not None
    return found


def split_plan(model: str, dim: int, *, ring: bool = False) -> Plan:
    """The plan with sequence parallelism, its layers' attention split along `dim`, its keys in a ring or gathered."""
    plan, graph = plan_of(model, "tp2_sequence", "float64"), graph_of(model, "float64")
    layers = {block.cls for block in graph.blocks if is_layer(block.name)}
    found = {name: layer_sharding(graph, graph.block_class[name], dim, ring) for name in layers}
    shardings = at_rows(tuple(found.values()), graph, plan.micro_batch)
    of_layers = {choice.cls: choice for choice in shardings}
    return replace(plan, shardings=tuple(of_layers.get(choice.cls, choice) for choice in plan.shardings))


def moved(cls: BlockClass, choice: ClassSharding) -> set[Collective]:
    """The collectives on the operands of attention's products."""
    state = {name: s for op in cls.ops for name, s in zip(op.outputs, choice.strategy[op.name].outputs, strict=True)}
    found = set()
    for op in cls.ops:
        for name, wanted in zip(op.operands, choice.strategy[op.name].inputs, strict=True):
            if name in state and cls.tensor[name].requires_grad:
                step = conversion(state[name], wanted, differentiable=True)
                found |= {step.forward} if step and step.forward else set()
    return found


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt2_eager"])
def test_queries_are_split_against_gathered_keys_and_values(pool: LocalPool, model: str) -> None:
    plan, graph = split_plan(model, QUERIES), graph_of(model, "float64")
    choice = next(choice for choice in plan.shardings if is_layer_class(graph, choice.cls))
    assert moved(graph.block_class[choice.cls], choice) == {Collective.ALL_GATHER}
    lowerings = {strategy.lowering for _, strategy in choice.ops}
    assert (Lowering.CAUSAL_CONTEXT in lowerings) == (model != "gpt2_eager")
    report = compare(
        getattr(runtime_models, model), plan, steps=2, pool=pool, captured=captured_of(model, "float64")
    )
    assert report.passed, f"loss {report.loss_error:.1e}, {report.worst}"


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt2_eager"])
def test_heads_are_exchanged_for_the_sequence(pool: LocalPool, model: str) -> None:
    plan, graph = split_plan(model, HEADS), graph_of(model, "float64")
    choice = next(choice for choice in plan.shardings if is_layer_class(graph, choice.cls))
    assert moved(graph.block_class[choice.cls], choice) == {Collective.ALL_TO_ALL}
    report = compare(
        getattr(runtime_models, model), plan, steps=2, pool=pool, captured=captured_of(model, "float64")
    )
    assert report.passed, f"loss {report.loss_error:.1e}, {report.worst}"


@pytest.mark.parametrize("dim", [QUERIES, HEADS])
def test_attention_is_recomputed_with_its_exchanges(pool: LocalPool, dim: int) -> None:
    plan = split_plan("llama", dim)
    stages = tuple(replace(stage, recompute=Recompute.SELECTIVE) for stage in plan.stages)
    report = compare(runtime_models.llama, replace(plan, stages=stages), steps=2, pool=pool)
    assert report.passed, f"loss {report.loss_error:.1e}, {report.worst}"


def is_layer_class(graph: ModelGraph, name: str) -> bool:
    return any(block.cls == name and is_layer(block.name) for block in graph.blocks)
