"""The norm of all gradients of the model, over stages, shards and copies, and clipping by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime import checkpoint
from autopar.runtime.data_parallel import local_tensor
from autopar.runtime.layout import ParamLayout
from autopar.sharding.state import Kind

if TYPE_CHECKING:
    from autopar.runtime.engine import Trainer


def clip_gradients(trainer: Trainer, max_norm: float) -> Tensor:
    """The 2-norm of all gradients, equal on every rank; gradients are scaled down to `max_norm` where it is larger.

    As torch.nn.utils.clip_grad_norm_ does in one process. All ranks must call it.
    """
    squares = torch.zeros((), dtype=torch.float64, device=trainer.device)
    gradients = []
    for stage, param, parameter in checkpoint.own_parameters(trainer):
        if parameter.grad is None:
            continue
        gradient = local_tensor(parameter.grad)
        gradients.append(gradient)
        if _speaks(trainer, stage, param):
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squares)
    norm = squares.sqrt()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    return norm


def _speaks(trainer: Trainer, stage: int, param: ParamLayout) -> bool:
    """Whether this rank counts its part of a gradient: of equal parts, one rank's is counted."""
    groups = trainer.groups
    if stage != param.stages[0]:
        return False  # a copy of a tied parameter
    replicas = groups.expert_replicas if param.by_experts else groups.replicas
    if replicas is not None and dist.get_rank(replicas) != 0:
        return False
    if groups.data_mesh is not None and groups.data_mesh.get_local_rank("dp_replicate") != 0:
        return False
    return groups.place.tensor_rank == 0 or param.state.kind is Kind.SHARDED
