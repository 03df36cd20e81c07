"""Which chunks of a full tensor a rank holds, and where they lie in what it holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autopar.runtime.data_parallel import held_rows
from autopar.runtime.groups import Groups
from autopar.runtime.layout import ParamLayout, local_part
from autopar.runtime.parts import BY_EXPERTS, mesh_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of a full tensor (`offsets`, `sizes`: steps of each dim) that begins at `starts` in the rank's own."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    def of(self, local: Tensor) -> Tensor:
        """The chunk as a view of what the rank holds."""
        for dim, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """What a rank holds of a full tensor of shape `shape`: `local`, and the chunks of the full one in it."""

    local: Tensor
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def whole(tensor: Tensor) -> HeldTensor:
    """A tensor of which the rank holds all."""
    shape, origin = tuple(tensor.shape), (0,) * tensor.dim()
    return HeldTensor(tensor, shape, (Chunk(offsets=origin, sizes=shape, starts=origin),))


def held_chunks(shape: Sequence[int], param: ParamLayout, parameter: Tensor, groups: Groups) -> tuple[Chunk, ...]:
    """The chunks of a full tensor of this shape that is laid out as a parameter is.

    All axes cut dims one by one, so that the numbers of a dim's steps, cut as the tensor is, say what is where; what
    they say for every dim together is a grid of boxes. Padding is in none of them.
    """
    return boxes([_steps(length, dim, param, parameter, groups) for dim, length in enumerate(shape)])


def boxes(steps: Sequence[Tensor]) -> tuple[Chunk, ...]:
    """The boxes of a tensor that holds these steps of each dim: numbered from 1, and 0 where it is padded."""
    found = []
    for runs in itertools.product(*map(_runs, steps)):
        starts, offsets, sizes = zip(*runs, strict=True) if runs else ((), (), ())
        found.append(Chunk(offsets=offsets, sizes=sizes, starts=starts))
    return tuple(found)


def _steps(length: int, dim: int, param: ParamLayout, parameter: Tensor, groups: Groups) -> Tensor:
    """The steps of a dim that this rank has, by their numbers in the full tensor from 1 on; 0 is padding."""
    steps = torch.arange(1, length + 1)
    if dim == 0 and param.by_experts:
        steps = local_part(steps, BY_EXPERTS, groups.expert_axis)
    if dim == param.state.dim:
        steps = local_part(steps, replace(param.state, dim=0), groups.tensor_axis)
    return held_rows(steps, parameter, mesh_of(param, groups)) if dim == 0 else steps


def _runs(steps: Tensor) -> list[tuple[int, int, int]]:
    """Stretches of following steps: the first one's place, its number in the full tensor from 0 on, how many."""
    if not len(steps):
        return []
    begins = [0, *((steps.diff() != 1).nonzero().flatten() + 1).tolist(), len(steps)]
    numbers = steps[begins[:-1]].tolist()
    return [
        (begin, number - 1, end - begin)
        for (begin, end), number in zip(itertools.pairwise(begins), numbers, strict=True) if number
    ]
