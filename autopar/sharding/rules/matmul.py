"""Matrix products: the shared dim is a sum, every other dim splits."""

from __future__ import annotations

from autopar.graph.linears import LINEARS_OP
from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, Factor, aligned, broadcast, rule


def _with_bias(call: Call, k: Factor, bias: str) -> dict[str, str]:
    return dict.fromkeys(k, Lowering.BIAS_ON_FIRST_RANK) if call.has(bias) else {}


@rule("aten.linear", signature="input weight bias")
def linear(call: Call) -> OpFactors:
    x, w = call.shape("input"), call.shape("weight")
    rows, k = call.factors("b", x[:-1]), call.factor("k", x[-1])
    n = (call.factor("n", w[0]),) if len(w) == 2 else ()
    operands = {"input": (*rows, k), "weight": (*n, k), "bias": n}
    # Rows of zeros in weight and bias give zeros; no gradient comes back to those, so the rows stay zeros.
    lowerings = _with_bias(call, k, "bias")
    return call.build(operands, ((*rows, *n),), reducing=(k,), padded=n, lowerings=lowerings)


@rule(LINEARS_OP, signature="data weights biases joined")
def linears(call: Call) -> OpFactors:
    """Several linears of one input. An axis splits the columns of all of them, each for itself, or of none."""
    data, *tensors = call.operand_shapes()
    weights = [shape for shape in tensors if len(shape) == 2]
    has_biases = len(tensors) > len(weights)
    rows = call.factors("b", data[:-1])
    k = call.factor("k", data[-1], "every rank would add the biases" if has_biases else "")
    n = [call.factor(f"n{i}", shape[0], "all columns split or none") for i, shape in enumerate(weights)]
    operands: dict[str, Dims | list[Dims]] = {
        "data": (*rows, k), "weights": [(own, k) for own in n], "biases": [(own,) for own in n],
    }
    together = tuple(name for own in n for name in own)
    return call.build(
        operands, [(*rows, own) for own in n], reducing=() if has_biases else (k,),
        joint={"n": together} if len(together) == len(n) else {},
    )


@rule("aten.addmm", "aten.baddbmm", signature="bias a b")
def addmm(call: Call) -> OpFactors:
    a, b = call.shape("a"), call.shape("b")
    batch = call.factors("b", a[:-2])
    m, k, n = call.factor("m", a[-2]), call.factor("k", a[-1]), call.factor("n", b[-1])
    out = (*batch, m, n)
    operands = {"bias": aligned(call.shape("bias"), out), "a": (*batch, m, k), "b": (*batch, k, n)}
    return call.build(operands, (out,), reducing=(k,), lowerings=_with_bias(call, k, "bias"))


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", signature="a b")
def matmul(call: Call) -> OpFactors:
    """torch.matmul's cases: a one-dimensional operand has no row (or column), batch dims broadcast."""
    a, b = call.shape("a"), call.shape("b")
    batch = call.factors("b", broadcast((a[:-2], b[:-2])))
    k = call.factor("k", a[-1])
    m: Dims = (call.factor("m", a[-2]),) if len(a) > 1 else ()
    n: Dims = (call.factor("n", b[-1]),) if len(b) > 1 else ()
    left = (*aligned(a[:-2], batch), *m, k)
    right = (*aligned(b[:-2], batch), k, *n)
    return call.build({"a": left, "b": right}, ((*batch, *m, *n),), reducing=(k,))


@rule("aten.einsum", signature="equation tensors")
def einsum(call: Call) -> OpFactors:
    equation = call.get("equation")
    assert isinstance(equation, str)
    left, _, right = equation.replace(" ", "").partition("->")
    terms, shapes = left.split(","), call.operand_shapes()
    if "->" not in equation or "..." in equation or any(len(set(term)) != len(term) for term in terms):
        return call.unsplit("an einsum with an ellipsis, a diagonal or no output")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    factor = {letter: call.factor(letter, size) for letter, size in sizes.items()}
    operands = [
        tuple(factor[letter] if size != 1 else () for letter, size in zip(term, shape, strict=True))
        for term, shape in zip(terms, shapes, strict=True)
    ]
    reducing = [names for letter, names in factor.items() if letter not in right]
    return call.build({"tensors": operands}, (tuple(factor[letter] for letter in right),), reducing=reducing)
