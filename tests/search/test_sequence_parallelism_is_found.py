"""On real blocks the search finds what Korthikanti et al. (2022) wrote down: norms on parts of the sequence.

Weights split by columns and rows; hidden states gathered before the columns and reduce-scattered after the rows.
"""

import math

import pytest
from real_blocks import captured, found, splits_sequence

from autopar.sharding.reshard import Collective
from autopar.sharding.state import RP, Kind, P, State, shard

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
ROW = ("o_proj", "down_proj", "c_proj")
NORMS = ("rsqrt", "layer_norm", "rms_norm")


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("model", ["llama-8b", "qwen3-8b", "gpt2-7b"])
def test_hidden_states_are_gathered_before_columns_and_scattered_after_rows(model: str, tp: int) -> None:
    graph = captured(model, 4096)
    layer = found(graph, "8xH100-80GB", tp, sequence_parallel=True, rows=4)
    gather, scatter = Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    assert [(move.forward, move.backward) for move in layer.moves] == [(gather, scatter), (scatter, gather)] * 2
    for before, after in (layer.moves[:2], layer.moves[2:]):
        assert splits_sequence(before.src, graph)
        assert splits_sequence(after.dst, graph)
        assert (before.dst, after.src) == (RP, P)
    assert all(math.prod(move.shape) == layer.cls.tensor[layer.cls.inputs[0]].numel for move in layer.moves)
    outputs = 1 if model.startswith("gpt2") else 0  # Conv1D stores its weight as (inputs, outputs)
    for modules, dim in ((COLUMN, outputs), (ROW, 1 - outputs)):
        states = [State.parse(state) for state in layer.params(*modules).values()]
        assert {(state.kind, state.dim) for state in states} == {(Kind.SHARDED, dim)}


@pytest.mark.parametrize("model", ["llama-8b", "gpt2-7b"])
def test_norms_and_residuals_work_on_parts_of_the_sequence(model: str) -> None:
    graph = captured(model, 4096)
    layer, whole = (found(graph, "8xH100-80GB", 8, sequence_parallel=flag, rows=4) for flag in (True, False))
    norms = [strategy for word in NORMS for strategy in layer.strategies(word)]
    assert len(norms) == 2
    assert all(strategy.inputs[0] == shard(1) for strategy in norms)
    assert all(not strategy.factor for word in NORMS for strategy in whole.strategies(word))
    stream = layer.cls.tensor[layer.cls.inputs[0]].shape
    sums = [op for op in layer.cls.ops if op.target.startswith("aten.add.Tensor") and len(op.operands) == 2
            and layer.cls.tensor[op.outputs[0]].shape == stream]
    assert {layer.choice.strategy[op.name].outputs[0].kind for op in sums} == {Kind.SHARDED}
    assert layer.cost.saved_bytes < whole.cost.saved_bytes


@pytest.mark.parametrize("model", ["llama-8b", "qwen3-8b"])
def test_norms_of_many_small_ops_make_it_faster(model: str) -> None:
    graph = captured(model, 4096)
    layer, whole = (found(graph, "8xH100-80GB", 8, sequence_parallel=flag, rows=4) for flag in (True, False))
    assert layer.time_s < whole.time_s
