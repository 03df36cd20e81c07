"""Calls of reductions, matrix products and look-ups."""

from __future__ import annotations

import torch
from sampling import Pick, sample
from shard_compare import Sample


@sample(
    "sum.dim_IntList",
    "mean.dim",
    "amax.default",
    "amin.default",
    "var.correction",
    "std.correction",
    "logsumexp.default",
)
def reduce(pick: Pick, target: str) -> Sample:
    dims = pick.one_of([0], [1], [-1], [0, 2])
    if "correction" in target:
        return Sample(target, (pick.x(4, 6, 3), dims), {"correction": 1, "keepdim": pick.flag()})
    return Sample(target, (pick.x(4, 6, 3), dims, pick.flag()))


@sample("var.dim", "std.dim", "var_mean.dim", "std_mean.dim")
def variance(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of([1], [0, 2]), True, pick.flag()))


@sample("var_mean.correction", "std_mean.correction")
def var_mean(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), [1]), {"correction": 0, "keepdim": pick.flag()})


@sample(
    "sum.default",
    "mean.default",
    "max.default",
    "min.default",
    "prod.default",
    "var.default",
    "std.default",
    "nansum.default",
    "var_mean.default",
    "std_mean.default",
)
def reduce_all(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3),))


@sample("max.dim", "min.dim", "prod.dim_int", "median.dim", "argmax.default", "argmin.default")
def reduce_one(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of(0, 1, -1), pick.flag()))


@sample("any.dim", "all.dim")
def boolean(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.ids(2, 4, 6).bool(), pick.one_of(0, 1), pick.flag()))


@sample("any.default", "all.default")
def boolean_all(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.ids(2, 4, 6).bool(),))


@sample("linalg_vector_norm.default", "norm.ScalarOpt_dim")
def norm(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), 2, [pick.one_of(0, 1, -1)], pick.flag()))


@sample(
    "softmax.int",
    "log_softmax.int",
    "cumsum.default",
    "cumprod.default",
    "logcumsumexp.default",
    "sort.default",
    "argsort.default",
    "glu.default",
)
def along(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 12), pick.one_of(0, 1, -1)))


@sample("_softmax.default", "_log_softmax.default")
def raw_softmax(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6, 3), pick.one_of(0, 1, -1), False))


@sample("topk.default")
def topk(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 2, pick.one_of(0, 1, -1)))


@sample("histc.default")
def histc(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 5, *pick.one_of((), (-1, 2), (0, 5.0))))


@sample("linear.default")
def linear(pick: Pick, target: str) -> Sample:
    n, k = pick.size(), pick.size()
    bias = (pick.x(n),) if pick.flag() else ()
    return Sample(target, (pick.x(*pick.shape(pick.one_of(0, 1, 2)), k), pick.x(n, k), *bias))


@sample("addmm.default")
def addmm(pick: Pick, target: str) -> Sample:
    m, k, n = pick.shape(3)
    bias = pick.one_of((n,), (m, n), (1, n), (m, 1))
    scale = {"alpha": 2.0, "beta": 0.5} if pick.flag() else {}
    return Sample(target, (pick.x(*bias), pick.x(m, k), pick.x(k, n)), scale)


@sample("baddbmm.default")
def baddbmm(pick: Pick, target: str) -> Sample:
    b, m, k, n = pick.shape(4)
    return Sample(target, (pick.x(*pick.one_of((b, m, n), (1, m, n))), pick.x(b, m, k), pick.x(b, k, n)))


@sample("mm.default")
def mm(pick: Pick, target: str) -> Sample:
    m, k, n = pick.shape(3)
    return Sample(target, (pick.x(m, k), pick.x(k, n)))


@sample("bmm.default")
def bmm(pick: Pick, target: str) -> Sample:
    b, m, k, n = pick.shape(4)
    return Sample(target, (pick.x(b, m, k), pick.x(b, k, n)))


@sample("mv.default")
def mv(pick: Pick, target: str) -> Sample:
    m, k = pick.shape(2)
    return Sample(target, (pick.x(m, k), pick.x(k)))


@sample("dot.default")
def dot(pick: Pick, target: str) -> Sample:
    k = pick.size()
    return Sample(target, (pick.x(k), pick.x(k)))


@sample("matmul.default")
def matmul(pick: Pick, target: str) -> Sample:
    b, c, m, k, n = pick.shape(5)
    one, two = pick.one_of(
        ((b, c, m, k), (b, c, k, n)),
        ((b, 1, m, k), (c, k, n)),
        ((b, m, k), (k, n)),
        ((k,), (b, k, n)),
        ((b, m, k), (k,)),
        ((k,), (k,)),
    )
    return Sample(target, (pick.x(*one), pick.x(*two)))


@sample("einsum.default")
def einsum(pick: Pick, target: str) -> Sample:
    b, i, j, k = pick.shape(4)
    equation, shapes = pick.one_of(
        ("bij,bjk->bik", ((b, i, j), (b, j, k))), ("bi,kj->bikj", ((b, i), (k, j))), ("bij->j", ((b, i, j),)),
        ("ij,jk,kb->ib", ((i, j), (j, k), (k, b))),
    )  # fmt: skip
    return Sample(target, (equation, [pick.x(*shape) for shape in shapes]))


@sample("embedding.default")
def embedding(pick: Pick, target: str) -> Sample:
    v, d = pick.shape(2)
    return Sample(target, (pick.x(v, d), pick.ids(v, *pick.shape(pick.one_of(1, 2)))))


@sample("index_select.default")
def index_select(pick: Pick, target: str) -> Sample:
    dim = pick.one_of(0, 1)
    return Sample(target, (pick.x(4, 6, 3), dim, pick.ids(4, pick.size())))


@sample("gather.default")
def gather(pick: Pick, target: str) -> Sample:
    dim = pick.one_of(0, 1, -1)
    return Sample(
        target, (pick.x(4, 6), dim, pick.ids(4, *(pick.one_of((6, 6), (12, 6), (2, 3)) if dim == 0 else (4, 12))))
    )


@sample("scatter.src", "scatter_add.default")
def scatter(pick: Pick, target: str) -> Sample:
    index = torch.stack([torch.randperm(6)[:4] for _ in range(4)])
    return Sample(target, (pick.x(4, 6), 1, index, pick.x(4, 4)))


@sample("scatter.value")
def scatter_value(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(4, 6), 1, pick.ids(6, 4, 1), 1.0))


@sample("index.Tensor", draws=10)
def index(pick: Pick, target: str) -> Sample:
    x = pick.x(4, 6, 12)
    indices = pick.one_of(
        [pick.ids(4, 6, 1), pick.ids(6, 1, 3)], [None, pick.ids(6, 12)], [pick.ids(4, 2, 6)],
        [None, None, pick.ids(12, 6, 2)], [pick.ids(4, 6), None, pick.ids(12, 6)],
        [pick.ids(4, 2, 1), None, pick.ids(12, 3)], [None, pick.ids(6, 2), pick.ids(12, 2)],
    )  # fmt: skip
    return Sample(target, (x, indices))


@sample("index_add.default", "index_copy.default")
def index_add(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), 0, torch.randperm(6)[:2], pick.x(2, 4)))


@sample("index_put.default")
def index_put(pick: Pick, target: str) -> Sample:
    return Sample(target, (pick.x(6, 4), [pick.ids(6, 2)], pick.x(2, 4)), {"accumulate": True})
