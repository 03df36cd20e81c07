"""Where heads do not split and the network is slow, the search lets keys and values go round behind compute."""

from real_blocks import captured, found

from autopar.sharding.lowering import Lowering
from autopar.sharding.state import shard


def test_28_heads_on_8_nodes() -> None:
    """One device a node, and keys and values as wide as queries: a gather of them would be waited for."""
    layer = found(captured("qwen2-7b", 131072, ("num_key_value_heads", 28)), "8x1xH100-80GB", 8, sequence_parallel=True)
    (attention,) = layer.strategies("scaled_dot_product_attention")
    assert attention.lowering == Lowering.RING_ATTENTION
    assert (attention.inputs, attention.outputs) == ((shard(2),) * 3, (shard(2),))
    assert not layer.forward and not layer.backward  # nothing is converted
    assert set(layer.params().values()) == {"RP"}


def test_28_heads_on_the_8_devices_of_one_node() -> None:
    """Gathering over NVLink takes less than merging 8 parts of every row."""
    layer = found(captured("qwen2-7b", 131072), "8xH100-80GB", 8, sequence_parallel=True)
    (attention,) = layer.strategies("scaled_dot_product_attention")
    assert attention.lowering == Lowering.CAUSAL_CONTEXT
