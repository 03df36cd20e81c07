"""What passes between stages of unlike layout, carried by hand: every rank gets its part, gradients go the same way."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))

from toy_graphs import cluster, mlp_chain

from autopar.plan.plan import Mesh, Plan, Recompute, Stage
from autopar.runtime.regions import Crossing, crossings
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.state import R, State, shard
from autopar.sharding.strategy import ClassSharding

GRAPH = mlp_chain()
CUT = 3


def shardings(state: State) -> tuple[ClassSharding, ...]:
    """Only what passes between blocks matters here."""
    return tuple(
        ClassSharding(cls=cls.name, inputs=(state,) * len(cls.inputs), params=(), buffers=(),
                      outputs=(state,) * len(cls.outputs), ops=(), axis=axis)
        for cls in GRAPH.classes for axis in ("cp", "tp")
    )


@st.composite
def stages(draw: st.DrawFn, first: int, last: int, devices: int, rows: int) -> Stage:
    two = st.sampled_from([1, 2])
    mesh = Mesh(dp_replicate=draw(st.integers(1, 3)), cp=draw(two), tp=draw(two))
    cuts = sorted(draw(st.lists(st.integers(1, rows - 1), min_size=mesh.dp - 1, max_size=mesh.dp - 1, unique=True)))
    shares = tuple(b - a for a, b in zip((0, *cuts), (*cuts, rows), strict=True))
    return Stage(
        first=first, last=last, devices=tuple(range(devices, devices + mesh.size)), mesh=mesh, zero=0,
        recompute=Recompute.NONE, rows=shares, shardings=shardings(draw(st.sampled_from([R, shard(1)]))),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.integers(3, 7))
    one = draw(stages(0, CUT, 0, rows))
    two = draw(stages(CUT, len(GRAPH.blocks), one.mesh.size, rows))
    base = plan_from_degrees(GRAPH, cluster(1, 1), Degrees(global_batch=1))
    return replace(base, stages=(one, two), global_batch=2 * rows, num_micro_batches=2, micro_batch=1,
                   num_devices=one.mesh.size + two.mesh.size)


def carried(
    plan: Plan, seen: dict[int, Crossing], sources: Stage, targets: Stage, held: dict[int, Tensor], *, gradients: bool
) -> tuple[dict[int, Tensor], int]:
    """What the targets hold after every source sent its pieces in order, and how many elements were sent."""
    wires: dict[tuple[int, int], deque[Tensor]] = {}
    sent = 0
    for rank in sources.devices:
        for piece in seen[rank].gradients if gradients else seen[rank].activations:
            wires.setdefault((rank, piece.peer), deque()).append(held[rank][piece.part])
            sent += held[rank][piece.part].numel()
    found = {}
    for rank in targets.devices:
        found[rank] = torch.full(seen[rank].shape, torch.nan)
        for piece in seen[rank].gradients if gradients else seen[rank].activations:
            value = wires[piece.peer, rank].popleft()
            assert tuple(value.shape) == piece.shape
            found[rank][piece.part] = value
    assert not any(wires.values()), "everything that is sent is received"
    return found, sent


def parts(plan: Plan, stage: Stage, whole: Tensor) -> dict[int, Tensor]:
    """Each rank's part of a tensor over the whole micro-batch, by chunks."""
    found = {}
    split = stage.shardings[0].outputs[0] != R
    for i, rows in enumerate(torch.split(whole, list(plan.rows_of(stage)))):
        mesh = stage.mesh
        for c in range(mesh.cp):
            for t in range(mesh.tp):
                part = rows.chunk(mesh.cp, 1)[c].chunk(mesh.tp, 1)[t] if split else rows
                found[stage.devices[(i * mesh.cp + c) * mesh.tp + t]] = part
    return found


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_rank_gets_its_part_once(plan: Plan) -> None:
    one, two = plan.stages
    seen = {rank: crossings(GRAPH, plan, 0, rank)[0] for rank in (*one.devices, *two.devices)}
    info = GRAPH.block_class[GRAPH.blocks[0].cls].tensors[-1]
    whole = torch.randn(plan.micro_batch_rows, *info.shape[1:])
    above, below = parts(plan, one, whole), parts(plan, two, whole)
    for sources, targets, held, wanted, gradients in (
        (one, two, above, below, False), (two, one, below, above, True),
    ):
        found, sent = carried(plan, seen, sources, targets, held, gradients=gradients)
        assert all(torch.equal(found[rank], wanted[rank]) for rank in targets.devices)
        assert sent == sum(part.numel() for part in wanted.values()), "no element is sent to a rank twice"


def test_ranks_that_hold_the_same_take_turns() -> None:
    """Two ranks that both hold everything feed four: two each."""
    one = Stage(first=0, last=CUT, devices=(0, 1), mesh=Mesh(tp=2), zero=0, recompute=Recompute.NONE, rows=(4,),
                shardings=shardings(R))
    two = Stage(first=CUT, last=len(GRAPH.blocks), devices=(2, 3, 4, 5), mesh=Mesh(dp_replicate=4), zero=0,
                recompute=Recompute.NONE, rows=(1,) * 4)
    base = plan_from_degrees(GRAPH, cluster(1, 1), Degrees(global_batch=1))
    plan = replace(base, stages=(one, two), global_batch=4, num_micro_batches=1, micro_batch=4, num_devices=6)
    assert [len(crossings(GRAPH, plan, 0, rank)[0].activations) for rank in one.devices] == [2, 2]
