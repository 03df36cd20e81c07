"""Room for the layers of one stage in a step of one micro-batch, and what they do in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autopar.search.variants import Option, Options, Room, Weights, cheapest
from autopar.simulate.single_backward import SingleBackward, backward_moments

TRIES = 8  # of chains of unlike layers, where a moment between the first layer's and the last's may need most


def single_room(
    single: SingleBackward, is_layer: Sequence[bool], *, limit_bytes: float, step_bytes: float, entry_bytes: float,
    host_bytes: float,
) -> Room | None:
    """The room of a stage whose blocks these are, by the moments that `single_bounds` looks at; None where it has none.

    `step_bytes`: what the optimizer needs beside the states.
    """
    own = [
        replace(block, held=0.0, beside=0.0) if layer else block
        for block, layer in zip(single.blocks, is_layer, strict=True)
    ]
    always = single.always.total
    layers = [i for i, layer in enumerate(is_layer) if layer]
    fixed = always + max(single.ending.total, single.after.total + step_bytes)
    behind = last = first = 0.0
    for i, moment in zip(reversed(range(len(own))), backward_moments(own), strict=True):
        bytes_ = always + single.kept_copies + moment.total
        if not layers or i < layers[0]:
            fixed = max(fixed, bytes_)
        elif i > layers[-1]:
            behind = max(behind, bytes_)
        if layers and i == layers[-1]:
            last = bytes_ - own[i].making
        if layers and i == layers[0]:
            first = bytes_ - own[i].making
    if fixed > limit_bytes:
        return None
    making = [own[i].making for i in (layers[-1], layers[0])] if layers else [0.0, 0.0]
    return Room(
        budget_bytes=limit_bytes - last, in_flight=1, extra_bytes=max(making[0], behind - last),
        entry_bytes=entry_bytes, host_bytes=host_bytes, first_budget_bytes=limit_bytes - first,
        first_extra_bytes=making[1],
    )


def fitting(
    layers: Sequence[Options], room: Room, weights: Weights, peak: Callable[[tuple[Option, ...]], float],
    limit_bytes: float,
) -> tuple[Option, ...] | None:
    """`cheapest`, in less room where the `peak` of what that finds is over the limit; None where nothing fits."""
    for _ in range(TRIES):
        found = cheapest(layers, room, weights)
        if found is None:
            return None
        over = peak(found) - limit_bytes
        if over <= 0:
            return found
        room = replace(room, budget_bytes=room.budget_bytes - over)
    return None
