"""Small models that the graph tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

transformers: Any = __import__("pytest").importorskip("transformers")


def token_batch(vocabulary: int, rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[0, 3] = -100
    return {"input_ids": ids, "labels": labels}


def llama(**changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, tie_word_embeddings=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(settings | changes))
    return transformers.LlamaForCausalLM(config), token_batch(97)


def gpt2(**changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = dict(n_layer=3, n_embd=32, n_head=4, n_positions=64, vocab_size=97, resid_pdrop=0.0, attn_pdrop=0.0,
                    embd_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | changes))), token_batch(97)


def bert(**changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=97,
                    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**(settings | changes))), token_batch(97)


def resnet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[2, 3, 3, 2],
                                       num_labels=5, num_channels=3)
    batch = {"pixel_values": torch.randn(3, 3, 64, 64), "labels": torch.tensor([0, 3, 4])}
    return transformers.ResNetForImageClassification(config), batch


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                                    image_size=16, patch_size=4, num_labels=5, hidden_dropout_prob=0.0,
                                    attention_probs_dropout_prob=0.0)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 16, 16),
                                                            "labels": torch.tensor([0, 3, 4])}


def mixtral(**changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, num_local_experts=4,
                    experts_implementation="eager")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**(settings | changes))
    return transformers.MixtralForCausalLM(config), token_batch(97)


def gemma3() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Layers built alike with two kinds of attention: five with a sliding window, one without."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=6, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=97, max_position_embeddings=64, sliding_window=5)
    return transformers.Gemma3ForCausalLM(config), token_batch(97)


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=97,
                                   dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), token_batch(97)


def bart() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=97, max_position_embeddings=64, dropout=0.0)
    return transformers.BartForConditionalGeneration(config), token_batch(97)


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16),
                          nn.GELU(), nn.Linear(16, 4))
    return model, (torch.randn(3, 8),)


def square_loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()
