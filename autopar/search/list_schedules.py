"""List schedules: each rank of a pipeline takes at every moment the most urgent action that can begin."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopar.plan.actions import Action, ActionLists, B, F, I, W
from autopar.simulate.events import StageTimes


def list_schedule(
    stages: Sequence[StageTimes], num_micro_batches: int, caps: Sequence[int], *, split_backward: bool = False
) -> ActionLists:
    """Each rank takes what can begin first; of that backwards before forwards before gradients of weights.

    No rank holds more than `caps[r]` micro-batches.
    """
    return timed_list_schedule(stages, num_micro_batches, caps, split_backward=split_backward)[0]


def timed_list_schedule(
    stages: Sequence[StageTimes], num_micro_batches: int, caps: Sequence[int], *, split_backward: bool
) -> tuple[ActionLists, list[float]]:
    """`list_schedule`, and when each rank ends, without its reductions, if the lists are executed."""
    p, m = len(stages), num_micro_batches
    backward = I if split_backward else B
    forward_s, weights_s = [s.forward_s for s in stages], [s.weight_backward_s for s in stages]
    backward_s = [s.input_backward_s if split_backward else s.backward_s for s in stages]
    clock, held = [stage.gather_s for stage in stages], [0] * p
    # When the input of the next forward, backward is there; and how many of each were done.
    inputs: list[list[float]] = [[0.0] * m if r == 0 else [] for r in range(p)]
    gradients: list[list[float]] = [[] for _ in range(p)]
    forwards, backwards, weights = [0] * p, [0] * p, [0] * p
    links = [[0.0] * p, [0.0] * p]
    lists: list[list[Action]] = [[] for _ in range(p)]

    def next_of(r: int) -> tuple[float, int, int]:
        """When the rank's next action begins, its kind (backward, forward, of weights), and the rank."""
        best, done = (math.inf, 3, r), backwards[r]
        if done < len(gradients[r]):
            best = (max(clock[r], gradients[r][done]), 0, r)
        if forwards[r] < len(inputs[r]) and held[r] < caps[r]:
            best = min(best, (max(clock[r], inputs[r][forwards[r]]), 1, r))
        if split_backward and weights[r] < done:
            best = min(best, (clock[r], 2, r))
        return best

    nexts = [next_of(r) for r in range(p)]
    for _ in range(p * m * (3 if split_backward else 2)):
        start, kind, r = min(nexts)
        assert kind < 3, "the oldest micro-batch can always go on"
        if kind == 1:
            clock[r] = end = start + forward_s[r]
            lists[r].append(Action(F, r, forwards[r]))
            forwards[r] += 1
            held[r] += 1
            if r + 1 < p:
                links[0][r] = max(links[0][r], end) + stages[r].send_forward_s
                inputs[r + 1].append(links[0][r])
                nexts[r + 1] = next_of(r + 1)
            else:
                gradients[r].append(end)
        elif kind == 0:
            clock[r] = end = start + backward_s[r]
            lists[r].append(Action(backward, r, backwards[r]))
            backwards[r] += 1
            held[r] -= not split_backward
            if r:
                links[1][r] = max(links[1][r], end) + stages[r].send_backward_s
                gradients[r - 1].append(links[1][r])
                nexts[r - 1] = next_of(r - 1)
        else:
            clock[r] = start + weights_s[r]
            lists[r].append(Action(W, r, weights[r]))
            weights[r] += 1
            held[r] -= 1
        nexts[r] = next_of(r)
    return tuple(map(tuple, lists)), clock
