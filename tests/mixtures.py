"""A small mixture of experts as a graph."""

from __future__ import annotations

import logging
from functools import cache

import torch

from autopar.graph.capture import capture
from autopar.graph.model_graph import ModelGraph

LENGTH = 16


@cache
def mixture() -> ModelGraph:
    """GPT-OSS with two layers of 32 columns and 8 experts, two of them for each token."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=97, max_position_embeddings=LENGTH, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=5,
    )
    ids = torch.zeros((2, LENGTH), dtype=torch.long)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return capture(model, {"input_ids": ids, "labels": ids}, tag_rows=True).graph
