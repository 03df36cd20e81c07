"""The way between a parameter's full tensor and what a rank holds of it, over all axes of its stage.

The expert axis is the outermost, then comes the tensor axis; the data axes cut what these leave.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.data_parallel import like_parameter, whole_tensor
from autopar.runtime.groups import Groups
from autopar.runtime.layout import ParamLayout, full_tensor, local_part
from autopar.sharding.state import shard

BY_EXPERTS = shard(0)  # what a rank of the expert axis has of an expert's parameter


def mesh_of(param: ParamLayout, groups: Groups) -> DeviceMesh | None:
    """The data axes that share out the parameter; None where its ranks have whole copies."""
    return groups.expert_mesh if param.by_experts else groups.data_mesh


def part_of(full: Tensor, param: ParamLayout, groups: Groups) -> Tensor:
    """This rank's part of a full tensor on the expert and the tensor axis."""
    own = local_part(full, BY_EXPERTS, groups.expert_axis) if param.by_experts else full
    return local_part(own, param.state, groups.tensor_axis)


def laid_out(full: Tensor, param: ParamLayout, parameter: Tensor, groups: Groups) -> Tensor:
    """A full tensor as this rank holds it: its part, then as the data axes share out the parameter."""
    return like_parameter(part_of(full, param, groups).contiguous(), parameter, mesh_of(param, groups))


def gathered(value: Tensor, param: ParamLayout, groups: Groups) -> Tensor:
    """The full tensor from every rank's part; all ranks of the stage must call it."""
    own = full_tensor(whole_tensor(value, mesh_of(param, groups)), param.state, groups.tensor_axis)
    return full_tensor(own, BY_EXPERTS, groups.expert_axis) if param.by_experts else own
