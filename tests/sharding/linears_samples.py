"""Calls of several linears of one input."""

from __future__ import annotations

from sampling import SAMPLES, Pick
from shard_compare import Sample

from autopar.graph.linears import LINEARS_OP


def linears(pick: Pick) -> Sample:
    k, num = pick.one_of(2, 3, 4, 6), pick.one_of(2, 3)
    sizes = [pick.one_of(2, 3, 4, 6, 12) for _ in range(num)]
    biases = [pick.x(n) for n in sizes] if pick.flag() else []
    data = pick.x(*pick.shape(pick.one_of(1, 2, 3)), k)
    frozen = (0,) if pick.rng.random() < 0.2 else ()
    return Sample(LINEARS_OP, (data, [pick.x(n, k) for n in sizes], biases, pick.flag()), frozen=frozen)


SAMPLES.append((LINEARS_OP, linears, 24))
