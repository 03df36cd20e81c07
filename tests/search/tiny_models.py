"""Tiny real models, captured, and some of the strategies of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from autopar.graph.capture import capture
from autopar.graph.model_graph import ModelGraph
from autopar.sharding.joint import JointStrategy


def fewer(
    strategies: Mapping[str, Sequence[JointStrategy]], most: int, chance: np.random.Generator
) -> dict[str, list[JointStrategy]]:
    """Some of each op's strategies; the first, whole on every rank, among them."""
    return {
        name: [own[0], *(own[1 + i] for i in sorted(chance.permutation(len(own) - 1)[: most - 1]))]
        for name, own in strategies.items()
    }


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.norm(self.first(x)))) + x
        return nn.functional.cross_entropy(self.head(y.mean((2, 3))), labels)


@cache
def real_graph(name: str) -> ModelGraph:
    """A tiny real model, captured."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids = torch.randint(3, 96, (4, 16))
    tokens: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if name == "llama":
        return capture(LlamaForCausalLM(LlamaConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            vocab_size=96, use_cache=False,
        )), tokens).graph
    if name == "gpt2":
        return capture(GPT2LMHeadModel(GPT2Config(
            n_embd=32, n_head=4, n_layer=2, vocab_size=96, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False,
        )), tokens).graph
    return capture(_Convolutions(), {"x": torch.rand(6, 6, 12, 12), "labels": torch.randint(6, (6,))}).graph
