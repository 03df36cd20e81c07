"""Calls of attention, normalizations and losses."""

from __future__ import annotations

from typing import Any

import torch
from sampling import Pick, sample
from shard_compare import Sample

T = torch.Tensor


@sample("scaled_dot_product_attention.default")
def attention(pick: Pick, target: str) -> Sample:
    b, g, d, s = pick.one_of(1, 2, 6), pick.one_of(1, 2, 3, 6), pick.one_of(2, 4), pick.one_of(3, 4, 6)
    kind = pick.one_of("plain", "causal", "mask", "bias", "grouped", "grouped mask", "keys", "scale", "flat")
    r = pick.one_of(2, 3, 6) if kind.startswith("grouped") else 1
    lead = (b,) if kind == "flat" else (b, g)
    keys = pick.one_of(2, 6) if kind == "keys" else s
    q = pick.x(*((b,) if kind == "flat" else (b, g * r)), s, d)
    k, v = pick.x(*lead, keys, d), pick.x(*lead, keys, d)
    given: dict[str, Any] = {}
    if kind == "causal":
        given["is_causal"] = True
    if kind == "scale":
        given["scale"] = 0.3
    if kind.startswith("grouped"):
        given["enable_gqa"] = True
    mask = ()
    if "mask" in kind:
        mask = (pick.ids(2, pick.one_of(1, b), pick.one_of(1, g * r), s, keys).bool() | torch.eye(s, keys).bool(),)
    if kind == "bias":
        mask = (pick.x(*pick.one_of((b, g, s, keys), (g, s, keys), (s, keys), (b, 1, 1, keys))),)
    return Sample(target, (q, k, v, *mask), given, frozen=(3,) if "mask" in kind else ())


@sample("scaled_dot_product_attention.default", draws=8)
def causal_attention(pick: Pick, target: str) -> Sample:
    """With as many keys as queries, which split, and with fewer, which do not."""
    b, g, r, d, s = pick.one_of(1, 2), pick.one_of(1, 3), pick.one_of(1, 2), pick.one_of(2, 4), pick.one_of(4, 6, 12)
    keys = s if pick.rng.random() < 0.8 else 3
    given = {"enable_gqa": True, **pick.one_of({}, {"scale": 0.3})}
    operands = (pick.x(b, g * r, s, d), pick.x(b, g, keys, d), pick.x(b, g, keys, d))
    if pick.flag():
        return Sample(target, operands, {"is_causal": True, **given})
    return Sample(target, (*operands, None, 0.0, True), given)


@sample("layer_norm.default")
def layer_norm(pick: Pick, target: str) -> Sample:
    normalized = pick.one_of((6,), (3, 4))
    affine = (pick.x(*normalized), pick.x(*normalized)) if pick.flag() else ()
    return Sample(target, (pick.x(*pick.shape(2), *normalized), list(normalized), *affine))


@sample("native_layer_norm.default")
def native_layer_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], pick.x(6), pick.x(6), 1e-5))


@sample("rms_norm.default")
def rms_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], *((pick.x(6),) if pick.flag() else ())))


@sample("_fused_rms_norm.default")
def fused_rms_norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(*pick.shape(2), 6), [6], pick.x(6), 1e-5))


@sample("group_norm.default")
def group_norm(pick: Pick, target: str) -> Sample:
    affine = (pick.x(12), pick.x(12)) if pick.flag() else ()
    return Sample(target, (pick.x(pick.one_of(2, 6), 12, 3), pick.one_of(1, 2, 3, 6, 12), *affine))


@sample("_weight_norm.default")
def weight_norm(pick: Pick, target: str) -> Sample:
    shape = [6, 4, 3]
    dim = pick.one_of(0, 2)
    return Sample(target, (pick.x(*shape), pick.x(*(n if d == dim else 1 for d, n in enumerate(shape))), dim))


@sample("instance_norm.default")
def instance_norm(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    return Sample(target, (pick.x(pick.one_of(2, 6), c, 4), pick.x(c), pick.x(c), None, None, True, 0.1, 1e-5, False))


@sample("batch_norm.default", draws=8)
def batch_norm(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    affine = (pick.x(c), pick.x(c)) if pick.flag() else (None, None)
    x = pick.x(pick.one_of(4, 6), c, *pick.one_of((), (3,), (2, 6), (4, 4)))
    frozen = (3, 4) if affine[0] is not None else (1, 2)
    return Sample(target, (x, *affine, pick.x(c), pick.positive(c), pick.flag(), 0.1, 1e-5, False), frozen=frozen)


@sample("native_batch_norm.default", "_native_batch_norm_legit_functional.default")
def native_batch_norm(pick: Pick, target: str) -> Sample:
    c = 6
    stats = (pick.x(c), pick.positive(c))
    return Sample(target, (pick.x(4, c, 2, 6), pick.x(c), pick.x(c), *stats, True, 0.1, 1e-5), frozen=(3, 4))


@sample("cross_entropy_loss.default")
def cross_entropy(pick: Pick, target: str) -> Sample:
    c = pick.one_of(4, 6)
    kind = pick.one_of("plain", "sum", "none", "ignore", "ignore", "single", "space", "weight", "smooth", "soft")
    if kind == "single":
        return Sample(target, (pick.x(c), pick.ids(c)))
    shape = (pick.one_of(6, 12), c, *((3,) if kind == "space" else ()))
    x, y = pick.x(*shape), pick.ids(c, shape[0], *shape[2:])
    if kind == "soft":
        return Sample(target, (x, torch.softmax(pick.x(*shape), 1)))
    rest: tuple[Any, ...] = {
        "sum": (None, 2),
        "none": (None, 0),
        "weight": (pick.positive(c),),
        "smooth": (None, 1, -100, 0.1),
    }.get(kind, ())
    if kind == "ignore":
        y[torch.rand(y.shape) < 0.4] = -100
        y[0] = 1
    return Sample(target, (x, y, *rest), frozen=(2,))


@sample("nll_loss_nd.default", "nll_loss.default")
def nll_loss(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), pick.ids(4, 6), None, pick.one_of(0, 1, 2)))


@sample(
    "mse_loss.default",
    "l1_loss.default",
    "smooth_l1_loss.default",
    "huber_loss.default",
    "kl_div.default",
    "soft_margin_loss.default",
)
def pairwise(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    frozen = (1,) if "soft_margin" in target else ()
    return Sample(target, (pick.x(*shape), pick.x(*shape), pick.one_of(0, 1, 2)), frozen=frozen)


@sample("binary_cross_entropy_with_logits.default")
def logits_loss(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    y = pick.ids(2, *shape).double()
    weight = pick.one_of(None, pick.positive(shape[-1]))
    return Sample(target, (pick.x(*shape), y, weight, None, pick.one_of(0, 1, 2)), frozen=(1, 2))


@sample("binary_cross_entropy.default")
def probability_loss(pick: Pick, target: str) -> Sample:
    shape = pick.shape(3)
    y = pick.ids(2, *shape).double()
    return Sample(target, (pick.positive(*shape) * 0.8, y, None, pick.one_of(0, 1, 2)), frozen=(1,))
