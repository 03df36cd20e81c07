"""On real blocks the search finds expert parallelism where hidden states are split along the sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cluster.parse import parse_cluster
from autopar.cost_models.collectives import collective_time_s
from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.verify import verify_plan
from autopar.search.intra_op import shard_class
from autopar.search.planner import Degrees, plan_from_degrees
from autopar.sharding.lowering import Lowering
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import Collective
from autopar.sharding.state import shard
from autopar.sharding.strategy import Strategy
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import ClassCosts

CLUSTER = parse_cluster("8xH100-80GB")
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2,
        "vocab_size": 32000, "max_position_embeddings": 4096, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_hidden_layers": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelGraph]:
    found = {}
    few = {"qwen3_moe_of_4": {**CONFIGS["qwen3_moe"], "num_experts_per_tok": 4}}
    for name, config in (CONFIGS | few).items():
        folder: Path = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = capture_source(load_source(str(folder), seq_len=2048, dtype="bfloat16"))
    return found


def experts_choice(graph: ModelGraph, tp: int, *, sequence_parallel: bool) -> Strategy:
    plan = plan_from_degrees(graph, CLUSTER, Degrees(
        global_batch=32, micro_batch=4, tp=tp, dp_replicate=8 // tp, sequence_parallel=sequence_parallel,
    ))
    verify_plan(plan, graph, CLUSTER)
    cls = graph.block_class[graph.blocks[1].cls]
    (op,) = (op for op in cls.ops if op.target == EXPERTS_OP)
    return plan.sharding[cls.name].strategy[op.name]


@pytest.mark.parametrize(("name", "tp"), [("mixtral", 2), ("mixtral", 4), ("mixtral", 8), ("qwen3_moe_of_4", 8)])
def test_tokens_are_exchanged_where_the_sequence_is_split(graphs: dict[str, ModelGraph], name: str, tp: int) -> None:
    choice = experts_choice(graphs[name], tp, sequence_parallel=True)
    assert choice.lowering == Lowering.EXPERT_EXCHANGE
    assert choice.inputs == (*(shard(0, 4),) * 3, *(shard(0),) * 2)  # 4 rows of tokens, each split; then the experts
    assert choice.outputs[0] == shard(0, 4)


@pytest.mark.parametrize(("name", "tp", "sequence_parallel"), [
    ("mixtral", 8, False),  # every rank has every token
    ("qwen3_moe", 4, True),  # 8 choices over 4 ranks: to gather the tokens moves less than to exchange the choices
    ("qwen3_moe", 8, True),  # 8 choices over 8 ranks: as much moves, and an exchange takes longer for it than a gather
])
def test_whole_tokens_keep_to_their_experts_where_that_moves_less(
    graphs: dict[str, ModelGraph], name: str, tp: int, sequence_parallel: bool
) -> None:
    assert experts_choice(graphs[name], tp, sequence_parallel=sequence_parallel).lowering == Lowering.OWN_EXPERTS


def test_every_other_way_is_dearer_and_the_exchange_is_in_the_price(graphs: dict[str, ModelGraph]) -> None:
    graph, tp = graphs["mixtral"], 8
    cls = graph.block_class[graph.blocks[1].cls]
    (op,) = (op for op in cls.ops if op.target == EXPERTS_OP)
    group = CLUSTER.group(tuple(range(tp)))
    device = CLUSTER.nodes[0].device
    costs = ClassCosts(graph, cls, tp=tp, rows=4, device=device, tp_group=group, dtype="bfloat16")
    every = dict(class_strategies(cls, tp))
    without = {**every, op.name: tuple(s for s in every[op.name] if s.lowering != Lowering.EXPERT_EXCHANGE)}
    times = []
    for strategies in (every, without):
        choice = shard_class(cls, strategies, shard(1), costs)
        assert choice is not None
        cost = block_cost(graph, cls, choice, tp=tp, rows=4, device=device, tp_group=group, dtype="bfloat16")
        times.append(cost.forward_compute_s + cost.backward_compute_s + cost.forward_tp_comm_s
                     + cost.backward_tp_comm_s)
    assert times[0] < times[1]
    (exchange,) = (s for s in every[op.name] if s.factor == "t+e")
    routed_bytes = 4 * 2048 * 4096 * 2 * 2  # tokens, columns, bytes, choices
    each = collective_time_s(Collective.ALL_TO_ALL, routed_bytes, group)
    counts = collective_time_s(Collective.ALL_TO_ALL, 8 * tp * 8, group)  # a rank tells each expert's number of rows
    found = costs.lowering_comm(op, exchange)
    assert (found.forward_s, found.backward_s) == pytest.approx((counts + 2 * each, 2 * each))
