"""What the page is given: every device, block, event and byte of the plan, folded but not lost."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from drawn_page import Drawn

from autopar.cluster.parse import parse_cluster
from autopar.graph.source import capture_source, load_source
from autopar.plan.file import load_plan, picture_from_json, plan_to_json
from autopar.plan.plan import Mesh
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.simulator import simulate
from autopar.viz.picture import limits, picture

LAYERS = 4


def test_every_device_is_shown_with_its_stage(drawn: Drawn) -> None:
    plan, found = load_plan(drawn.plan), {}
    for node in drawn.picture["cluster"]["nodes"]:
        per_node = len(node["stages"])
        for i in range(node["count"]):
            found.update({node["first_rank"] + i * per_node + j: stages for j, stages in enumerate(node["stages"])})
    assert found == {rank: [i] for i, stage in enumerate(plan.stages) for rank in stage.devices}


def test_nodes_that_do_the_same_are_one_box(drawn: Drawn) -> None:
    assert [node["count"] for node in drawn.picture["cluster"]["nodes"]] == [1, 1]  # a stage on each


def test_blocks_of_all_stages_add_up_to_the_model(drawn: Drawn) -> None:
    runs = [run for stage in drawn.picture["stages"] for run in stage["blocks"]]
    assert sum(run["count"] for run in runs) == len(load_plan(drawn.plan).blocks) == LAYERS + 2
    assert {run["cls"] for run in runs} <= {entry["cls"] for entry in drawn.picture["classes"]}


def test_events_lie_inside_the_step_and_do_not_overlap_on_a_rank(drawn: Drawn) -> None:
    timeline = drawn.picture["timeline"]
    compute = {i for i, kind in enumerate(timeline["kinds"]) if kind in ("F", "B", "I", "W")}
    for row in timeline["rows"]:
        own = [event for event in row["events"] if event[0] in compute]
        assert own
        assert all(0 <= start <= end <= timeline["step_time_s"] * (1 + 1e-6) for *_, start, end in row["events"])
        assert all(one[4] <= other[3] + 1e-6 for one, other in pairwise(own))


def test_of_too_many_events_those_of_some_ranks_are_drawn(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(str(drawn.model), dtype="bfloat16")
    graph, cluster = capture_source(source), parse_cluster("2x4xH100-80GB")
    plan = plan_from_degrees(graph, cluster, Degrees(global_batch=32, pp=4, tp=2, micro_batch=4))
    whole = simulate(graph, cluster, plan)
    most = len(whole.events)  # fewer than are counted on, for the ends of the pipeline send fewer messages
    few = simulate(graph, cluster, plan, max_events=most)
    assert few.report() == whole.report()
    assert {event.group for event in few.events} < {event.group for event in whole.events}
    assert [bool(group.memory_steps) for group in few.groups].count(True) == len({e.group for e in few.events})
    monkeypatch.setattr("autopar.viz.picture.MAX_DRAWN", most)
    for timeline in (whole, few):
        rows = picture(graph, cluster, plan, timeline)["timeline"]["rows"]
        assert {at for at, row in enumerate(rows) if row["drawn"]} == {event.group for event in few.events}
        assert all(bool(row["events"]) == bool(row["memory_curve"]) == row["drawn"] for row in rows)
    assert any("the step is drawn for" in note for note in picture(graph, cluster, plan, few)["notes"])


def test_parts_add_up(drawn: Drawn) -> None:
    assert sum(drawn.picture["breakdown_s"].values()) == pytest.approx(drawn.picture["numbers"]["step_time_s"])
    plan = load_plan(drawn.plan)
    for row, stage in zip(drawn.picture["timeline"]["rows"], plan.stages, strict=True):
        assert sum(row["memory_gib"].values()) * 2**30 == pytest.approx(stage.peak_memory_bytes)


def test_what_is_proved_of_the_order_is_drawn(drawn: Drawn) -> None:
    proved = drawn.picture["certificate"]  # of two stages
    assert 0 < proved["order_bound_s"] <= drawn.picture["numbers"]["step_time_s"] == proved["upper_bound_s"]


def test_what_limits_a_plan_names_the_link_of_the_busiest_devices(drawn: Drawn) -> None:
    plan = load_plan(drawn.plan)  # a stage on each of two nodes, tp 2 and dp 2 inside
    graph = capture_source(load_source(str(drawn.model), seq_len=plan.seq_len, dtype=plan.dtype))
    cluster = parse_cluster("2x4xH100-80GB@100Gbps")
    found = simulate(graph, cluster, plan)
    parts = replace(found.breakdown, dp_comm=0.3 * found.step_time_s, tp_comm=0.2 * found.step_time_s,
                    pp_comm=0.1 * found.step_time_s)
    words = {line.split(": ")[0]: line for line in limits(cluster, plan, replace(found, breakdown=parts))}
    assert "summing gradients, over the links inside a node (NVLink4, 450 GB/s a device)" in words["30% of the step"]
    assert "inside the layers, over the links inside a node" in words["20% of the step"]
    assert "stage to stage, over the network between nodes (100Gbps, 12.5 GB/s a node)" in words["10% of the step"]


def test_a_baseline_that_fixed_axes_rule_out_says_so(drawn: Drawn) -> None:
    said = {b["name"]: b["summary"] for b in drawn.picture["baselines"] if b["step_time_s"] is None}
    assert said["ddp"] == said["fsdp"] == "not with the axes that --mesh fixes"  # pp 2 and tp 2


def test_ops_name_makers_that_exist_and_collectives_have_a_place(drawn: Drawn) -> None:
    for entry in drawn.picture["classes"]:
        names = {op["name"] for op in entry["ops"]}
        assert all(set(op["from"]) <= names for op in entry["ops"])
        assert all(axis["words"] for op in entry["ops"] for axis in op["axes"])
        axes = [name for name, _ in entry["axes"]]
        assert "tp" in axes
        assert all([axis["axis"] for axis in op["axes"]] == axes for op in entry["ops"])
        assert all(item["size_bytes"] > 0 for item in entry["collectives"])
    assert any(entry["collectives"] for entry in drawn.picture["classes"])


def test_stages_show_their_own_way_to_run_a_class(drawn: Drawn) -> None:
    """Stages of meshes A, B, A: the third shares the first's entry, the second has its own."""
    graph, cluster = capture_source(load_source(str(drawn.model), seq_len=64)), parse_cluster("3x4xH100-80GB")
    degrees = Degrees(global_batch=16, micro_batch=2, pp=3, tp=2, dp_shard=2)
    plan = plan_from_degrees(graph, cluster, degrees)
    wide = Mesh(dp_shard=4)
    unlike = tuple(replace(stage, mesh=wide if i == 1 else stage.mesh) for i, stage in enumerate(plan.stages))
    plan = replace(plan, stages=unlike, micro_batch=4, num_micro_batches=2)
    found = picture(graph, cluster, plan, simulate(graph, cluster, plan))
    layer = [run["entry"] for stage in found["stages"] for run in stage["blocks"] if "Layer" in run["cls"]]
    assert layer[0] == layer[2] != layer[1]
    assert found["classes"][layer[0]]["axes"] == [["tp", 2]]
    assert found["classes"][layer[1]]["axes"] == []


def test_shapes_are_those_of_a_micro_batch(drawn: Drawn) -> None:
    rows = load_plan(drawn.plan).micro_batch
    layer = next(entry for entry in drawn.picture["classes"] if "Layer" in entry["cls"])
    assert {op["shape"][0] for op in layer["ops"] if len(op["shape"]) == 3} == {rows}


def test_a_plan_without_a_picture_is_the_same_plan(drawn: Drawn) -> None:
    plan = load_plan(drawn.plan)
    bare = plan_to_json(plan)
    assert picture_from_json(bare) is None
    assert json.loads(plan_to_json(plan, {"a": [1, {}]})) == json.loads(bare) | {"picture": {"a": [1, {}]}}
