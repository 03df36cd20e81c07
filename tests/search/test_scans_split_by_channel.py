"""On a real state-space block the search splits channels from the first projection through convolution and scan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_megatron_is_found import collectives

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.verify import verify_plan
from autopar.search.planner import Degrees, plan_from_degrees
from autopar.sharding.state import Kind, shard

CLUSTER = parse_cluster("8xH100-80GB")
CHANNELS, LENGTH = 5120, 4  # the scan is a loop over time steps
MAMBA = {
    "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": CHANNELS // 2, "state_size": 16,
    "num_hidden_layers": 2, "vocab_size": 50280, "time_step_rank": 160,
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    folder: Path = tmp_path_factory.mktemp("mamba")
    (folder / "config.json").write_text(json.dumps(MAMBA))
    return capture_source(load_source(str(folder), seq_len=LENGTH, dtype="bfloat16"))


@pytest.mark.parametrize("tp", [2, 8])
def test_channels_split_with_two_all_reduces_each_way(graph: ModelGraph, tp: int) -> None:
    plan = plan_from_degrees(graph, CLUSTER, Degrees(
        global_batch=1024, micro_batch=128, tp=tp, dp_replicate=8 // tp, sequence_parallel=False,
    ))
    verify_plan(plan, graph, CLUSTER)
    cls = graph.block_class[graph.blocks[1].cls]
    choice = plan.sharding[cls.name]
    by_name = {name.split(".", 1)[-1]: state for name, state in zip(cls.params, choice.params, strict=True)}
    assert by_name["in_proj.weight"] == shard(0, 2)  # channels and their gates side by side
    assert by_name["x_proj.weight"] == by_name["out_proj.weight"] == shard(1)
    assert {by_name[name] for name in ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_proj.weight")} == {shard(0)}
    forward, backward = collectives(cls, choice)
    assert forward == backward == {"all_reduce": 2}
    for op in cls.ops:
        for output, state in zip(op.outputs, choice.strategy[op.name].outputs, strict=True):
            if output and CHANNELS in cls.tensor[output].shape and cls.tensor[output].requires_grad:
                assert state.kind is Kind.SHARDED, f"{op.name} repeats its channels"
