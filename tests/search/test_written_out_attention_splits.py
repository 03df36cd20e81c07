"""Attention written as products, masks and a softmax splits its queries: scores and masks are never communicated."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from real_blocks import moves
from toy_graphs import LINK, NETWORK, device

from autopar.cluster.cluster import GroupShape
from autopar.graph.capture import capture
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.search.intra_op import shard_class
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import Collective
from autopar.sharding.state import RP, R, shard
from autopar.sharding.strategy import Strategy
from autopar.simulate.class_costs import ClassCosts

transformers: Any = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

LENGTH, GROUP = 24, GroupShape(size=2, num_nodes=1, per_node=2, link=LINK, network=NETWORK)
DECODER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def _config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(vocab_size=64, attn_implementation="eager", **settings)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(_config(
        "GPT2Config", n_layer=1, n_embd=32, n_head=4, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(_config(
        "Gemma2Config", num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=0, **DECODER)),
    "bloom": lambda: transformers.BloomForCausalLM(_config(
        "BloomConfig", n_layer=1, hidden_size=32, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, pad_token_id=0)),
    "t5": lambda: transformers.T5ForConditionalGeneration(_config(
        "T5Config", num_layers=2, num_decoder_layers=1, d_model=32, d_kv=8, d_ff=48, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0)),
}  # fmt: skip


def queries_split(cls: BlockClass) -> dict[str, tuple[Strategy, ...]]:
    """Products without weights and softmaxes split their rows; products with weights split too, with whole weights."""
    kept = dict(class_strategies(cls, 2))
    for op in cls.ops:
        rank = len(cls.tensor[op.outputs[0]].shape) if op.outputs[0] else 0
        weights = [i for i, name in enumerate(op.operands) if name in cls.params and len(cls.tensor[name].shape) == 2]
        is_product = any(word in op.target for word in ("matmul", "bmm"))
        if (is_product and not weights) or "softmax" in op.target:
            kept[op.name] = tuple(s for s in kept[op.name] if s.outputs[0] == shard(rank - 2))
        elif weights and any(word in op.target for word in ("linear", "addmm")):
            kept[op.name] = tuple(s for s in kept[op.name] if s.factor and all(s.inputs[i] == RP for i in weights))
    return kept


@pytest.mark.parametrize("model", MODELS)
def test_scores_and_masks_stay_on_their_rank(model: str) -> None:
    ids = torch.randint(0, 64, (2, LENGTH))
    graph: ModelGraph = capture(MODELS[model](), {"input_ids": ids, "labels": ids}).graph
    checked = 0
    for cls in graph.classes:
        if not any("softmax" in op.target for op in cls.ops):
            continue
        costs = ClassCosts(graph, cls, tp=2, rows=2, device=device(), tp_group=GROUP, dtype="float32")
        choice = shard_class(cls, queries_split(cls), shard(1), costs, parameter_weight=0.0)
        assert choice is not None, cls.name
        communicated = [move for move in moves(cls, choice) if move.forward]
        assert {move.forward for move in communicated} == {Collective.ALL_GATHER}
        assert not [move for move in communicated if move.shape[-2:] == (LENGTH, LENGTH)], "scores stay where they are"
        masks = [name for name in cls.inputs if not cls.tensor[name].requires_grad and len(cls.tensor[name].shape) > 2]
        assert not {move.tensor for move in moves(cls, choice)} & set(masks), "a mask is sliced by each rank"
        assert choice.buffers == (R,) * len(choice.buffers)
        checked += 1
    assert checked
