"""Tiny real models for the parity tests: (model, example batch, loss function), weights from torch's seed."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 8, 16, 64


def causal_batch() -> dict[str, Tensor]:
    """Ids and labels; rows ignore very different numbers of targets."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : (5 * row) % 13] = -100
    return {"input_ids": ids, "labels": labels}


def gpt2(
    dropout: float = 0.0, attention: str = "sdpa", vocabulary: int = VOCABULARY
) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-2: fused QKV, biases, tied embeddings."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=vocabulary, n_positions=LENGTH, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config), causal_batch(), None


def gpt2_dropout() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-2 with random ops on hidden states, in attention and on embeddings."""
    return gpt2(dropout=0.2)


def gpt2_eager() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-2 with attention written out: products, a mask and a softmax."""
    return gpt2(attention="eager")


def gpt2_eager_dropout() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-2 with dropout, whose attention is products and a softmax."""
    return gpt2(dropout=0.2, attention="eager")


def gpt2_uneven() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-2 with a vocabulary that neither 2 nor 4 divides, as its own 50257."""
    return gpt2(vocabulary=VOCABULARY + 1)


def llama(tied: bool = True, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Llama with grouped-query attention."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config), causal_batch(), None


def llama_eager() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Llama whose attention is products and a softmax."""
    return llama(attention="eager")


def llama_untied() -> tuple[nn.Module, dict[str, Tensor], Any]:
    return llama(tied=False)


def phi3() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Phi-3: one weight for queries, keys and values, one for gate and up."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.Phi3Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, original_max_position_embeddings=LENGTH,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )
    return transformers.Phi3ForCausalLM(config), causal_batch(), None


def bert() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """BERT with masked words: attention both ways, and key biases whose gradient is zero but for rounding."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config), causal_batch(), None


def mixture() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """GPT-OSS: experts with biases, transposed weights and a clamped gate, two of eight for each token."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=5,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"), causal_batch(), None


def balanced_mixture() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Mixtral with a loss that balances its experts, by the logits of all layers' routers."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.MixtralConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_local_experts=4, output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"), causal_batch(), None


class Perceptron(nn.Module):
    """Layers in a row, some of them without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def mean_square(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.mse_loss(output, batch["y"])


class Residual(nn.Module):
    """Layers that add to what they read, so that a border inside one passes on what an op behind it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


def residual() -> tuple[nn.Module, dict[str, Tensor], Any]:
    generator = torch.Generator().manual_seed(3)
    batch = {name: torch.randn(ROWS, 12, generator=generator) for name in ("x", "y")}
    return Residual(), batch, mean_square


def perceptron() -> tuple[nn.Module, dict[str, Tensor], Any]:
    generator = torch.Generator().manual_seed(3)
    batch = {"x": torch.randn(ROWS, 12, generator=generator), "y": torch.randn(ROWS, 5, generator=generator)}
    return Perceptron(), batch, mean_square


class Modulated(nn.Module):
    """Layers that shift, scale and gate by a vector beside the chain, which each embeds anew, as in a DiT."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.modulate = nn.Linear(width, width), nn.Linear(width, 3 * width)
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            shift, scale, gate = self.modulate(nn.functional.silu(self.embed(time))).unsqueeze(1).chunk(3, dim=-1)
            h = nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            return x + gate * self.down(nn.functional.gelu(self.up(h)))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.layers = nn.ModuleList(self.Layer(16) for _ in range(4))

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, time)
        return self.last(x)


def modulated() -> tuple[nn.Module, dict[str, Tensor], Any]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"x": (ROWS, 4, 6), "time": (ROWS, 16), "y": (ROWS, 4, 5)}
    return Modulated(), {name: torch.randn(size, generator=generator) for name, size in sizes.items()}, mean_square


class ChannelsLast(nn.Module):
    """Convolutions over images that were tokens before: their group norms see channels last."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.convolution, self.mix = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            image = x.transpose(1, 2).unflatten(2, (4, 4))
            image = self.convolution(nn.functional.silu(self.norm(image)))
            return x + self.mix(image.flatten(2).transpose(1, 2))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList(self.Layer() for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def channels_last() -> tuple[nn.Module, dict[str, Tensor], Any]:
    generator = torch.Generator().manual_seed(3)
    batch = {"x": torch.randn(ROWS, 16, 3, generator=generator), "y": torch.randn(ROWS, 16, 5, generator=generator)}
    return ChannelsLast(), batch, mean_square


class UnderAutocast(nn.Module):
    """Residual layers in bfloat16 by the model's own autocast; parameters, sums and the loss in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
        )

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def under_autocast() -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    """Its batch is a tuple."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    return UnderAutocast(), (ids, ids.roll(-1, 1)), None
