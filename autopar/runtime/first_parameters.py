"""The parameters with which a rank begins: its parts of the model's own, or room for those of files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import InputError, PlanMismatchError
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.runtime.data_parallel import like_parameter
from autopar.runtime.groups import Groups
from autopar.runtime.layout import Layout, ParamLayout
from autopar.runtime.parts import BY_EXPERTS, mesh_of, part_of
from autopar.runtime.weights import WeightFiles, unwritten
from autopar.sharding.joint import placed_shape
from autopar.sharding.state import R


def from_first(value: Tensor, device: torch.device) -> Tensor:
    """Rank 0's value, as a new tensor on this rank's device; all ranks must call it."""
    received = value.detach().to(device, copy=True).contiguous()
    dist.broadcast(received, src=0)
    return received


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstParameters:
    """Makes a rank's parameters, by stage and name, in the plan's parameter dtype."""

    graph: ModelGraph
    plan: Plan
    layout: Layout
    groups: Groups
    device: torch.device

    def of_model(self, model: nn.Module, *, sent: bool) -> dict[int, dict[str, nn.Parameter]]:
        """This rank's parts of the model's parameters, by stage, on its device; `sent`: as rank 0 has them.

        One full parameter at a time is on the device.
        """
        own = dict(model.named_parameters(remove_duplicate=False))
        for info in self.graph.params:
            if info.name not in own or tuple(own[info.name].shape) != info.shape:
                raise PlanMismatchError(f"the model has no parameter {info.name} of shape {list(info.shape)}")
            if own[info.name].is_meta:
                raise InputError(f"parameter {info.name} has no data (meta device); give the model its weights first")
        found: dict[int, dict[str, nn.Parameter]] = {index: {} for index in self.groups.place.stages}
        layout = {(index, param.name): param for index in found for param in self.layout.of_stage(index)}
        for param in self.layout.params:
            value = own[param.name]
            needing = [index for index in param.stages if index in found]
            if not sent and not needing:
                continue
            full = from_first(value, self.device) if sent else value.detach().to(self.device)
            dtype = getattr(torch, self.plan.param_dtype) if full.is_floating_point() else full.dtype
            for index in needing:
                part = part_of(full, layout[index, param.name], self.groups)
                part = part.to(dtype, copy=not sent or index != needing[0])
                found[index][param.name] = nn.Parameter(part, requires_grad=value.requires_grad)
        return found

    def unwritten(self, model: nn.Module) -> dict[int, dict[str, nn.Parameter]]:
        """This rank's parts of the model's parameters, by stage, without values."""
        own = dict(model.named_parameters(remove_duplicate=False))
        found: dict[int, dict[str, nn.Parameter]] = {index: {} for index in self.groups.place.stages}
        for index, params in found.items():
            for param in self.layout.of_stage(index):
                info = self.graph.param[param.name]
                dtype = getattr(torch, self.plan.param_dtype) if own[param.name].is_floating_point() else None
                axes = ((self.groups.expert_axis, BY_EXPERTS if param.by_experts else R),
                        (self.groups.tensor_axis, param.state))
                shape = info.shape
                for axis, state in axes:
                    if axis is not None:
                        shape = placed_shape(shape, (state,), (axis.size,))
                part = unwritten(shape, dtype or own[param.name].dtype)
                params[param.name] = nn.Parameter(part, requires_grad=own[param.name].requires_grad)
        return found

    @torch.no_grad()
    def read(
        self, files: WeightFiles, held: Iterable[tuple[int, ParamLayout, nn.Parameter]], modules: Iterable[nn.Module]
    ) -> None:
        """Fill parameters, and of the modules the buffers that are there, from files."""
        for _, param, parameter in held:
            shape = self.graph.param[param.name].shape
            part = files.part(
                param.names, shape, param.state, self.groups.tensor_axis,
                self.groups.expert_axis if param.by_experts else None,
            )
            part = part.to(device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(like_parameter(part.contiguous(), parameter, mesh_of(param, self.groups)))
        for module in modules:
            for name, value in module.named_buffers():
                if files.has([name]):
                    value.copy_(files.part([name], tuple(value.shape), R, None))
