"""Scaled dot product attention: batch, heads and queries split; keys and values are whole for a part of the queries."""

from __future__ import annotations

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, Factor, aligned, broadcast, rule


@rule("aten.scaled_dot_product_attention", signature="query key value attn_mask dropout_p is_causal")
def attention(call: Call) -> OpFactors:
    """`b h q d, b g k d, b g k e -> b h q e`; with grouped queries h is (g, r) and r shares a key head.

    Under an implied causal mask, a part of the queries needs the mask from its own first row on: a lowering, which
    knows parts of consecutive rows. The joint split "q+k" cuts keys and values like the queries, and takes them round
    the ranks: where there is no other mask and no dropout.
    """
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
    causal = call.get("is_causal", False) is True
    uneven = causal and query[-2] != key[-2]
    q = call.factor("q", query[-2], "a causal mask over queries and keys that differ in number" if uneven else "")
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
    plain = not (call.has("attn_mask") or random or uneven) and query[:lead] == key[:lead] == value[:lead]
    joint = {"q+k": (*q, *k)} if plain and q and k else {}
    lowerings: dict[str, str] = dict.fromkeys(q, Lowering.CAUSAL_CONTEXT) if causal else {}
    return call.build(
        operands,
        ((*batch, *heads, q, e),),
        rigid=(q,) if causal else (),
        lowerings=lowerings | dict.fromkeys(joint, Lowering.RING_ATTENTION),
        joint=joint,
        split_lowering=Lowering.AXIS_RANDOM if random else "",
    )
