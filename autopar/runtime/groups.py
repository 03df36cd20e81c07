"""The process groups of a plan: every rank makes all of them, in one order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import InputError, PlanMismatchError
from autopar.graph.fake import outside_other_modes
from autopar.plan.plan import Plan, Stage
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
    `replicas` holds the same ranks where each of them has whole parameters. `expert_axis` are data ranks that have the
    experts between them; `expert_mesh` and `expert_replicas` are for experts what `data_mesh` and `replicas` are for
    all other parameters: the ranks that have the same experts.
    `tied` maps a set of stages to the group of the ranks that hold the same part of the parameters which they share,
    `tied_whole` to all ranks of stages that hold them in unlike parts.
    `forward[i]` and `backward[i]` carry what passes between stages i and i + 1; on one device nothing need be carried.
    """

    place: Place
    axes: tuple[Axis, ...]
    tensor_axis: Axis | None
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None
    data_mesh: DeviceMesh | None  # ("dp_replicate", "dp_shard")
    replicas: dist.ProcessGroup | None
    expert_axis: Axis | None
    expert_mesh: DeviceMesh | None
    expert_replicas: dist.ProcessGroup | None
    tied: dict[tuple[int, ...], dist.ProcessGroup]
    tied_whole: dict[tuple[int, ...], dist.ProcessGroup]
    forward: dict[int, dist.ProcessGroup]
    backward: dict[int, dist.ProcessGroup]


def check_runnable(plan: Plan, world_size: int) -> None:
    """InputError or PlanMismatchError, one line, for a plan that this version or this job cannot run."""
    if plan.num_devices != world_size:
        raise PlanMismatchError(
            f"the plan is for {plan.num_devices} devices, and the job has {world_size} processes; "
            f"start it with torchrun --nproc-per-node {plan.num_devices}, or plan again"
        )
    for one, other in pairwise(plan.stages):
        if one.devices == other.devices and one.shardings != other.shardings:
            raise InputError("two neighbour stages on the same devices split ops differently; make them one stage")
    if plan.dtype == "float16":
        raise InputError("training in float16 needs loss scaling, which is not there; plan with bfloat16")


def needs_data_mesh(stage: Stage) -> bool:
    """Whether FSDP2 runs the stage: its ranks share out states."""
    return stage.zero > 0 and stage.mesh.dp * stage.mesh.cp > 1


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
    plan: Plan, tied_stages: Collection[tuple[int, ...]], tied_whole: Collection[tuple[int, ...]],
    device: torch.device, timeout: timedelta,
) -> Groups:
    """All groups of the plan.

    `tied_stages` are the sets of stages that share parameters and hold the same parts of them lane by lane,
    `tied_whole` those that share parameters in unlike parts.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    place = place_of(plan, rank)
    mine: dict[str, dist.ProcessGroup] = {}
    data_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    seen: set[tuple[int, ...]] = set()
    for stage in plan.stages:
        if stage.devices in seen:
            continue
        seen.add(stage.devices)
        mesh = stage.mesh
        grid = torch.tensor(stage.devices, dtype=torch.int).view(mesh.dp, mesh.cp, mesh.tp)
        if needs_data_mesh(stage):
            names = ("dp_replicate", "dp_shard", "tp")
            shards = mesh.dp_shard * mesh.cp
            device_mesh = DeviceMesh(device.type, grid.view(mesh.dp_replicate, shards, mesh.tp), mesh_dim_names=names)
            if rank in stage.devices:
                data_mesh = device_mesh["dp_replicate", "dp_shard"]
            if mesh.ep > 1:
                names = ("dp_replicate", "dp_shard", "ep_tp")
                alike = grid.view(mesh.dp_replicate, mesh.dp_shard // mesh.ep, mesh.ep, mesh.cp, mesh.tp)
                alike = alike.movedim(2, 3).reshape(mesh.dp_replicate, shards // mesh.ep, mesh.ep * mesh.tp)
                device_mesh = DeviceMesh(device.type, alike, mesh_dim_names=names)
                if rank in stage.devices:
                    expert_mesh = device_mesh["dp_replicate", "dp_shard"]
        rows = {
            "tp": grid.flatten(0, 1).tolist(), "cp": grid.transpose(1, 2).flatten(0, 1).tolist(),
            "data": grid.flatten(1, 2).t().tolist(),
        }
        if stage.zero == 0:
            rows["replicas"] = grid.flatten(0, 1).t().tolist()
        if mesh.ep > 1:
            # The expert axis is the innermost part of the data axes.
            parts = grid.view(mesh.dp // mesh.ep, mesh.ep, mesh.cp, mesh.tp)
            rows["ep"] = parts.movedim(1, 3).flatten(0, 2).tolist()
            if stage.zero == 0:
                rows["expert_replicas"] = parts.transpose(1, 2).flatten(0, 1).flatten(1, 2).t().tolist()
        for axis, members in rows.items():
            for ranks in members:
                if len(ranks) > 1:
                    group = dist.new_group(ranks, timeout=timeout)
                    if rank in ranks:
                        mine[axis] = group
    tied = {}
    for stages in sorted(tied_stages):
        for ranks in zip(*(plan.stages[index].devices for index in stages), strict=True):
            distinct = sorted(set(ranks))
            if len(distinct) > 1:
                group = dist.new_group(distinct, timeout=timeout)
                if rank in distinct:
                    tied[stages] = group
    whole = {}
    for stages in sorted(tied_whole):
        ranks = sorted({member for index in stages for member in plan.stages[index].devices})
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                whole[stages] = group
    forward, backward = {}, {}
    for index, (stage, following) in enumerate(pairwise(plan.stages)):
        if stage.devices != following.devices:
            ranks = sorted({*stage.devices, *following.devices})
            forward[index] = dist.new_group(ranks, timeout=timeout)
            backward[index] = dist.new_group(ranks, timeout=timeout)
    axes = {
        name: Axis(
            group_name=mine[name].group_name, size=dist.get_world_size(mine[name]), rank=dist.get_rank(mine[name]),
            name=name,
        ) for name in ("cp", "tp", "ep") if name in mine
    }
    return Groups(
        place=place, axes=tuple(axis for name, axis in axes.items() if name != "ep"), tensor_axis=axes.get("tp"),
        tensor=mine.get("tp"), data=mine.get("data"), data_mesh=data_mesh, replicas=mine.get("replicas"),
        expert_axis=axes.get("ep"), expert_mesh=expert_mesh, expert_replicas=mine.get("expert_replicas"), tied=tied,
        tied_whole=whole, forward=forward, backward=backward,
    )
