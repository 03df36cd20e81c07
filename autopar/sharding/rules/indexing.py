"""Look-ups: embedding, gather, index and scatter. The dim that is looked up in stays whole."""

from __future__ import annotations

from autopar.graph.model_graph import Ref
from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, aligned, broadcast, normal_dim, rule

_LOOKED_UP = "the dim is looked up in"
_SUM = 0  # aten's number for a bag's reduction


@rule("aten.embedding", signature="weight indices padding_idx")
def embedding(call: Call) -> OpFactors:
    rows, width = call.shape("weight")
    v, d = call.factor("v", rows), call.factor("d", width)
    ids = call.factors("b", call.shape("indices"))
    lowerings = {"v": Lowering.VOCAB_PARALLEL_EMBEDDING}
    operands = {"weight": (v, d), "indices": ids}
    return call.build(operands, ((*ids, d),), reducing=(v,), rigid=(v,), padded=(v,), lowerings=lowerings)


@rule("aten.index_select", signature="self dim index")
def index_select(call: Call) -> OpFactors:
    shape = call.shape("self")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = [call.factor(f"i{d}", size, _LOOKED_UP if d == dim else "") for d, size in enumerate(shape)]
    taken = call.factor("n", call.output_shape()[dim])
    index: Dims = (taken,) if call.shape("index") else ()
    out = (*dims[:dim], taken, *dims[dim + 1 :])
    return call.build({"self": tuple(dims), "index": index}, (out,), linear=((0,),))


def _indexed(call: Call, x: str, other: str) -> tuple[Dims, Dims]:
    """Dims of `x` and of `other`, which looks up along `dim` and may be shorter elsewhere."""
    shape, index = call.shape(x), call.shape(other)
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims, own = [], []
    for d, (size, length) in enumerate(zip(shape, index, strict=True)):
        if d == dim:
            dims.append(call.factor(f"x{d}", size, _LOOKED_UP))
            own.append(call.factor(f"n{d}", length))
        elif size == length:
            dims.append(call.factor(f"i{d}", size))
            own.append(dims[-1])
        else:
            dims.append(call.factor(f"x{d}", size, "the index covers a part of the dim"))
            own.append(call.factor(f"n{d}", length, "the index covers a part of the dim"))
    return tuple(dims), tuple(own)


@rule("aten.gather", signature="self dim index")
def gather(call: Call) -> OpFactors:
    if not call.shape("self"):
        return call.unsplit("a single number")
    dims, own = _indexed(call, "self", "index")
    return call.build({"self": dims, "index": own}, (own,), linear=((0,),))


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_", "aten.scatter_add_", signature="self dim index src")
def scatter(call: Call) -> OpFactors:
    """Dims outside `dim` where all tensors are equally long split; the rest stays whole."""
    dims, own = _indexed(call, "self", "index")
    for names in own:
        for name in names:
            if name.startswith("n"):
                call.blocked[name] = _LOOKED_UP
    source = own
    if call.is_tensor("src") and call.shape("src") != call.shape("index"):
        return call.unsplit("source and index differ in shape")
    jointly = tuple(i for i, name in enumerate(call.args) if name in ("self", "src") and call.is_tensor(name))
    positions = tuple(p for p in (0, 2) if p < len(call.op.operands)) if len(jointly) == 2 else ()
    operands = {"self": dims, "index": own, "src": source, "value": ()}
    return call.build(operands, (dims,), linear=(positions,) if positions else ())


@rule("aten.index.Tensor", signature="self indices")
def index(call: Call) -> OpFactors:
    """The indices' own (broadcast) dims take the place of the dims looked up in; indices far apart put theirs first."""
    shape, given = call.shape("self"), call.args["indices"]
    assert isinstance(given, tuple)
    places = [dim for dim, item in enumerate(given) if isinstance(item, Ref)]
    infos = [call.tensors[item.name] for item in given if isinstance(item, Ref)]
    if any(info.dtype in ("bool", "uint8") for info in infos):
        return call.unsplit("a mask takes an unknown number of elements")
    dims = [call.factor(f"i{d}", size, _LOOKED_UP if d in places else "") for d, size in enumerate(shape)]
    own = call.factors("n", broadcast([info.shape for info in infos]))
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    kept = [names for d, names in enumerate(dims) if d not in places]
    out = (*kept[:first], *own, *kept[first:])
    indices = [aligned(info.shape, own) for info in infos]
    return call.build({"self": tuple(dims), "indices": indices}, (out,), linear=((0,),))


@rule("aten.index_add", "aten.index_add_", signature="self dim index source")
def index_add(call: Call) -> OpFactors:
    """Dims beside `dim` split; and what is added, each rank adding its part to zeros but the first, to `self`."""
    shape = call.shape("self")
    if not shape:
        return call.unsplit("a single number")
    dim = normal_dim(call.number("dim", 0), len(shape))
    dims = [call.factor(f"i{d}", size, _LOOKED_UP if d == dim else "") for d, size in enumerate(shape)]
    added = call.factor("n", call.shape("source")[dim])
    source = (*dims[:dim], added, *dims[dim + 1 :])
    return call.build(
        {"self": tuple(dims), "index": (added,) if call.shape("index") else (), "source": source}, (tuple(dims),),
        reducing=(added,), lowerings=dict.fromkeys(added, Lowering.BIAS_ON_FIRST_RANK), linear=((0, 2),),
    )


_BAG = "weight indices offsets scale_grad_by_freq mode sparse per_sample_weights include_last_offset padding_idx"


@rule("aten.embedding_bag", signature=_BAG)
def embedding_bag(call: Call) -> OpFactors:
    """The features split, and the vocabulary where bags are sums: each rank adds up what it holds of them."""
    rows, width = call.shape("weight")
    mode = call.number("mode", _SUM)
    reason = "" if mode == _SUM else "a mean or maximum of a bag needs all of it"
    if call.has("padding_idx") or call.get("scale_grad_by_freq", False) is True:
        reason = "padding and frequencies are counted in the whole vocabulary"
    if any(call.op.outputs[1:]):
        reason = "more than the bags is read"
    v, d = call.factor("v", rows, reason), call.factor("d", width)
    inside = call.factors("i", call.shape("indices"), "bags begin anywhere")
    starts = call.factors("b", call.shape("offsets"), "bags begin anywhere") if call.is_tensor("offsets") else ()
    outputs: list[Dims] = []
    for i, name in enumerate(call.op.outputs):
        shape = call.tensors[name].shape if name else ()
        bags = call.factors(f"o{i}_", shape[:1], "bags begin anywhere")
        outputs.append((*bags, *(d for _ in shape[1:])))
    operands = {"weight": (v, d), "indices": inside, "offsets": starts, "per_sample_weights": inside}
    return call.build(
        operands, outputs, reducing=(v,) if not reason else (), rigid=(v,),
        lowerings=dict.fromkeys(v, Lowering.VOCAB_PARALLEL_EMBEDDING_BAG) if not reason else None,
    )


@rule("aten.index_put", "aten.index_put_", "aten.index_copy", "aten.masked_scatter", "aten.put")
def whole_only(call: Call) -> OpFactors:
    return call.unsplit("elements are written at positions known only when it runs")
