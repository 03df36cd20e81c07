"""Rewrites of a layer's ops, and reshards on the other side of elementwise ops: taken where the modelled time is less.

Every case names real blocks at real sizes; the times of what was not taken are asserted too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from real_blocks import CONFIGS, captured

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.explain import explain
from autopar.search.intra_op import shard_class
from autopar.search.planner import PlanRequest, find_plan
from autopar.search.shardings import Choice, ShardingChooser, slowest_device, tp_group
from autopar.sharding.propagate import class_strategies
from autopar.sharding.rewrite import Rewrite, RewriteKind
from autopar.sharding.rewrites import apply_rewrite, candidates_of, rewritten
from autopar.sharding.state import R, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.class_costs import ClassCosts
from autopar.simulate.simulator import simulate

MACHINE = parse_cluster("8xH100-80GB")
MERGE, SHARE, SPLIT = RewriteKind.MERGE_LINEARS, RewriteKind.SHARE_INPUT, RewriteKind.SPLIT_LINEAR
MORE: dict[str, dict[str, Any]] = {
    "bert-base": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12, "vocab_size": 30522, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "cohere-8b": {
        "model_type": "cohere", "architectures": ["CohereForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "phi3-mini": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "pad_token_id": 0,
    },
}


@cache
def graph_of(name: str, seq_len: int) -> ModelGraph:
    CONFIGS.update(MORE)
    return captured(name, seq_len)


def layer_of(graph: ModelGraph) -> BlockClass:
    return graph.block_class[graph.blocks[1].cls]


def chosen(graph: ModelGraph, tp: int, rows: int) -> tuple[Choice, BlockCost]:
    """What the planner chooses, and what a layer then costs."""
    chooser = ShardingChooser(graph, MACHINE, "bfloat16", rows=rows, rewrites=True)
    choice = chooser.choose(tp, sequence_parallel=False)
    assert choice is not None
    changed = chooser.graph(tp, sequence_parallel=False)
    assert changed is rewritten(graph, choice.rewrites)
    return choice, cost_of(graph, layer_of(changed), tp, rows, choice.shardings)


def cost_of(
    graph: ModelGraph, cls: BlockClass, tp: int, rows: int, shardings: tuple[ClassSharding, ...] = ()
) -> BlockCost:
    """The cost of a block of a class, under its best sharding where none is given."""
    own = [choice for choice in shardings if choice.cls == cls.name]
    group = tp_group(MACHINE, tp) if tp > 1 else None
    costs = ClassCosts(
        graph, cls, tp=tp, rows=rows, device=slowest_device(MACHINE), tp_group=group, dtype="bfloat16"
    )
    if tp > 1 and not own:
        found = shard_class(cls, class_strategies(cls, tp), R, costs)
        assert found is not None
        own = [found]
    return block_cost(
        graph, cls, own, tp=tp, rows=rows, device=slowest_device(MACHINE), tp_group=group, dtype="bfloat16"
    )


def time_s(cost: BlockCost) -> float:
    return cost.forward_compute_s + cost.backward_compute_s + cost.forward_tp_comm_s + cost.backward_tp_comm_s


def after(cls: BlockClass, *rewrites: Rewrite) -> BlockClass:
    for rewrite in rewrites:
        cls = apply_rewrite(cls, rewrite)
    return cls


PAYS = [
    # Long sequences: adding up three gradients of 8192 x 4096 costs more than it takes to issue the op.
    ("llama-8b", 8192, 1, 1, [(SHARE, 3), (SHARE, 2)]),
    ("llama-8b", 8192, 8, 1, [(SHARE, 3), (SHARE, 2)]),
    # A small layer with many rows: its weights are laid together in less time than one wide product saves.
    ("bert-base", 512, 1, 24, [(MERGE, 3)]),
    # With more rows each product fills the device by itself, and laying the weights together saves nothing.
    ("bert-base", 512, 1, 32, [(SHARE, 3)]),
    # A fused weight of a long sequence: its results' gradients are not laid together again.
    ("phi3-mini", 8192, 1, 1, [(SPLIT, 1), (SPLIT, 1), (SHARE, 3), (SHARE, 2)]),
]


@pytest.mark.parametrize(("model", "seq_len", "tp", "rows", "kinds"), PAYS)
def test_a_rewrite_is_taken_where_it_pays(
    model: str, seq_len: int, tp: int, rows: int, kinds: list[tuple[RewriteKind, int]]
) -> None:
    graph = graph_of(model, seq_len)
    before = cost_of(graph, layer_of(graph), tp, rows)
    choice, cost = chosen(graph, tp, rows)
    assert sorted((item.kind, len(item.ops)) for item in choice.rewrites) == sorted(kinds)
    assert time_s(cost) < 0.995 * time_s(before)
    assert cost.saved_bytes <= before.saved_bytes * (1 + 1e-9)
    assert cost.forward_flops == pytest.approx(before.forward_flops)
    for i, rewrite in enumerate(choice.rewrites):  # every step was the best of all that applied
        cls = after(layer_of(graph), *choice.rewrites[:i])
        taken = time_s(cost_of(graph, after(cls, rewrite), tp, rows))
        assert taken < time_s(cost_of(graph, cls, tp, rows))
    assert len([note for note in choice.notes if note.startswith("rewritten: ")]) == len(kinds)


@pytest.mark.parametrize(("model", "seq_len", "tp", "rows"), [
    ("llama-8b", 256, 8, 1),  # the host cannot issue more ops in the time
    ("bert-base", 512, 1, 1),
    ("phi3-mini", 1024, 1, 1),  # the weight's gradient would be laid together at more cost than the results'
])
def test_no_rewrite_is_taken_where_none_pays(model: str, seq_len: int, tp: int, rows: int) -> None:
    graph = graph_of(model, seq_len)
    choice, cost = chosen(graph, tp, rows)
    assert choice.rewrites == ()
    found = candidates_of(layer_of(graph))
    assert found
    for rewrite in found:
        assert time_s(cost_of(graph, after(layer_of(graph), rewrite), tp, rows)) >= time_s(cost) * (1 - 1e-9)


def test_a_faster_rewrite_that_keeps_more_is_not_taken() -> None:
    """Of a merged product values are kept for the backward, and with them queries and keys, which else are not."""
    graph = graph_of("llama-8b", 8192)
    layer = layer_of(graph)
    merge = candidates_of(layer)[0]
    assert merge.kind is MERGE and len(merge.ops) == 3
    before, merged = (cost_of(graph, cls, 8, 1) for cls in (layer, after(layer, merge)))
    assert time_s(merged) < time_s(before)
    assert merged.saved_bytes > before.saved_bytes
    assert merge not in chosen(graph, 8, 1)[0].rewrites


def test_the_plan_holds_its_rewrites_and_is_slower_without() -> None:
    graph = graph_of("llama-8b", 8192)
    plan = find_plan(graph, MACHINE, PlanRequest(global_batch=32, seq_len=8192))
    assert plan.rewrites and {item.cls for item in plan.rewrites} == {layer_of(graph).name}
    assert sum(note.startswith("rewritten: self_attn.q_proj") for note in plan.notes) == 1
    assert plan.stages[0].mesh.tp == 1  # so that the same plan is one of the captured ops too
    step = simulate(graph, MACHINE, plan).step_time_s
    assert plan.certificate is not None and step == pytest.approx(plan.certificate.upper_bound_s)
    assert step < simulate(graph, MACHINE, replace(plan, rewrites=())).step_time_s


# -- reshards on the other side of elementwise ops -------------------------------------------------------------------

Keep = Callable[[Strategy], bool]


def objective_s(graph: ModelGraph, keep: dict[str, Keep], *, tp: int = 8) -> tuple[ClassSharding, float]:
    """The best sharding with hidden states split by sequence between blocks, where some ops keep some strategies."""
    cls, device, group = layer_of(graph), slowest_device(MACHINE), tp_group(MACHINE, tp)
    costs = ClassCosts(graph, cls, tp=tp, rows=1, device=device, tp_group=group, dtype="bfloat16")
    options = {
        name: [own for own in found if keep[name](own)] if name in keep else found
        for name, found in class_strategies(cls, tp).items()
    }
    choice = shard_class(cls, options, shard(1), costs)
    assert choice is not None
    cost = block_cost(graph, cls, choice, tp=tp, rows=1, device=device, tp_group=group, dtype="bfloat16")
    stored = zip(cls.params, choice.params, strict=True)
    return choice, time_s(cost) + sum(costs.param_time_s(name, state, num_micro_batches=1) for name, state in stored)


def test_a_gather_moves_behind_a_norm() -> None:
    """Llama: from the block's input, past its norm, which is one op, to the input of the projections."""
    graph = graph_of("llama-8b", 8192)
    cls = layer_of(graph)
    norm = [op.name for op in cls.ops if op.module == "input_layernorm"]
    assert len(norm) == 1
    free, best_s = objective_s(graph, {})
    assert all(free.strategy[name].outputs == (shard(1),) for name in norm)  # the gather comes after it
    before, forced_s = objective_s(graph, dict.fromkeys(norm, lambda own: not own.factor))
    assert not any(before.strategy[name].factor for name in norm)  # the block's input is gathered
    assert best_s < forced_s


