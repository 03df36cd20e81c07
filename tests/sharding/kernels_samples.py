"""Calls of this project's own kernels."""

from __future__ import annotations

from sampling import SAMPLES, Pick
from shard_compare import Sample

from autopar.graph.kernels import ACTIVATIONS, CROSS_ENTROPY_OP, GATED_OP, MEAN, SUM


def gated(pick: Pick) -> Sample:
    shape = pick.shape(pick.one_of(1, 2, 3))
    return Sample(GATED_OP, (pick.x(*shape), pick.x(*shape), pick.one_of(*ACTIVATIONS)))


def cross_entropy(pick: Pick) -> Sample:
    rows, classes = pick.one_of(6, 12), pick.one_of(4, 6)
    target = pick.ids(classes, rows)
    if pick.flag():
        target[1::3] = -100
    return Sample(CROSS_ENTROPY_OP, (pick.x(rows, classes), target, None, pick.one_of(MEAN, SUM), -100, 0.0))


SAMPLES.append((GATED_OP, gated, 16))
SAMPLES.append((CROSS_ENTROPY_OP, cross_entropy, 16))
