"""On real blocks the search finds what Megatron wrote down: column and row splits, and its few collectives a block."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from real_blocks import moves

from autopar.cluster.parse import parse_cluster
from autopar.graph.fuse import fused_class
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.verify import verify_plan
from autopar.search.planner import Degrees, plan_from_degrees
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import block_cost

CLUSTER = parse_cluster("8xH100-80GB")
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 128256,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 4096, "n_head": 32, "n_layer": 2,
    "n_positions": 2048, "vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps({"llama": LLAMA, "gpt2": GPT2}[request.param]))
    return capture_source(load_source(str(folder), seq_len=2048, dtype="bfloat16"))


def layer_sharding(graph: ModelGraph, tp: int, *, sequence_parallel: bool) -> tuple[BlockClass, ClassSharding]:
    plan = plan_from_degrees(graph, CLUSTER, Degrees(
        global_batch=32, micro_batch=4, tp=tp, dp_replicate=8 // tp, sequence_parallel=sequence_parallel,
    ))
    verify_plan(plan, graph, CLUSTER)
    cls = graph.block_class[graph.blocks[1].cls]
    return cls, plan.sharding[cls.name]


def collectives(cls: BlockClass, choice: ClassSharding) -> tuple[Counter[str], Counter[str]]:
    """The collectives of a block, forward and backward, each conversion of a tensor counted once."""
    made = moves(cls, choice)
    forward, backward = ([str(way) for way in ways if way] for ways in zip(
        *((move.forward, move.backward) for move in made), strict=True
    ))
    return Counter(forward), Counter(backward)


COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
ROW = ("o_proj", "down_proj", "c_proj")


@pytest.mark.parametrize("tp", [2, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_columns_then_rows_with_two_collectives_each_way(
    captured: ModelGraph, tp: int, sequence_parallel: bool
) -> None:
    cls, choice = layer_sharding(captured, tp, sequence_parallel=sequence_parallel)
    transposed = "GPT2" in cls.name  # Conv1D stores its weight as (inputs, outputs)
    for name, state in zip(cls.params, choice.params, strict=True):
        module = name.split(".")[-2]
        if name.endswith("weight") and module in (*COLUMN, *ROW):
            split_outputs = module in COLUMN
            assert state.dim == (0 if split_outputs != transposed else 1), f"{name} is {state}"
            assert str(state).startswith("S("), f"{name} is {state}"
    forward, backward = collectives(cls, choice)
    if sequence_parallel:
        assert forward == backward == {"all_gather": 2, "reduce_scatter": 2}
    else:
        assert forward == backward == {"all_reduce": 2}


@pytest.mark.parametrize(("tp", "sequence_parallel", "each_element"), [
    (2, False, 8 + 24 / 2), (8, False, 8 + 24 / 8), (8, True, 4 + 28 / 8),
])
@pytest.mark.parametrize("captured", ["gpt2"], indirect=True)
def test_a_layer_keeps_what_korthikanti_et_al_count(
    captured: ModelGraph, tp: int, sequence_parallel: bool, each_element: float
) -> None:
    """s b h (10 + 24 / t), of which 2 are dropout's masks, which this model has none of.

    Split by sequence, all of it is over t but what the column products read: they keep it gathered, where Megatron
    gathers it again in the backward.
    """
    graph = replace(captured, classes=tuple(map(fused_class, captured.classes)))
    cls, choice = layer_sharding(graph, tp, sequence_parallel=sequence_parallel)
    cost = block_cost(
        graph, cls, choice, tp=tp, rows=4, device=CLUSTER.device(0), dtype="bfloat16",
        tp_group=CLUSTER.group(tuple(range(tp))),
    )
    assert cost.saved_bytes == pytest.approx(4 * 2048 * 4096 * each_element, rel=0.01)
