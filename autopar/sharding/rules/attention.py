"""Scaled dot product attention: batch and heads split, queries too where no causal mask is implied."""

from __future__ import annotations

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, Factor, aligned, broadcast, rule


@rule("aten.scaled_dot_product_attention", signature="query key value attn_mask dropout_p is_causal")
def attention(call: Call) -> OpFactors:
    """`b h q d, b g k d, b g k e -> b h q e`; with grouped queries h is (g, r) and r shares a key head."""
    query, key, value = (call.shape(name) for name in ("query", "key", "value"))
    grouped = call.get("enable_gqa", False) is True and len(query) > 2
    lead = len(query) - 3 if grouped else len(query) - 2
    batch = call.factors("b", broadcast((query[:lead], key[:lead], value[:lead])))
    heads: tuple[Factor, ...] = ()
    shared: tuple[Factor, ...] = ()
    if grouped:
        groups = call.factor("g", key[-3])
        heads, shared = ((*groups, *call.factor("r", query[-3] // key[-3])),), (groups,)
        if key[-3] != value[-3]:
            return call.unsplit("key and value differ in heads")
    causal = "a causal mask counts positions from the start" if call.get("is_causal", False) is True else ""
    q = call.factor("q", query[-2], causal)
    k = call.factor("k", key[-2], "a softmax over the keys")
    d = call.factor("d", query[-1], "the head dim is summed before a softmax")
    e = call.factor("e", value[-1], "the head dim stays whole")
    scores = (*batch, *heads, q, k)
    operands: dict[str, Dims] = {
        "query": (*aligned(query[:lead], batch), *heads, q, d),
        "key": (*aligned(key[:lead], batch), *shared, k, d),
        "value": (*aligned(value[:lead], batch), *shared, k, e),
    }
    if call.has("attn_mask"):
        operands["attn_mask"] = aligned(call.shape("attn_mask"), scores)
    random = call.get("dropout_p", 0.0) != 0.0
    return call.build(operands, ((*batch, *heads, q, e),), split_lowering=Lowering.AXIS_RANDOM if random else "")
