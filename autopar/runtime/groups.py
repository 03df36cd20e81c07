"""The process groups of a plan: every rank makes all of them, in one order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import InputError, PlanMismatchError
from autopar.graph.fake import outside_other_modes
from autopar.plan.plan import Plan, Schedule
from autopar.runtime.collectives import Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank stands: its pipeline stages and its coordinates in their mesh."""

    stages: tuple[int, ...]
    lane: int  # index in stage.devices
    data_rank: int  # which rows it gets
    context_rank: int
    tensor_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This rank's process groups. None where the axis has one rank, so that a lone process needs no group at all.

    `axes` are the axes inside the stage, outermost first; `tensor_axis` is the one of them called "tp". `data` holds
    the ranks that have other rows; `data_mesh` all those that have other tokens, which share the shards of parameters.
    `tied` maps a set of stages to the group of the ranks that hold the same part of the parameters which they share.
    `forward[i]` and `backward[i]` carry what passes between stages i and i + 1.
    """

    place: Place
    axes: tuple[Axis, ...]
    tensor_axis: Axis | None
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None
    data_mesh: DeviceMesh | None  # ("dp_replicate", "dp_shard")
    tied: dict[tuple[int, ...], dist.ProcessGroup]
    forward: dict[int, dist.ProcessGroup]
    backward: dict[int, dist.ProcessGroup]


def check_runnable(plan: Plan, world_size: int) -> None:
    """InputError or PlanMismatchError, one line, for a plan that this version or this job cannot run."""
    if plan.num_devices != world_size:
        raise PlanMismatchError(
            f"the plan is for {plan.num_devices} devices, and the job has {world_size} processes; "
            f"start it with torchrun --nproc-per-node {plan.num_devices}, or plan again"
        )
    meshes = {stage.mesh for stage in plan.stages}
    if len(meshes) > 1:
        raise InputError("the plan's stages have different meshes, which can be simulated, not yet run; plan with one")
    for mesh in meshes:
        if mesh.ep > 1:
            raise InputError(f"the plan has ep {mesh.ep}, which can be simulated, not yet run")
    if plan.schedule not in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        raise InputError(f"schedule {plan.schedule} can be simulated, not yet run; plan with 1f1b or gpipe")
    if plan.dtype == "float16":
        raise InputError("training in float16 needs loss scaling, which is not there; plan with bfloat16")


def place_of(plan: Plan, rank: int) -> Place:
    """Where a rank stands in the plan."""
    stages = tuple(index for index, stage in enumerate(plan.stages) if rank in stage.devices)
    if not stages:
        raise PlanMismatchError(f"rank {rank} is in no stage of the plan")
    stage = plan.stages[stages[0]]
    mesh, lane = stage.mesh, stage.devices.index(rank)
    return Place(
        stages=stages, lane=lane, data_rank=lane // (mesh.cp * mesh.tp), context_rank=lane // mesh.tp % mesh.cp,
        tensor_rank=lane % mesh.tp,
    )


@outside_other_modes()  # a dry run's fake mode: ranks are numbers that must be read
def make_groups(
    plan: Plan, tied_stages: tuple[tuple[int, ...], ...], device: torch.device, timeout: timedelta, *,
    needs_mesh: bool,
) -> Groups:
    """All groups of the plan; `tied_stages` are the sets of stages that share parameters."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    place = place_of(plan, rank)
    mine: dict[str, dist.ProcessGroup] = {}
    data_mesh: DeviceMesh | None = None
    seen: set[tuple[int, ...]] = set()
    for stage in plan.stages:
        if stage.devices in seen:
            continue
        seen.add(stage.devices)
        mesh = stage.mesh
        grid = torch.tensor(stage.devices, dtype=torch.int).view(mesh.dp, mesh.cp, mesh.tp)
        if needs_mesh:
            names = ("dp_replicate", "dp_shard", "tp")
            copies, shards = (mesh.dp * mesh.cp, 1) if stage.zero == 0 else (mesh.dp_replicate, mesh.dp_shard * mesh.cp)
            device_mesh = DeviceMesh(device.type, grid.view(copies, shards, mesh.tp), mesh_dim_names=names)
            if rank in stage.devices:
                data_mesh = device_mesh["dp_replicate", "dp_shard"]
        rows = {
            "tp": grid.flatten(0, 1).tolist(), "cp": grid.transpose(1, 2).flatten(0, 1).tolist(),
            "data": grid.flatten(1, 2).t().tolist(),
        }
        for axis, members in rows.items():
            for ranks in members:
                if len(ranks) > 1:
                    group = dist.new_group(ranks, timeout=timeout)
                    if rank in ranks:
                        mine[axis] = group
    tied = {}
    for stages in tied_stages:
        for ranks in zip(*(plan.stages[index].devices for index in stages), strict=True):
            distinct = sorted(set(ranks))
            if len(distinct) > 1:
                group = dist.new_group(distinct, timeout=timeout)
                if rank in distinct:
                    tied[stages] = group
    forward, backward = {}, {}
    for index in range(plan.num_stages - 1):
        ranks = sorted({*plan.stages[index].devices, *plan.stages[index + 1].devices})
        forward[index] = dist.new_group(ranks, timeout=timeout)
        backward[index] = dist.new_group(ranks, timeout=timeout)
    axes = {
        name: Axis(
            group_name=mine[name].group_name, size=dist.get_world_size(mine[name]), rank=dist.get_rank(mine[name]),
            name=name,
        ) for name in ("cp", "tp") if name in mine
    }
    return Groups(
        place=place, axes=tuple(axes.values()), tensor_axis=axes.get("tp"), tensor=mine.get("tp"),
        data=mine.get("data"), data_mesh=data_mesh, tied=tied, forward=forward, backward=backward,
    )
