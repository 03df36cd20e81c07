"""Mixtures of experts and state-space models, tiny."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import transformers
from entry import VOCABULARY, Built, Entry, causal_batch

_TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, vocab_size=VOCABULARY)
_DECODER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, **_TOKENS,
)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", _DECODER | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", _DECODER | dict(head_dim=8, moe_intermediate_size=24, num_experts=8,
                                              num_experts_per_tok=3, norm_topk_prob=True)),
    "gpt_oss": ("GptOss", _DECODER | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)),
    "deepseek_v3": ("DeepseekV3", _DECODER | dict(
        num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8,
    )),
    "deepseek_v2": ("DeepseekV2", _DECODER | dict(
        num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=0, topk_method="greedy", q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8,
    )),
    "mamba": ("Mamba", dict(num_hidden_layers=2, hidden_size=32, state_size=8, time_step_rank=4, **_TOKENS)),
    "mamba2": ("Mamba2", dict(num_hidden_layers=2, hidden_size=32, state_size=8, num_heads=8, head_dim=8, n_groups=2,
                              chunk_size=8, **_TOKENS)),
}


def mixture_or_scan(family: str) -> Built:
    """The family's causal language model with its loss."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prefix, settings = _CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    options = {} if family.startswith("mamba") else {"experts_implementation": "eager"}  # others lack float64
    return transformers.AutoModelForCausalLM.from_config(config, **options), causal_batch(), None


ENTRIES: tuple[Entry, ...] = tuple(
    Entry(name=family, family="scan" if family.startswith("mamba") else "experts",
          build=partial(mixture_or_scan, family))
    for family in _CONFIGS
)
