"""Losses: rows are summed (a mean needs care), the vocabulary splits by a lowering of its own."""

from __future__ import annotations

from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, aligned, broadcast, rule

_NONE, _MEAN, _SUM = 0, 1, 2


def _classes_first(call: Call) -> tuple[Dims, Dims, Dims]:
    """Of logits (c), (n, c) or (n, c, ...): their dims, the rows' dims, and the class dim."""
    x = call.shape("self")
    c = call.factor("c", x[0] if len(x) == 1 else x[1])
    rows = call.factors("n", (*x[:1], *x[2:]) if len(x) > 1 else ())
    return ((*rows[:1], c, *rows[1:]) if len(x) > 1 else (c,)), rows, (c,)


@rule(
    "aten.cross_entropy_loss",
    "autopar.cross_entropy",
    signature="self target weight reduction ignore_index label_smoothing",
)
def cross_entropy(call: Call) -> OpFactors:
    """Rows split: a sum, or a mean as sum over global count. The classes split where the target holds class numbers."""
    dims, rows, (c,) = _classes_first(call)
    reduction = call.number("reduction", _MEAN)
    by_number = call.info("target").dtype in ("int64", "int32", "uint8")
    smoothing, weighted = call.get("label_smoothing", 0.0) != 0, call.has("weight")
    reason = ""
    if not by_number:
        reason = "the target holds probabilities"
    elif weighted or smoothing:
        reason = "class weights and label smoothing need every class"
    if reason:
        call.blocked.update(dict.fromkeys(c, reason))
    if reduction == _MEAN and (weighted or not by_number):
        for names in rows:
            call.blocked.update(dict.fromkeys(names, "the mean is weighted by the targets"))
    lowerings: dict[str, str] = dict.fromkeys(c, Lowering.VOCAB_PARALLEL_CROSS_ENTROPY)
    if reduction == _MEAN:
        lowerings |= {name: Lowering.SUM_OVER_COUNT for names in rows for name in names}
    return call.build(
        {"self": dims, "target": rows if by_number else dims, "weight": (c,)},
        (rows if reduction == _NONE else (),),
        reducing=() if reduction == _NONE else rows,
        whole=(c,),
        rigid=(c,),
        padded=(c,),
        lowerings=lowerings,
    )


@rule("aten.nll_loss", "aten.nll_loss_nd", signature="self target weight reduction ignore_index")
def nll_loss(call: Call) -> OpFactors:
    """As cross entropy, without a split of the classes; a mean over split rows is left out."""
    dims, rows, (c,) = _classes_first(call)
    reduction = call.number("reduction", _MEAN)
    call.blocked.update(dict.fromkeys(c, "the target's class is looked up"))
    if reduction == _MEAN:
        for names in rows:
            call.blocked.update(dict.fromkeys(names, "the mean counts the valid targets"))
    operands = {"self": dims, "target": rows, "weight": (c,)}
    reducing = () if reduction == _NONE else rows
    return call.build(operands, (rows if reduction == _NONE else (),), reducing=reducing)


_PAIRWISE = "aten.mse_loss aten.l1_loss aten.smooth_l1_loss aten.huber_loss aten.soft_margin_loss"


@rule(*_PAIRWISE.split(), signature="self target reduction")
@rule("aten.binary_cross_entropy", signature="self target weight reduction")
@rule("aten.binary_cross_entropy_with_logits", signature="self target weight pos_weight reduction")
def pairwise(call: Call) -> OpFactors:
    """Losses of pairs of numbers: every dim splits, a mean as the scaled mean of the shards."""
    shapes = call.operand_shapes()
    dims = call.factors("i", broadcast(shapes))
    reduction = call.number("reduction", _MEAN)
    names = [name for name in call.args if call.is_tensor(name)]
    operands = {name: aligned(call.shape(name), dims) for name in names}
    if reduction == _NONE:
        return call.build(operands, (dims,))
    lowerings = {name: Lowering.SCALED_MEAN for item in dims for name in item} if reduction == _MEAN else {}
    return call.build(operands, ((),), reducing=dims, lowerings=lowerings)


@rule("aten.kl_div", signature="self target reduction")
def kl_div(call: Call) -> OpFactors:
    return pairwise(call)
