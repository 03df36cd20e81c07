"""Where heads do not split, the search finds context parallelism: a part of the queries against gathered keys."""

import pytest
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


@pytest.mark.parametrize("tp", [2, 4])
def test_heads_that_divide_are_split_instead(tp: int) -> None:
    """Causal parts of the queries are unequal work; 28 heads on 2 and 4 ranks are not."""
    layer = found(captured("qwen2-7b", 131072), "8xH100-80GB", tp, sequence_parallel=True)
    (attention,) = layer.strategies("scaled_dot_product_attention")
    assert attention.inputs == (shard(1),) * 3
