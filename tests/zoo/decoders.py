"""Decoder language models of Hugging Face, tiny."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import transformers
from entry import LENGTH, VOCABULARY, Built, Entry, causal_batch

_TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, vocab_size=VOCABULARY)
_ODD: dict[str, Any] = dict(vocab_size=VOCABULARY + 1)  # no axis divides it
_MODERN: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, **_TOKENS,
)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", dict(n_layer=2, n_embd=32, n_head=4, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
                          attn_pdrop=0.0, **_TOKENS)),
    "opt": ("OPT", dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                        max_position_embeddings=32, dropout=0.0, **_TOKENS)),
    "gpt_neox": ("GPTNeoX", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                 max_position_embeddings=32, rotary_pct=0.5, **_TOKENS)),
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **_TOKENS)),
    "llama": ("Llama", _MODERN),
    "mistral": ("Mistral", _MODERN | dict(sliding_window=5)),
    "qwen2": ("Qwen2", _MODERN),
    "qwen3": ("Qwen3", _MODERN | dict(head_dim=8)),
    "gemma": ("Gemma", _MODERN | dict(head_dim=8, num_key_value_heads=1)),
    "gemma2": ("Gemma2", _MODERN | dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3", _MODERN | dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8, _text=True)),
    "phi": ("Phi", _MODERN | dict(num_key_value_heads=4, partial_rotary_factor=0.5)),
    "phi3": ("Phi3", _MODERN | dict(sliding_window=5)),
    "falcon": ("Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
                              new_decoder_architecture=False, parallel_attn=True, **_TOKENS)),
    "olmo2": ("Olmo2", _MODERN),
    # Variants of the same families: what does not divide, other attention, other block layouts.
    "gpt2_odd": ("GPT2", dict(n_layer=2, n_embd=40, n_head=5, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
                              attn_pdrop=0.0, **_TOKENS | _ODD, scale_attn_by_inverse_layer_idx=True)),
    "opt_projected": ("OPT", dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                  word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0,
                                  do_layer_norm_before=False, **_TOKENS)),
    "gpt_neox_serial": ("GPTNeoX", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=32, rotary_pct=0.25,
                                        use_parallel_residual=False, **_TOKENS)),
    "llama_eager": ("Llama", _MODERN | dict(attn_implementation="eager", attention_bias=True, mlp_bias=True)),
    "falcon_new": ("Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
                                  new_decoder_architecture=True, bias=True, **_TOKENS)),
    "falcon_alibi": ("Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=False,
                                    alibi=True, parallel_attn=False, **_TOKENS)),
    "gemma2_odd": ("Gemma2", _MODERN | _ODD | dict(hidden_size=30, head_dim=8, num_attention_heads=3,
                                                   num_key_value_heads=1)),
    "phi_normed": ("Phi", _MODERN | _ODD | dict(num_key_value_heads=2, partial_rotary_factor=1.0, qk_layernorm=True)),
    "bloom_odd": ("Bloom", dict(hidden_size=40, n_layer=2, n_head=5, hidden_dropout=0.0, attention_dropout=0.0,
                                slow_but_exact=False, apply_residual_connection_post_layernorm=True, **_TOKENS | _ODD)),
}


def decoder(family: str) -> Built:
    """The family's causal language model with its loss."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prefix, settings = _CONFIGS[family]
    kind = "TextConfig" if settings.get("_text") else "Config"
    config = getattr(transformers, prefix + kind)(**{key: v for key, v in settings.items() if key != "_text"})
    return transformers.AutoModelForCausalLM.from_config(config), causal_batch(), None


ENTRIES: tuple[Entry, ...] = tuple(
    Entry(name=family, family="decoder", build=partial(decoder, family)) for family in _CONFIGS
)
