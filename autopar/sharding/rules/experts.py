"""The experts of a mixture: tokens, experts and the experts' inner dim split; tokens and experts by an exchange."""

from __future__ import annotations

from autopar.graph.experts import HALVES, PAIRS, SINGLE, gate_layout
from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, Factor, rule


@rule("autopar.experts", signature="hidden index weights up down up_bias down_bias transposed gate")
def experts(call: Call) -> OpFactors:
    """`t d, t k, t k, e (n f) d, e o f -> t o`, a sum over k, e and f; n is 2 where gates and ups lie side by side.

    Every token meets k of the e experts, so that a split of e leaves partial outputs. The joint split "t+e" gives each
    rank some of the tokens and some of the experts.
    """
    tokens, width = call.shape("hidden")
    transposed, text = call.get("transposed") is True, call.get("gate")
    assert isinstance(text, str)
    up, down = call.shape("up"), call.shape("down")
    columns, inner = (up[2], down[1]) if transposed else (up[1], down[2])
    layout = gate_layout(text, columns)
    lopsided = call.has("down_bias") and not call.has("up_bias")
    reason = "" if layout and not lopsided else "the gate mixes inner columns" if not layout else "one bias of two"
    t, e = call.factor("t", tokens), call.factor("e", up[0])
    k = call.factor("k", call.shape("index")[1], "a token's choices stay together")
    d = call.factor("d", width, "the hidden dim is summed before the gate")
    o = call.factor("o", width, "every rank would need all of the inner dim")
    f = call.factor("f", inner, reason)
    together: Factor
    if layout == SINGLE:
        together = f
    elif layout in (HALVES, PAIRS):
        both = call.factor("n", columns // inner, "a gate and its up stay together")
        together = (*both, *f) if layout == HALVES else (*f, *both)
    else:
        together = call.factor("n", columns, reason)
    first: Dims = (e, d, together) if transposed else (e, together, d)
    second: Dims = (e, f, o) if transposed else (e, o, f)
    lowerings: dict[str, str] = dict.fromkeys(e, Lowering.OWN_EXPERTS)
    if call.has("down_bias"):
        lowerings |= dict.fromkeys(f, Lowering.BIAS_ON_FIRST_RANK)
    operands: dict[str, Dims] = {
        "hidden": (t, d), "index": (t, k), "weights": (t, k), "up": first, "down": second, "up_bias": (e, together),
        "down_bias": (e, o),
    }
    outputs: tuple[Dims, ...] = ((t, o), ())[: len(call.op.outputs)]  # the second is the backward's own
    joint = {"t+e": (*t, *e)} if t and e else {}
    lowerings |= dict.fromkeys(joint, Lowering.EXPERT_EXCHANGE)
    return call.build(operands, outputs, reducing=(e, f), rigid=(e,), lowerings=lowerings, joint=joint)
