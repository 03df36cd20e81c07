"""Parameters that several stages use: each stage has a copy, and the gradients of all copies are summed once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.plan.plan import Plan
from autopar.runtime.data_parallel import local_tensor
from autopar.runtime.groups import Groups
from autopar.runtime.layout import Layout, ParamLayout
from autopar.runtime.parts import gathered, laid_out

Stages = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """The names of shared parameters by the stages that share them.

    `by_lane`: the ranks of these stages hold the same parts, lane by lane; `whole`: they hold unlike parts.
    """

    by_lane: dict[Stages, tuple[str, ...]]
    whole: dict[Stages, tuple[str, ...]]


def ties_of(layout: Layout, plan: Plan) -> Ties:
    """The parameters that several stages of the plan use."""
    by_lane: dict[Stages, list[str]] = {}
    whole: dict[Stages, list[str]] = {}
    states = [{param.name: param.state for param in layout.of_stage(index)} for index in range(plan.num_stages)]
    for param in layout.params:
        if len(param.stages) > 1:
            own = [plan.stages[index] for index in param.stages]
            alike = len({(stage.mesh, stage.zero == 0) for stage in own}) == 1 and (
                len({states[index][param.name] for index in param.stages}) == 1
            )
            (by_lane if alike else whole).setdefault(param.stages, []).append(param.name)
    return Ties(
        by_lane={stages: tuple(names) for stages, names in sorted(by_lane.items())},
        whole={stages: tuple(names) for stages, names in sorted(whole.items())},
    )


@dataclass(frozen=True, slots=True)
class Copy:
    """One stage's copy of a parameter."""

    stage: int
    layout: ParamLayout
    parameter: nn.Parameter


def sum_tied(ties: Ties, copies: dict[str, list[Copy]], groups: Groups) -> None:
    """Give every copy the sum of all copies' gradients. `copies` are this rank's, by name, each with a gradient."""
    for stages, names in ties.by_lane.items():
        own = [copies[name] for name in names if name in copies]
        if not own:
            continue
        sums = []
        for of_one in own:
            first, *others = [_gradient(copy) for copy in of_one]
            for other in others:
                first += other
            sums.append(first)
        if stages in groups.tied:
            sum_in_place(sums, groups.tied[stages])
        for of_one, total in zip(own, sums, strict=True):
            for copy in of_one[1:]:
                _gradient(copy).copy_(total)
    for stages, names in ties.whole.items():
        for name in names:
            if name in copies:
                _sum_whole(copies[name], groups, groups.tied_whole.get(stages))


def _sum_whole(copies: Sequence[Copy], groups: Groups, group: dist.ProcessGroup | None) -> None:
    """The gradient put together in each stage, summed over the stages, and taken apart again."""
    total: Tensor | None = None
    for copy in copies:
        assert copy.parameter.grad is not None
        whole = gathered(copy.parameter.grad, copy.layout, groups)
        total = whole.clone() if total is None else total + whole
    assert total is not None
    if groups.place.lane != 0:
        total.zero_()  # each stage speaks once
    if group is not None:
        sum_in_place([total], group)
    for copy in copies:
        _gradient(copy).copy_(local_tensor(laid_out(total, copy.layout, copy.parameter, groups)))


def _gradient(copy: Copy) -> Tensor:
    assert copy.parameter.grad is not None
    return local_tensor(copy.parameter.grad)


def sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce tensors in one message for each dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))
