"""On ResNet-50's own widths the search splits images by height where they are large, and channels where these are many.

Nothing of this is written down: a spatial split is one strategy of a convolution among those of its channels, and costs
its borders, its copies and the batch norms' statistics.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

from autopar.cluster.parse import parse_cluster
from autopar.graph.capture import capture
from autopar.graph.model_graph import BlockClass, ModelGraph, TensorInfo
from autopar.plan.verify import verify_plan
from autopar.search.block_problem import boundary_placement
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.planner import PlanRequest, find_plan
from autopar.search.shardings import ShardingChooser
from autopar.sharding.lowering import Lowering
from autopar.sharding.state import Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.simulator import simulate

SIDE, TP = 1024, 4
CLUSTER = parse_cluster("4xH100-80GB")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations


@cache
def resnet(side: int = SIDE) -> ModelGraph:
    """ResNet-50's stem, widths and bottlenecks, one or two of these a stage, on large images."""
    config = transformers.ResNetConfig(num_labels=1000, depths=[2, 1, 1, 2])
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(config)
        batch = {"pixel_values": torch.zeros(2, 3, side, side), "labels": torch.zeros(2, dtype=torch.int64)}
    return capture(model, batch, tag_rows=True).graph


def stages_of(rows: int, *, by_height: bool) -> dict[int, list[tuple[BlockClass, ClassSharding]]]:
    """The classes of each of the four stages with what is chosen for them at `rows` images a micro-batch."""
    graph = resnet()
    choice = ShardingChooser(graph, CLUSTER, "bfloat16", rows=rows).choose(TP, sequence_parallel=by_height)
    assert choice is not None
    chosen = {sharding.cls: sharding for sharding in choice.shardings}
    found: dict[int, list[tuple[BlockClass, ClassSharding]]] = {stage: [] for stage in range(4)}
    for block in graph.blocks:
        if ".stages." in block.name:
            stage = int(block.name.partition(".stages.")[2].partition(".")[0])
            found[stage].append((graph.block_class[block.cls], chosen[block.cls]))
    assert all(found.values())
    return found


def convolutions(cls: BlockClass, choice: ClassSharding) -> list[tuple[int, str, str]]:
    """(window, factor, lowering) of each convolution."""
    return [
        (cls.tensor[op.operands[1]].shape[-1], choice.strategy[op.name].factor, choice.strategy[op.name].lowering)
        for op in cls.ops if op.target.startswith("aten.conv2d")
    ]


def test_large_images_split_by_height_where_they_arrive_so() -> None:
    for cls, choice in stages_of(8, by_height=True)[0]:
        assert choice.inputs == choice.outputs == (shard(2),)
        for window, factor, lowering in convolutions(cls, choice):
            assert factor == "x0"
            assert lowering == (Lowering.SPATIAL_HALO if window > 1 else "")  # single positions need no neighbour
        norms = [choice.strategy[op.name].lowering for op in cls.ops if "batch_norm" in op.target]
        assert set(norms) == {Lowering.SYNC_BATCH_NORM}
        assert all(state.kind is not Kind.SHARDED for state in choice.params)


def test_many_channels_split_in_the_last_stage() -> None:
    late = stages_of(1, by_height=True)[3]
    wide = [(cls, choice) for cls, choice in late for window, _, _ in convolutions(cls, choice) if window == 3]
    assert wide
    for cls, choice in wide:
        assert {factor for _, factor, _ in convolutions(cls, choice)} <= {"i", "o"}
        weights = [s for s, name in zip(choice.params, cls.params, strict=True) if len(cls.tensor[name].shape) == 4]
        assert all(state.kind is Kind.SHARDED for state in weights)


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((5, 64, 56, 56), (4,), (shard(2),)),
        ((5, 2048, 7, 7), (4,), (R,)),  # the last stage at 224 pixels
        ((5, 1024, 14, 14), (2, 2), (shard(2), R)),  # 7 rows are left for the second axis
        ((5, 64, 56, 56), (2, 2), (shard(2), shard(2))),
        ((1, 8, 16, 16), (2,), (R,)),  # no image: the same for all rows
    ],
)
def test_a_height_that_does_not_divide_passes_whole(
    shape: tuple[int, ...], sizes: tuple[int, ...], expected: tuple[State, ...]
) -> None:
    info = TensorInfo(name="x", shape=shape, dtype="float32", requires_grad=True)
    assert boundary_placement(info, (shard(1),) * len(sizes), sizes) == expected
    assert boundary_placement(info, (R,) * len(sizes), sizes) == (R,) * len(sizes)


def test_whole_images_are_cut_at_the_stem_at_once() -> None:
    """Where images pass whole between blocks, the stem still splits: pixels have no gradient, so cutting is free."""
    graph = resnet()
    choice = ShardingChooser(graph, CLUSTER, "bfloat16", rows=8).choose(TP, sequence_parallel=False)
    assert choice is not None
    stem, chosen = graph.block_class[graph.blocks[0].cls], choice.shardings[0]
    assert chosen.cls == stem.name
    assert convolutions(stem, chosen) == [(7, "x0", Lowering.SPATIAL_HALO)]
    assert chosen.outputs == (R,)


def test_parts_of_the_height_beat_whole_images() -> None:
    """The same tensor axis, by what passes between blocks; and both against one device.

    The images are large enough that four devices wait for their own work, not for the host that issues it.
    """
    graph, times = resnet(2 * SIDE), {}
    for words in ("one", "whole", "height"):
        tp = 1 if words == "one" else TP
        cluster = parse_cluster(f"{tp}xH100-80GB")
        wanted = Degrees(global_batch=8, micro_batch=8, tp=tp, sequence_parallel=words == "height")
        plan = plan_from_degrees(graph, cluster, wanted)
        verify_plan(plan, graph, cluster)
        times[words] = simulate(graph, cluster, plan).step_time_s
    assert times["height"] < 0.6 * times["whole"] < 0.6 * times["one"]


def test_the_planner_takes_the_height_of_an_image_that_is_alone() -> None:
    """One image of satellites' or microscopes' size: no data to share out, and a pipeline would wait."""
    graph = resnet(4096)
    plan = find_plan(graph, CLUSTER, PlanRequest(global_batch=1, dtype="bfloat16"))
    verify_plan(plan, graph, CLUSTER)
    mesh = plan.stages[0].mesh
    assert mesh.cp * mesh.tp == TP and (mesh.cp > 1 or plan.sequence_parallel)
    lowerings = [strategy.lowering for choice in plan.shardings for _, strategy in choice.ops]
    assert {Lowering.SPATIAL_HALO, Lowering.SYNC_BATCH_NORM} <= set(lowerings)
