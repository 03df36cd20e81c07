"""Collectives as a training step issues them on CPUs: torch's functional ones, into fresh memory, with their copies.

A tensor axis sums, gathers and scatters by functional collectives, which gloo serves by other programs than the plain
ones, and which leave their operand as it is: a sum is one of a copy. Shards lie side by side in a dim inside the
tensor, so that what is gathered is put in order, and what is scattered is taken apart, by a copy of the whole. On GPUs
such copies pass at the rate of memory, many times a link's, and the plain collectives are measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

OUTER = 8  # of the dims before the one that is split

_ops = torch.ops._c10d_functional


def step_collective(collective: str, group: dist.ProcessGroup, numel: int) -> Callable[[], Tensor]:
    """A call of the collective on a float32 tensor of about `numel` elements as a whole, which all of the group make.

    For an all-to-all `numel` is of this rank's part.
    """
    ranks, name = group.size(), group.group_name
    width = max(1, round(numel / (OUTER * ranks)))  # of a shard, in each of the outer positions
    own = float(group.rank())
    whole, shard = torch.full((OUTER, ranks * width), own), torch.full((OUTER, width), own)

    def all_reduce() -> Tensor:
        return _wait(_ops.all_reduce(whole, "sum", name))

    def all_gather() -> Tensor:
        stacked = _wait(_ops.all_gather_into_tensor(shard.unsqueeze(0), ranks, name))
        return stacked.view(ranks, OUTER, width).movedim(0, 1).flatten(1, 2)

    def reduce_scatter() -> Tensor:
        return _wait(_ops.reduce_scatter_tensor(_taken_apart(whole, ranks), "sum", ranks, name))

    def all_to_all() -> Tensor:
        ones = [1] * ranks
        received = _wait(_ops.all_to_all_single(_taken_apart(whole, ranks), ones, ones, name))
        return received.flatten(0, 1)  # from dim 1 to dim 0: what came is in order

    return {
        "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter, "all_to_all": all_to_all,
    }[collective]


def _taken_apart(whole: Tensor, ranks: int) -> Tensor:
    """Shape (ranks, outer, width): every rank's shard of the second dim, a copy."""
    return whole.view(OUTER, ranks, -1).movedim(1, 0).contiguous()


def _wait(started: Tensor) -> Tensor:
    result: Tensor = _ops.wait_tensor(started)
    return result