def test_a_gather_moves_behind_the_elementwise_ops_of_a_norm() -> None:
    """Cohere: past a norm that is written out, eleven ops beside its weight's cast, to the input of the projections."""
    graph = graph_of("cohere-8b", 8192)
    cls = layer_of(graph)
    own = [op for op in cls.ops if op.module == "input_layernorm"]
    norm = [op.name for op in own if len(cls.tensor[op.outputs[0]].shape) == 3]
    assert len(norm) == 11
    free, best_s = objective_s(graph, {})
    assert all(free.strategy[name].outputs == (shard(1),) for name in norm)  # the gather comes after them
    before, forced_s = objective_s(graph, dict.fromkeys(norm, lambda own: not own.factor))
    assert not any(before.strategy[name].factor for name in norm)  # the block's input is gathered
    assert best_s < forced_s


def test_a_gather_moves_before_a_norm_where_its_input_is_needed_whole_too() -> None:
    """GPT-2: the norm's weights are then stored without a sum of their gradients, and the residual is whole anyway."""
    graph = graph_of("gpt2-7b", 2048)
    cls = layer_of(graph)
    norm = next(op.name for op in cls.ops if op.target == "aten.layer_norm.default")
    free, best_s = objective_s(graph, {})
    assert not free.strategy[norm].factor
    behind, forced_s = objective_s(graph, {norm: lambda own: own.outputs == (shard(1),)})
    assert behind.strategy[norm].outputs == (shard(1),)
    assert best_s < forced_s


def test_a_reduction_moves_before_the_residual_sum() -> None:
    """Llama: the second product's partial results are scattered before the sum with the residual, not after it."""
    graph = graph_of("llama-8b", 8192)
    cls = layer_of(graph)
    last = next(op for op in cls.ops if op.outputs[0] == cls.outputs[0])
    assert last.target == "aten.add.Tensor"
    free, best_s = objective_s(graph, {})
    assert free.strategy[last.name].inputs == (shard(1), shard(1))
    whole, forced_s = objective_s(graph, {last.name: lambda own: not own.factor})
    assert not whole.strategy[last.name].factor
    assert best_s < forced_s


def test_a_rewritten_block_is_explained() -> None:
    graph = graph_of("llama-8b", 8192)
    choice, _ = chosen(graph, 8, 1)
    degrees = Degrees(global_batch=8, seq_len=8192, tp=8)
    plan = plan_from_degrees(graph, MACHINE, degrees)
    plan = replace(plan, shardings=choice.shardings, rewrites=choice.rewrites)
    told = explain(graph, MACHINE, plan)
    assert [op.module for op in told.ops if op.target == "autopar.linears.default"] == ["self_attn", "mlp"]
    assert any(other.op == "linears" for other in told.alternatives)
