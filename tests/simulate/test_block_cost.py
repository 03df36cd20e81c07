"""Block costs against sums worked out by hand, and the same model captured in two dtypes against itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import hand_made as hand
import pytest

from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.compute import OpTime, matmul_efficiency
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.sharding.reshard import Collective
from autopar.sharding.state import RP, R, shard
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.class_costs import ClassCosts

GRAPH = hand.graph()
LAYER = GRAPH.block_class["layer"]
ROWS = 4


def layer_cost(tp: int = 1, *, compiled: bool = False, rows: float = ROWS) -> BlockCost:
    group = hand.cluster().group(tuple(range(tp))) if tp > 1 else None
    return block_cost(
        GRAPH, LAYER, hand.megatron()[0] if tp > 1 else None, tp=tp, rows=rows, device=hand.DEVICE, tp_group=group,
        dtype="bfloat16", compile=compiled,
    )


def test_a_layer_by_hand() -> None:
    cost, tokens = layer_cost(), ROWS * hand.SEQ
    gap, bandwidth = 0.3e-6, 1e12
    up = matmul_efficiency(hand.DEVICE, tokens, hand.INNER, hand.HIDDEN) * 100e12
    down = matmul_efficiency(hand.DEVICE, tokens, hand.HIDDEN, hand.INNER) * 100e12
    flops = 2 * tokens * hand.HIDDEN * hand.INNER
    x, h = 2 * tokens * hand.HIDDEN, 2 * tokens * hand.INNER
    products = flops / up + flops / down
    assert cost.forward_compute_s == pytest.approx(products + (2 * h + 3 * x) / bandwidth + 4 * gap)
    # Two products each; relu reads the gradient and its output and writes; x has two consumers, whose sum reads two
    # tensors and writes one; the residual sum itself passes its gradient on.
    assert cost.backward_compute_s == pytest.approx(2 * products + (3 * h + 3 * x) / bandwidth + 5 * gap)
    assert cost.weight_backward_s == pytest.approx(products + 2 * gap)
    assert cost.saved_bytes == x + h
    assert cost.boundary_bytes == x
    assert cost.forward_flops == 2 * flops
    assert cost.params == (hand.INNER * hand.HIDDEN,) * 2
    assert (cost.forward_tp_comm_s, cost.backward_tp_comm_s) == (0, 0)
    # The second product alone reads what relu gives: with that, everything is there again.
    assert cost.recompute_s == pytest.approx(flops / up + 2 * h / bandwidth + 2 * gap)
    assert layer_cost(compiled=True).recompute_s == layer_cost(compiled=True).forward_compute_s


@pytest.mark.parametrize("tp", [2, 8])
def test_column_and_row_products(tp: int) -> None:
    cost, whole = layer_cost(tp), layer_cost()
    x, h = 2 * ROWS * hand.SEQ * hand.HIDDEN, 2 * ROWS * hand.SEQ * hand.INNER
    once = collective_time_s(Collective.ALL_REDUCE, x, hand.cluster().group(tuple(range(tp))))
    assert cost.forward_tp_comm_s == pytest.approx(once)  # P -> R after the row product
    assert cost.backward_tp_comm_s == pytest.approx(once)  # R -> RP before the column product
    assert cost.recompute_tp_s == 0  # recomputation stops before the row product
    assert cost.saved_bytes == x + h / tp
    assert cost.params == (hand.INNER * hand.HIDDEN / tp,) * 2
    assert cost.partial_params == (False, False)
    assert cost.forward_flops == whole.forward_flops
    assert whole.forward_compute_s / tp < cost.forward_compute_s < whole.forward_compute_s


def test_rows_scale_bytes_exactly() -> None:
    assert layer_cost(rows=8).saved_bytes == 2 * layer_cost(rows=4).saved_bytes


def test_a_gathered_tensor_is_saved_gathered() -> None:
    """Sequence parallelism: x arrives sharded, the column product keeps the gathered x; conversions are shared."""
    costs = ClassCosts(
        GRAPH, LAYER, tp=4, rows=ROWS, device=hand.DEVICE, tp_group=hand.cluster().group((0, 1, 2, 3)), dtype="bfloat16"
    )
    x = 2 * ROWS * hand.SEQ * hand.HIDDEN
    gather = collective_time_s(Collective.ALL_GATHER, x, costs.tp_group)
    scatter = collective_time_s(Collective.REDUCE_SCATTER, x, costs.tp_group)
    assert costs.conversion_time("x", shard(1), RP) == OpTime(gather, scatter)
    assert costs.conversion_time("x", R, shard(1)) == OpTime(0.0, gather)
    assert costs.conversion_time("x", R, R) == OpTime(0.0, 0.0)


def test_compile_fuses_chains() -> None:
    eager, compiled = layer_cost(), layer_cost(compiled=True)
    assert compiled.forward_compute_s <= eager.forward_compute_s
    assert compiled.saved_bytes <= eager.saved_bytes


def test_costs_are_cached_and_fast() -> None:
    assert layer_cost() is layer_cost()
    start = time.perf_counter()
    for rows in range(100, 150):
        layer_cost(rows=rows)
    assert (time.perf_counter() - start) / 50 < 0.02


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 1000,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelGraph]:
    folder: Path = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return {
        key: capture_source(load_source(str(folder), seq_len=256, dtype=dtype, attention=attention))
        for key, dtype, attention in (
            ("float32", "float32", "sdpa"), ("bfloat16", "bfloat16", "sdpa"), ("eager", "bfloat16", "eager")
        )
    }


def decoder(graph: ModelGraph, dtype: str = "bfloat16", *, compiled: bool = False) -> BlockCost:
    cls = next(cls for cls in graph.classes if "Decoder" in cls.name)
    return block_cost(
        graph, cls, None, tp=1, rows=4, device=hand.DEVICE, tp_group=None, dtype=dtype, compile=compiled
    )


def test_a_float32_capture_computes_in_bfloat16_like_a_bfloat16_capture(llamas: dict[str, ModelGraph]) -> None:
    ours, true = decoder(llamas["float32"]), decoder(llamas["bfloat16"])
    assert ours.saved_bytes == pytest.approx(true.saved_bytes, rel=0.01)
    assert ours.forward_compute_s == pytest.approx(true.forward_compute_s, rel=0.03)
    assert ours.backward_compute_s == pytest.approx(true.backward_compute_s, rel=0.03)
    assert ours.boundary_bytes == true.boundary_bytes
    full = decoder(llamas["float32"], "float32")
    assert full.boundary_bytes == 2 * true.boundary_bytes
    assert full.saved_bytes > 1.3 * true.saved_bytes


def test_saved_bytes_of_a_llama_layer(llamas: dict[str, ModelGraph]) -> None:
    """Counted tensor by tensor, in bytes a token; hidden h, inner i, keys and values k."""
    h, i, k, heads = 512, 1408, 128, 8
    norm = 2 * h + 4 + 2 * h  # the input, the root, what the products read
    attention = 2 * (h + k + k + h) + 4 * heads  # q, k, v, output, log-sum-exp
    mlp = 2 * (4 * i)  # gate, silu(gate), up, their product
    assert decoder(llamas["bfloat16"]).saved_bytes == 4 * 256 * (2 * norm + attention + mlp)


def test_selective_recomputation_drops_the_attention_matrix(llamas: dict[str, ModelGraph]) -> None:
    eager, fused = decoder(llamas["eager"]), decoder(llamas["bfloat16"])
    scores = 4 * 8 * 256 * 256  # elements of rows x heads x queries x keys
    assert eager.saved_bytes - eager.selective_saved_bytes >= 2 * scores
    assert 0 < eager.selective_recompute_s < eager.forward_compute_s
    assert fused.saved_bytes - fused.selective_saved_bytes == 4 * 4 * 8 * 256  # the log-sum-exp alone
    assert eager.key_value_bytes == fused.key_value_bytes == 2 * 2 * 4 * 256 * 128


def test_compile_saves_time_and_bytes(llamas: dict[str, ModelGraph]) -> None:
    eager, compiled = decoder(llamas["bfloat16"]), decoder(llamas["bfloat16"], compiled=True)
    assert compiled.forward_compute_s < eager.forward_compute_s
    assert compiled.backward_compute_s < eager.backward_compute_s
    assert compiled.saved_bytes < eager.saved_bytes


def test_saved_bytes_of_a_compiled_llama_layer(llamas: dict[str, ModelGraph]) -> None:
    """As written out, less silu(gate), which is computed again; rotations and residual sums are linear."""
    h, i, k, heads = 512, 1408, 128, 8
    norm = 2 * h + 4 + 2 * h
    attention = 2 * (h + k + k + h) + 4 * heads
    mlp = 2 * (3 * i)
    saved = decoder(llamas["bfloat16"], compiled=True).saved_bytes
    assert saved == 4 * 256 * (2 * norm + attention + mlp)
