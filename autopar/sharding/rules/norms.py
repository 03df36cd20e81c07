"""Normalizations: what the statistics are taken over stays whole."""

from __future__ import annotations

from autopar.sharding.factors import OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, rule


@rule(
    "aten.layer_norm",
    "aten.rms_norm",
    "aten._fused_rms_norm",
    "aten.native_layer_norm",
    signature="input shape weight bias",
)
def layer_norm(call: Call) -> OpFactors:
    """The leading dims split; weight and bias serve all of them, so their gradients are partial."""
    x, normalized = call.shape("input"), call.ints("shape")
    lead = len(x) - len(normalized)
    rows = call.factors("b", x[:lead])
    inner = call.factors("c", normalized, "a mean over the dim")
    if len(call.op.outputs) == 1:
        outputs = [(*rows, *inner)]
    else:
        statistics = (*rows, *(() for _ in normalized))
        outputs = [(*rows, *inner), *([statistics] * (len(call.op.outputs) - 1))]
    return call.build({"input": (*rows, *inner), "weight": inner, "bias": inner}, outputs)


@rule("aten.group_norm", signature="input num_groups weight bias")
def group_norm(call: Call) -> OpFactors:
    x, groups = call.shape("input"), call.number("num_groups", 1)
    n = call.factor("n", x[0])
    g = call.factor("g", groups)
    c = call.factor("c", x[1] // groups, "a mean over the group's channels")
    space = call.factors("s", x[2:], "a mean over the positions")
    channels = (*g, *c)
    dims = (n, channels, *space)
    return call.build({"input": dims, "weight": (channels,), "bias": (channels,)}, (dims,))


@rule("aten.instance_norm", signature="input weight bias running_mean running_var use_input_stats")
def instance_norm(call: Call) -> OpFactors:
    x = call.shape("input")
    reason = "running statistics over the batch, whole on every rank" if call.has("running_mean") else ""
    n, c = call.factor("n", x[0], reason), call.factor("c", x[1], reason)
    dims = (n, c, *call.factors("s", x[2:], "a mean over the positions"))
    names = ("weight", "bias", "running_mean", "running_var")
    return call.build({"input": dims, **dict.fromkeys(names, (c,))}, (dims,))


def _batch_norm(call: Call, *, training: bool) -> OpFactors:
    x = call.shape("input")
    reason = "batch statistics are taken over the whole batch" if training else ""
    n, c = call.factor("n", x[0], reason), call.factor("c", x[1])
    dims = (n, c, *call.factors("s", x[2:], reason))
    names = ("weight", "bias", "running_mean", "running_var")
    outputs = [dims]
    for name in call.op.outputs[1:]:
        size = call.tensors[name].shape if name else ()
        outputs.append((c,) if len(size) == 1 and size[0] == x[1] else ((),) * len(size))
    return call.build({"input": dims, **dict.fromkeys(names, (c,))}, outputs)


@rule("aten.batch_norm", signature="input weight bias running_mean running_var training")
def batch_norm(call: Call) -> OpFactors:
    """Batch, channels and positions split. In training the running statistics are whole on every rank."""
    if call.get("training", False) is not True:
        return _batch_norm(call, training=False)
    x = call.shape("input")
    n, c, space = call.factor("n", x[0]), call.factor("c", x[1]), call.factors("s", x[2:])
    tracked = call.has("running_mean")
    running = call.factor("r", x[1], "the running statistics are whole on every rank") if tracked else c
    lowerings = {name: str(Lowering.SYNC_BATCH_NORM) for names in (n, *space) for name in names}
    if tracked:
        lowerings |= dict.fromkeys(c, Lowering.CHANNEL_STATISTICS)
    operands = {"input": (n, c, *space), "weight": (c,), "bias": (c,), "running_mean": (running,)}
    operands["running_var"] = (running,)
    return call.build(operands, ((n, c, *space),), rigid=(c,) if tracked else (), lowerings=lowerings)


@rule("aten.native_batch_norm", signature="input weight bias running_mean running_var training")
@rule("aten._native_batch_norm_legit_functional", signature="input weight bias running_mean running_var training")
def native_batch_norm(call: Call) -> OpFactors:
    """Channels split, with the running statistics; the batch too where the stored statistics are used."""
    return _batch_norm(call, training=call.get("training", False) is True)


@rule("aten._weight_norm", signature="v g dim")
def weight_norm(call: Call) -> OpFactors:
    """`g * v / |v|`, the norm taken over every dim but one; that one splits."""
    v, g, kept = call.shape("v"), call.shape("g"), call.number("dim", 0)
    dims = tuple(call.factor(f"i{d}", n, "" if d == kept else "a norm over the dim") for d, n in enumerate(v))
    own = dims[-len(g) :] if g else ()
    return call.build({"v": dims, "g": tuple(f if n != 1 else () for n, f in zip(g, own, strict=True))}, (dims,))
