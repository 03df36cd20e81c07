"""At long sequences the search finds what DeepSpeed-Ulysses wrote down: all-to-all between sequence and heads.

Every product runs on a part of the sequence with whole weights; queries, keys and values change to a part of the heads
for attention, and its output changes back.
"""

import pytest
from real_blocks import captured, found

from autopar.sharding.reshard import Collective
from autopar.sharding.state import shard

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("model", ["llama-8b", "qwen3-8b"])
def test_four_all_to_alls_at_128k_tokens(model: str) -> None:
    layer = found(captured(model, 131072), "8xH100-80GB", 8, sequence_parallel=True)
    assert set(layer.params(*PRODUCTS).values()) == {"RP"}
    assert [strategy.inputs[0] for strategy in layer.strategies("linear")] == [shard(1)] * 7
    (attention,) = layer.strategies("scaled_dot_product_attention")
    assert attention.inputs == (shard(1),) * 3, "heads are dim 1 of queries, keys and values"
    exchange = Collective.ALL_TO_ALL
    assert [(move.forward, move.backward) for move in layer.moves] == [(exchange, exchange)] * 4
    head_dims = sorted(move.shape[-2:] for move in layer.moves)
    assert head_dims == [(32, 128), (131072, 128), (131072, 128), (131072, 128)], "q, k, v, and the output of attention"


def test_positions_are_sliced_without_a_collective() -> None:
    layer = found(captured("qwen3-8b", 131072), "8xH100-80GB", 8, sequence_parallel=True)
    rotary = [name for name in layer.cls.inputs if not layer.cls.tensor[name].requires_grad]
    assert rotary
    assert not {move.tensor for move in layer.moves} & set(rotary)
    taken = {
        state for op in layer.cls.ops if "mul" in op.target
        for name, state in zip(op.operands, layer.choice.strategy[op.name].inputs, strict=True)
        if name in {"unsqueeze", "unsqueeze_1"}
    }
    assert taken == {shard(2)}, "cosines and sines of this rank's positions"


def test_short_sequences_split_weights_unless_they_are_free() -> None:
    """What a whole weight costs (its gradient's sum, the optimizer) decides: without it, all-to-all moves the least.

    Keys and values have as many heads as queries: a quarter of them would be gathered in less time. At 4096 tokens
    what the host takes to issue the ops would decide.
    """
    graph = captured("llama-8b", 16384, ("num_key_value_heads", 32))
    charged = found(graph, "8xH100-80GB", 8, sequence_parallel=True)
    assert Collective.ALL_TO_ALL not in charged.forward
    free = found(graph, "8xH100-80GB", 8, sequence_parallel=True, split_weights=False)
    assert free.forward == free.backward == {"all_to_all": 4}
    assert set(free.params(*PRODUCTS).values()) == {"RP"}
