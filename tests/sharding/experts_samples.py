"""Calls of the experts of a mixture, with gates of every layout."""

from __future__ import annotations

import torch
from sampling import SAMPLES, Pick
from shard_compare import Sample

from autopar.graph.experts import EXPERTS_OP, gate_text

T = torch.Tensor


def halves(rows: T) -> T:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def pairs(rows: T) -> T:
    gate, up = rows[..., ::2].clamp(max=1.0), rows[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def single(rows: T) -> T:
    return torch.relu(rows).square()


def mixing(rows: T) -> T:
    """No loop over the inner columns."""
    return torch.softmax(rows, -1)


GATES = {"halves": (halves, 2), "pairs": (pairs, 2), "single": (single, 1), "mixing": (mixing, 1)}


def experts(pick: Pick, kind: str) -> Sample:
    gate, each = GATES[kind]
    t, k, e, d, f = pick.one_of(4, 6, 12), pick.one_of(1, 2, 3), pick.one_of(4, 6), pick.one_of(2, 3), pick.one_of(4, 6)
    transposed, biased = pick.flag(), pick.flag()
    up, down = pick.x(e, each * f, d), pick.x(e, d, f)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (pick.x(e, each * f), pick.x(e, d)) if biased else (None, None)
    text = gate_text(gate, each * f, torch.float64)
    assert text is not None
    index = pick.ids(e + pick.one_of(0, 2), t, k) - pick.one_of(0, 1)  # some choices may name no expert
    return Sample(EXPERTS_OP, (pick.x(t, d), index, pick.x(t, k), up, down, *biases, transposed, text))


for _kind in GATES:
    SAMPLES.append((EXPERTS_OP, lambda pick, kind=_kind: experts(pick, kind), 6))  # type: ignore[misc]
