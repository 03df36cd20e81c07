"""Calls of recurrent layers, of bags of embeddings and of sums over edges."""

from __future__ import annotations

from typing import Any

from sampling import Pick, sample
from shard_compare import Sample


@sample("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", draws=4)
def recurrent(pick: Pick, target: str) -> Sample:
    """One or two layers, one way or both, rows first or steps first, with and without biases."""
    name = target.split(".")[1]
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    rows, steps, k, h = pick.one_of(2, 6, 12), pick.one_of(2, 3), 4, 6
    layers, ways, biases, rows_first = pick.one_of(1, 2), pick.one_of(1, 2), pick.flag(), pick.flag()
    params: list[Any] = []
    for layer in range(layers):
        for _ in range(ways):
            params += [pick.x(gates * h, k if layer == 0 else ways * h), pick.x(gates * h, h)]
            params += [pick.x(gates * h), pick.x(gates * h)] if biases else []
    states = [pick.x(layers * ways, rows, h) for _ in range(2 if name == "lstm" else 1)]
    x = pick.x(*((rows, steps, k) if rows_first else (steps, rows, k)))
    hx = states if name == "lstm" else states[0]
    return Sample(target, (x, hx, params, biases, layers, 0.0, True, ways == 2, rows_first))


@sample("embedding_bag.padding_idx", "embedding_bag.default", draws=8)
def embedding_bag(pick: Pick, target: str) -> Sample:
    """Sums (weighted or not), means and maxima; of some, only the bags are read."""
    mode = pick.one_of(0, 0, 0, 1, 2)
    weighted = mode == 0 and pick.flag()
    table, ids = pick.x(pick.one_of(6, 12, 7), pick.one_of(4, 6)), pick.ids(6, 10)
    offsets = pick.ids(1, 4) + pick.one_of(
        pick.ids(1, 4).new_tensor([0, 2, 3, 7]), pick.ids(1, 4).new_tensor([0, 4, 4, 9])
    )
    rest = (False, mode, False, pick.x(10) if weighted else None, False)
    padding = (pick.one_of(None, None, 3),) if "padding" in target else ()
    unread = pick.one_of((1, 2, 3), (1, 2, 3), (1, 2, 3), ())
    return Sample(target, (table, ids, offsets, *rest, *padding), unread=unread)


@sample("index_add.default", draws=6)
def index_add(pick: Pick, target: str) -> Sample:
    shape, dim, count = pick.shape(3), pick.one_of(0, 1, -1), pick.size()
    source = [count if d == dim % 3 else size for d, size in enumerate(shape)]
    alpha = pick.one_of({}, {"alpha": 2.0})
    return Sample(target, (pick.x(*shape), dim, pick.ids(shape[dim], count), pick.x(*source)), alpha)
