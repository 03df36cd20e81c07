"""Reductions, softmaxes and scans: the dims they do not touch split; sums over a split dim leave a partial value."""

from __future__ import annotations

from autopar.sharding.factors import OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, normal_dim, rule

_FIRST = ((0,),)


def _reduced(call: Call) -> set[int]:
    """The dims that the op reduces; all of them where it names none."""
    rank = len(call.shape("self"))
    dims = {normal_dim(dim, rank) for dim in call.ints("dim")}
    return dims or set(range(rank))


def _reduction(call: Call, *, blocked: str = "", lowering: str = "", linear: bool = False) -> OpFactors:
    shape = call.shape("self")
    reduced = _reduced(call)
    dims = [call.factor(f"i{d}", size, blocked if d in reduced else "") for d, size in enumerate(shape)]
    if call.get("keepdim", False) is True:
        out = tuple(() if d in reduced else names for d, names in enumerate(dims))
    else:
        out = tuple(names for d, names in enumerate(dims) if d not in reduced)
    reducing = [dims[d] for d in reduced] if not blocked else []
    return call.build(
        {"self": tuple(dims)},
        (out,) * len(call.op.outputs),
        reducing=reducing,
        lowerings={name: lowering for names in reducing for name in names} if lowering else None,
        linear=_FIRST if linear else (),
    )


@rule("aten.sum", "aten.nansum", signature="self dim keepdim")
def sum_(call: Call) -> OpFactors:
    return _reduction(call, linear=not call.op.target.startswith("aten.nansum"))


@rule("aten.mean", signature="self dim keepdim")
def mean(call: Call) -> OpFactors:
    return _reduction(call, lowering=Lowering.SCALED_MEAN, linear=True)


@rule(
    "aten.amax", "aten.amin", "aten.max.dim", "aten.min.dim", "aten.argmax", "aten.argmin", signature="self dim keepdim"
)
def extremum(call: Call) -> OpFactors:
    return _reduction(call, blocked="a maximum over the dim")


@rule(
    "aten.max.default",
    "aten.min.default",
    "aten.prod.default",
    "aten.any.default",
    "aten.all.default",
    signature="self",
)
def over_everything(call: Call) -> OpFactors:
    return _reduction(call, blocked="not a sum over the dim")


@rule("aten.prod", "aten.any", "aten.all", "aten.logsumexp", "aten.median.dim", signature="self dim keepdim")
def other_reduction(call: Call) -> OpFactors:
    return _reduction(call, blocked="not a sum over the dim")


@rule(
    "aten.var.correction",
    "aten.std.correction",
    "aten.var_mean.correction",
    "aten.std_mean.correction",
    signature="self dim",
)
@rule("aten.var.default", "aten.std.default", "aten.var_mean.default", "aten.std_mean.default", signature="self")
def variance_correction(call: Call) -> OpFactors:
    return _reduction(call, blocked="a variance over the dim")


@rule("aten.var.dim", "aten.std.dim", "aten.var_mean.dim", "aten.std_mean.dim", signature="self dim unbiased keepdim")
def variance(call: Call) -> OpFactors:
    return _reduction(call, blocked="a variance over the dim")


@rule("aten.linalg_vector_norm", "aten.norm", signature="self ord dim keepdim")
def norm(call: Call) -> OpFactors:
    return _reduction(call, blocked="a norm over the dim")


def _along(call: Call, reason: str, linear: bool = False) -> OpFactors:
    """An op that keeps the shape and works along one dim."""
    shape = call.shape("self")
    along = normal_dim(call.number("dim", -1), len(shape))
    dims = tuple(call.factor(f"i{d}", size, reason if d == along else "") for d, size in enumerate(shape))
    return call.build({"self": dims}, (dims,) * len(call.op.outputs), linear=_FIRST if linear else ())


@rule("aten.histc", signature="self bins min max")
def histogram(call: Call) -> OpFactors:
    """Counts add up where the bins are given; without bounds they are of the values' range."""
    given = call.get("min", 0) != call.get("max", 0)
    shape = call.shape("self")
    dims = tuple(call.factor(f"i{d}", size, "" if given else "bins of the range") for d, size in enumerate(shape))
    bins = call.factor("bins", call.output_shape()[0], "a bin counts all values")
    return call.build({"self": dims}, ((bins,),), reducing=dims if given else ())


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", signature="self dim")
def softmax(call: Call) -> OpFactors:
    return _along(call, "a softmax over the dim")


@rule("aten.cumsum", signature="self dim")
def cumsum(call: Call) -> OpFactors:
    return _along(call, "a running sum along the dim", linear=True)


@rule("aten.cumprod", "aten.logcumsumexp", "aten.sort.default", "aten.argsort.default", signature="self dim")
def scan(call: Call) -> OpFactors:
    return _along(call, "the dim is worked on in order")


@rule("aten.topk", signature="self k dim")
def topk(call: Call) -> OpFactors:
    shape, reason = call.shape("self"), "the largest of the dim"
    along = normal_dim(call.number("dim", -1), len(shape))
    dims = [call.factor(f"i{d}", size, reason if d == along else "") for d, size in enumerate(shape)]
    taken = call.factor("k", call.number("k", 1), reason)
    out = (*dims[:along], taken, *dims[along + 1 :])
    return call.build({"self": tuple(dims)}, (out,) * len(call.op.outputs))


@rule("aten.glu", signature="self dim")
def glu(call: Call) -> OpFactors:
    """The halves are blocks of the dim; inside them it is pointwise."""
    shape = call.shape("self")
    along = normal_dim(call.number("dim", -1), len(shape))
    dims = [call.factor(f"i{d}", size) if d != along else () for d, size in enumerate(shape)]
    halves = call.factor("halves", 2, "the two halves meet")
    inner = call.factor("inner", shape[along] // 2)
    before = (*dims[:along], (*halves, *inner), *dims[along + 1 :])
    return call.build({"self": before}, ((*dims[:along], inner, *dims[along + 1 :]),))
