"""Where heads do not split or keys are few, the search finds context parallelism: own queries against gathered keys."""

from real_blocks import Found, captured, found

from autopar.sharding.lowering import Lowering
from autopar.sharding.state import RP, shard


def check(layer: Found, key_heads: int) -> None:
    """Keys and values alone are gathered, their gradients scattered back; every product has its part of the rows."""
    (attention,) = layer.strategies("scaled_dot_product_attention")
    assert attention.inputs == (shard(2), RP, RP)
    assert attention.outputs == (shard(2),)
    assert layer.forward == {"all_gather": 2}
    assert layer.backward == {"reduce_scatter": 2}
    assert {(move.shape[1], move.src, move.dst) for move in layer.moves} == {(key_heads, shard(2), RP)}
    assert [strategy.inputs[0] for strategy in layer.strategies("linear")] == [shard(1)] * 7
    assert set(layer.params().values()) == {"RP"}


def test_28_heads_on_8_ranks() -> None:
    layer = found(captured("qwen2-7b", 131072), "8xH100-80GB", 8, sequence_parallel=True)
    check(layer, 4)
    assert layer.strategies("scaled_dot_product_attention")[0].lowering == Lowering.CAUSAL_CONTEXT


def test_8_key_heads_on_16_ranks() -> None:
    layer = found(captured("llama-8b", 131072), "2x8xH100-80GB", 16, sequence_parallel=True)
    check(layer, 8)


def test_one_key_head_for_32_queries() -> None:
    """Though the queries' heads would split, 2 x 128 features of keys and values are little to gather."""
    layer = found(captured("llama-8b", 131072, ("num_key_value_heads", 1)), "8xH100-80GB", 8, sequence_parallel=True)
    check(layer, 1)


def test_as_many_key_heads_as_queries_are_exchanged_instead() -> None:
    layer = found(captured("llama-8b", 131072, ("num_key_value_heads", 32)), "8xH100-80GB", 8, sequence_parallel=True)
    assert layer.forward == {"all_to_all": 4}
