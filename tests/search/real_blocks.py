"""Real model configurations at real sizes, on fake tensors, and what the search chose for their blocks."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.search.shardings import ShardingChooser, slowest_device, tp_group
from autopar.sharding.reshard import Collective, conversion
from autopar.sharding.state import State, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.block_cost import BlockCost, block_cost

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "qwen2-7b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "gpt2-7b": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 4096, "n_head": 32, "n_layer": 2,
        "vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}


@cache
def captured(name: str, seq_len: int, *changes: tuple[str, Any]) -> ModelGraph:
    """The graph of a configuration with two layers; `changes` are items that replace its own."""
    length = "n_positions" if "n_embd" in CONFIGS[name] else "max_position_embeddings"
    config = {"num_hidden_layers": 2, length: seq_len, **CONFIGS[name], **dict(changes)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return capture_source(load_source(folder, seq_len=seq_len, dtype="bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Move:
    """A conversion of a tensor that communicates."""

    tensor: str
    shape: tuple[int, ...]
    src: State
    dst: State
    forward: Collective | None
    backward: Collective | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search chose for one class, the collectives in it and its cost."""

    cls: BlockClass
    choice: ClassSharding
    moves: tuple[Move, ...]
    cost: BlockCost

    @property
    def time_s(self) -> float:
        cost = self.cost
        return (cost.forward_compute_s + cost.backward_compute_s
                + cost.forward_tp_comm_s + cost.backward_tp_comm_s)

    @property
    def forward(self) -> Counter[str]:
        return Counter(str(move.forward) for move in self.moves if move.forward)

    @property
    def backward(self) -> Counter[str]:
        return Counter(str(move.backward) for move in self.moves if move.backward)

    def params(self, *modules: str) -> dict[str, str]:
        """The states of the weights of the modules of these names (all: of every weight)."""
        return {
            name.split(".")[-2]: str(state) for name, state in zip(self.cls.params, self.choice.params, strict=True)
            if name.endswith("weight") and (not modules or name.split(".")[-2] in modules)
        }

    def strategies(self, word: str) -> list[Strategy]:
        """The strategies of the ops with this word in their target, in order."""
        return [self.choice.strategy[op.name] for op in self.cls.ops if word in op.target]


def found(
    graph: ModelGraph, cluster: str, tp: int, *, sequence_parallel: bool, rows: int = 1, block: int = 1,
    split_weights: bool = True,
) -> Found:
    """The planner's choice for the class of the chain's block number `block` (0: embedding, -1: head and loss)."""
    machine = parse_cluster(cluster)
    choice = ShardingChooser(graph, machine, "bfloat16", rows=rows).choose(
        tp, sequence_parallel=sequence_parallel, split_weights=split_weights
    )
    assert choice is not None
    cls = graph.block_class[graph.blocks[block].cls]
    sharding = next(item for item in choice.shardings if item.cls == cls.name)
    cost = block_cost(
        graph, cls, sharding, tp=tp, rows=rows, device=slowest_device(machine), tp_group=tp_group(machine, tp),
        dtype="bfloat16",
    )
    return Found(cls=cls, choice=sharding, moves=moves(cls, sharding), cost=cost)


def splits_sequence(state: State, graph: ModelGraph) -> bool:
    """Whether the state splits dim 1 of hidden states, also where a view has merged batch and sequence."""
    return state in (shard(1), shard(0, graph.rows))


def moves(cls: BlockClass, choice: ClassSharding) -> tuple[Move, ...]:
    """The conversions of a block that communicate, each once, in execution order."""
    state: dict[str, State] = {}
    for names, states in ((cls.inputs, choice.inputs), (cls.params, choice.params), (cls.buffers, choice.buffers)):
        state.update(zip(names, states, strict=True))
    wanted: dict[tuple[str, State], None] = {}
    for op in cls.ops:
        strategy = choice.strategy[op.name]
        wanted.update(dict.fromkeys(zip(op.operands, strategy.inputs, strict=True)))
        state.update((name, s) for name, s in zip(op.outputs, strategy.outputs, strict=True) if name)
    wanted.update(dict.fromkeys(zip(cls.outputs, choice.outputs, strict=True)))
    made = []
    for name, target in wanted:
        info = cls.tensor[name]
        step = conversion(state[name], target, info.requires_grad)
        assert step is not None
        if not step.is_free:
            made.append(Move(
                tensor=name, shape=info.shape, src=state[name], dst=target, forward=step.forward,
                backward=step.backward,
            ))
    return tuple(made)
