"""Data axes by FSDP2: the one place that calls `fully_shard`, with the ZeRO levels as its settings.

Level 0 and 1 keep the parameters whole during a step, add up whole gradients over the micro-batches and reduce them
once; level 2 reduces the gradients of every micro-batch; level 3 also gathers the parameters anew for every forward
and backward. Level 0 comes here only where parameters rest in another dtype, as a shard axis of one rank; else
`replicas` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from autopar.errors import InputError
from autopar.runtime.stage_module import ExpertsModule, StageModule


def shard_stage(
    stage: StageModule, units: Sequence[str], mesh: DeviceMesh, *, zero: int, dtype: torch.dtype,
    param_dtype: torch.dtype, expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard a stage's parameters in place: each unit by itself, the rest with the root, which stays gathered.

    The modules that hold experts are units over `expert_mesh`, where there is one. Gradients are summed over the data
    ranks, not averaged: the loss is already divided by the global count.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != param_dtype:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=param_dtype, cast_forward_inputs=False)
    modules = dict(stage.named_modules())
    if expert_mesh is not None:
        for module in modules.values():
            if isinstance(module, ExpertsModule):
                fully_shard(module, mesh=expert_mesh, mp_policy=policy, reshard_after_forward=zero == 3)
    for name in units:
        if name in modules and any(True for _ in modules[name].parameters()):
            fully_shard(modules[name], mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3)
    fully_shard(stage, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.__dict__["__deepcopy__"] = _refuse_copy  # before that of FSDP2, which says not what to do
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":  # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)


def _refuse_copy(_: dict[int, Any]) -> NoReturn:
    raise InputError(
        "trainer.module cannot be copied (copy.deepcopy, AveragedModel): FSDP2 shards its parameters under this plan; "
        "average them by name: mean = {n: p.detach().clone() for n, p in trainer.module.named_parameters()}, and after "
        "each step mean[n].lerp_(p.detach(), 1 - decay)"
    )


def prepare_backward(stage: nn.Module, zero: int, *, is_last: bool, defers: bool = False) -> None:
    """Set what the next backward does with parameters and gradients; `is_last`: it ends the step.

    `defers`: it leaves whole gradients, which `finish_gradients` reduces later.
    """
    if isinstance(stage, FSDPModule):
        stage.set_is_last_backward(is_last)
        stage.set_requires_gradient_sync(not defers and (is_last or zero >= 2))
        stage.set_requires_all_reduce(is_last)  # among replicas of the shards, once a step at every level
        stage.set_reshard_after_backward(not defers and (is_last or zero == 3))


def finish_gradients(stage: nn.Module, zero: int, *, is_last: bool) -> None:
    """Reduce the gradients that a backward outside FSDP2's hooks, or one that deferred this, left whole."""
    if isinstance(stage, FSDPModule):
        prepare_backward(stage, zero, is_last=is_last)
        state = fully_shard.state(stage)  # type: ignore[attr-defined]
        state._root_post_backward_final_callback()  # as torch.distributed.pipelining does


def end_evaluation(stage: nn.Module) -> None:
    """Drop what forwards without a backward have gathered: an optimizer's step would leave it out of date."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that is on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The tensor gathered over the data axes; all their ranks must call it.

    FSDP2 cuts dim 0 into equal chunks, the last of them shorter or empty. The tensor's own mesh is not asked: DTensor's
    caches may have put an equal one of a destroyed process group there.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    assert mesh is not None
    own = tensor.to_local()
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "FSDP2 shards dim 0"
            group = mesh.get_group(axis)
            size = dist.get_world_size(group)
            padded = own.new_zeros((-(-tensor.shape[0] // size), *tensor.shape[1:]))
            padded[: own.shape[0]] = own
            parts = [torch.empty_like(padded) for _ in range(size)]
            dist.all_gather(parts, padded, group=group)
            own = torch.cat(parts)[: tensor.shape[0]]
    return own


def like_parameter(value: Tensor, param: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A whole tensor laid out over the data axes as a parameter is; `value` must be equal on all their ranks."""
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value, mesh, param.placements, src_data_rank=None)


def held_rows(rows: Tensor, param: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Of a tensor whose dim 0 is a parameter's, the rows that this rank has of it; maybe none."""
    if not isinstance(param, DTensor):
        return rows
    assert mesh is not None
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            each = -(-len(rows) // mesh.size(axis))
            first = each * mesh.get_local_rank(axis)
            rows = rows[first : first + each]
    return rows


def from_held(local: Tensor, param: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A tensor that is laid out over the data axes as a parameter is, of what this rank holds of it."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(local, mesh, param.placements, shape=param.shape, stride=param.stride())
