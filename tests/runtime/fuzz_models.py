"""Tiny models of six families for random plans: (model, example batch, loss function), weights from torch's seed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from runtime_models import LENGTH, ROWS, VOCABULARY, causal_batch
from torch import nn

Built = tuple[nn.Module, dict[str, Any], Any]


def _model(name: str, **settings: Any) -> nn.Module:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind = getattr(transformers, name)
    made: nn.Module = kind(kind.config_class(**settings))
    return made


def gpt2() -> Built:
    """Fused queries, keys and values, biases, a tied embedding."""
    return _model(
        "GPT2LMHeadModel", n_layer=3, n_embd=24, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ), causal_batch(), None


def llama() -> Built:
    """Two heads of keys and values for four of queries."""
    return _model(
        "LlamaForCausalLM", num_hidden_layers=3, hidden_size=24, intermediate_size=36, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    ), causal_batch(), None


def bert() -> Built:
    """Attention both ways; key biases whose gradient is zero but for rounding."""
    return _model(
        "BertForMaskedLM", num_hidden_layers=3, hidden_size=24, intermediate_size=48, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ), causal_batch(), None


def t5() -> Built:
    """An encoder and a decoder: its states pass all stages between, and one embedding serves three blocks."""
    return _model(
        "T5ForConditionalGeneration", d_model=24, d_kv=6, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
        dropout_rate=0.0, decoder_start_token_id=0,
    ), causal_batch(), None


def vit() -> Built:
    """17 tokens, a convolution first, a loss over rows."""
    generator = torch.Generator().manual_seed(5)
    batch = {
        "pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 5, (ROWS,), generator=generator),
    }
    return _model(
        "ViTForImageClassification", num_labels=5, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ), batch, None


def mixtral() -> Built:
    """Four experts, two of them for each token."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.MixtralConfig(
        num_hidden_layers=3, hidden_size=24, intermediate_size=36, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"), causal_batch(), None


FAMILIES: dict[str, Callable[[], Built]] = {
    "gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5, "vit": vit, "mixtral": mixtral,
}
