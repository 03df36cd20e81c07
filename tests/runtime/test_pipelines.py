"""Pipelines of every schedule, and of stages that are laid out differently, give one process's numbers."""

from __future__ import annotations

from dataclasses import replace

import fuzz_models
import pytest
import runtime_models
from local_machines import slow_cluster
from staged_plans import Layout, staged_plan
from test_parity import captured_of, graph_of

from autopar.cluster.cluster import Cluster
from autopar.errors import InputError
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import ParityReport, capture_for, compare
from autopar.search.best_first import Engine
from autopar.search.mixed_context import context_families
from autopar.search.mixed_costs import ClusterPools, MixedCosts
from autopar.search.mixed_plans import Part, mixed_plan
from autopar.search.planner import PlanRequest, find_plan

pytestmark = pytest.mark.processes

ZB, INTERLEAVED = Schedule.ZERO_BUBBLE, Schedule.INTERLEAVED
DP2, FSDP2, TP2 = Mesh(dp_replicate=2), Mesh(dp_shard=2), Mesh(tp=2)


def check(pool: LocalPool, model: str, plan: Plan, steps: int = 2) -> ParityReport:
    report = compare(
        getattr(runtime_models, model), plan, steps=steps, pool=pool, captured=captured_of(model, "float64")
    )
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    return report


def unsplit(report: ParityReport) -> list[str]:
    return [note for note in report.notes if "runs whole" in note]


def plan_for(model: str, layouts: list[Layout], **settings: object) -> Plan:
    return staged_plan(graph_of(model, "float64"), layouts, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "global_batch", "num_micro_batches"), [("gpt2", 8, 4), ("llama_untied", 10, 5)])
def test_interleaved(pool: LocalPool, model: str, global_batch: int, num_micro_batches: int) -> None:
    """Four stages of one block on two ranks; GPT-2's first and last share the embedding."""
    check(pool, model, plan_for(
        model, [Layout(blocks=1)] * 4, global_batch=global_batch, num_micro_batches=num_micro_batches,
        schedule=INTERLEAVED, num_chunks=2,
    ))


def test_interleaved_over_shards(pool: LocalPool) -> None:
    layout = Layout(blocks=1, mesh=FSDP2, zero=3)
    check(pool, "gpt2", plan_for("gpt2", [layout] * 4, num_micro_batches=4, schedule=INTERLEAVED, num_chunks=2))


def test_stages_in_turn_on_one_device(pool: LocalPool) -> None:
    """Two stages of one rank hand over without a message; the tied embedding is in both."""
    plan = plan_for("gpt2", [Layout(blocks=2)] * 2, schedule=INTERLEAVED, num_chunks=2)
    check(pool, "gpt2", plan)


@pytest.mark.parametrize(("model", "mesh", "zero"), [
    ("llama_untied", Mesh(), 0), ("gpt2", TP2, 0), ("gpt2", FSDP2, 1), ("llama_untied", FSDP2, 2),
])
def test_zero_bubble_splits_the_backward(pool: LocalPool, model: str, mesh: Mesh, zero: int) -> None:
    layout = Layout(blocks=2, mesh=mesh, zero=zero)
    assert unsplit(check(pool, model, plan_for(model, [layout] * 2, num_micro_batches=4, schedule=ZB))) == []


@pytest.mark.parametrize(("changes", "reason"), [
    (dict(mesh=FSDP2, zero=3), "zero 3 drops"), (dict(recompute=Recompute.FULL), "would recompute"),
])
def test_a_backward_that_cannot_be_split_runs_whole_and_is_told(
    pool: LocalPool, changes: dict[str, object], reason: str
) -> None:
    layout = Layout(blocks=2, **changes)  # type: ignore[arg-type]
    report = check(pool, "gpt2", plan_for("gpt2", [layout] * 2, num_micro_batches=4, schedule=ZB))
    assert all(reason in note for note in unsplit(report)) and len(unsplit(report)) == 2


def test_parts_of_one_tensor_of_weights_that_are_used_in_turn_keep_the_backward_whole(pool: LocalPool) -> None:
    """What torch would go through a second time, for the weights between, has nothing saved any more."""
    blocks = len(graph_of("modulated", "float64").blocks)
    layouts = [Layout(blocks=blocks // 2), Layout(blocks=blocks - blocks // 2)]
    report = check(pool, "modulated", plan_for("modulated", layouts, num_micro_batches=4, schedule=ZB))
    assert len(unsplit(report)) == 1 and "more than once" in unsplit(report)[0]


def test_what_leaves_a_stage_may_be_saved_in_it(pool: LocalPool) -> None:
    """Torch detaches in place what leaves, and what an op of the stage saved of it is lost."""
    blocks = len(graph_of("residual", "float64").blocks)
    actions = ("0F0,0F1,0B0,0B1", "1F0,1F1,1I0,1I1,1W0,1W1", "2F0,2F1,2I0,2W0,2I1,2W1")
    layouts = [Layout(blocks=1), Layout(blocks=blocks - 2), Layout(blocks=1)]
    assert unsplit(check(pool, "residual", plan_for("residual", layouts, actions=actions))) == []


def test_group_norms_of_channels_last_split_their_backward(pool: LocalPool) -> None:
    """Torch ends the process where it is to compute the gradients of their weights alone."""
    blocks = len(graph_of("channels_last", "float64").blocks)
    layouts = [Layout(blocks=blocks // 2), Layout(blocks=blocks - blocks // 2)]
    report = check(pool, "channels_last", plan_for("channels_last", layouts, num_micro_batches=4, schedule=ZB))
    assert unsplit(report) == []


def test_a_list_of_actions_of_ones_own(pool: LocalPool) -> None:
    """Stages that split some micro-batches' backwards and not others, with sends and receives, and a reduction."""
    actions = ("0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B1,0I1,0RECV_B0,0B0,0W1,0REDUCE_GRAD",
               "1RECV_F0,1F0,1RECV_F1,1F1,1I1,1SEND_B1,1B0,1SEND_B0,1W1,1REDUCE_GRAD")
    layout = Layout(blocks=2, mesh=FSDP2, zero=1)
    check(pool, "llama_untied", plan_for("llama_untied", [layout] * 2, actions=actions))


def test_a_list_that_deadlocks_is_refused(pool: LocalPool) -> None:
    actions = ("0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1")
    with pytest.raises(InputError, match="deadlocks"):
        check(pool, "gpt2", plan_for("gpt2", [Layout(blocks=2)] * 2, actions=actions))


UNLIKE: dict[str, list[Layout]] = {
    "tp2 | 1 | 1": [Layout(blocks=2, mesh=TP2), Layout(blocks=1), Layout(blocks=1)],
    "1 | fsdp3": [Layout(blocks=2), Layout(blocks=2, mesh=Mesh(dp_shard=3), zero=3, rows=(2, 1, 1))],
    "fsdp2 | tp2, sequence parallel": [
        Layout(blocks=3, mesh=FSDP2, zero=2, rows=(1, 3)), Layout(blocks=1, mesh=TP2, sequence_parallel=True)],
    "tp2, sequence parallel | dp2": [
        Layout(blocks=2, mesh=TP2, sequence_parallel=True, recompute=Recompute.FULL),
        Layout(blocks=2, mesh=DP2, rows=(3, 1))],
    "cp2 | dp2": [Layout(blocks=2, mesh=Mesh(cp=2)), Layout(blocks=2, mesh=DP2)],
    "tp2, sequence parallel | cp2": [
        Layout(blocks=2, mesh=TP2, sequence_parallel=True), Layout(blocks=2, mesh=Mesh(cp=2), zero=3)],
}


@pytest.mark.parametrize("name", UNLIKE)
def test_stages_of_unlike_layout(pool: LocalPool, name: str) -> None:
    """GPT-2's embedding is tied over stages that hold it in unlike parts."""
    check(pool, "gpt2", plan_for("gpt2", UNLIKE[name]))


def test_unequal_shares_of_rows_weigh_as_they_should(pool: LocalPool) -> None:
    """A mean over rows (no counted targets) and a mean over targets that rows ignore very differently."""
    layout = Layout(blocks=4, mesh=Mesh(dp_shard=3), zero=2, rows=(1, 2, 1))
    check(pool, "llama", plan_for("llama", [layout]))
    graph = graph_of("perceptron", "float64")
    check(pool, "perceptron", staged_plan(graph, [replace(layout, blocks=len(graph.blocks))]))


def test_zero_bubble_over_unlike_stages(pool: LocalPool) -> None:
    layouts = [Layout(blocks=2, mesh=TP2), Layout(blocks=2, mesh=DP2, rows=(3, 1))]
    check(pool, "llama_untied", plan_for("llama_untied", layouts, schedule=ZB))


def test_what_follows_from_no_input_of_its_stage_and_is_used_twice_keeps_the_backward_whole(pool: LocalPool) -> None:
    """T5's decoder begins inside a stage: torch would go through its cross-attention twice."""
    graph = capture_for(fuzz_models.t5, "float64").graph
    actions = ("0F0,0F1,0B0,0B1", "1F0,1F1,1I0,1I1,1W0,1W1", "2F0,2F1,2B0,2B1")
    layouts = [Layout(blocks=5), Layout(blocks=len(graph.blocks) - 6), Layout(blocks=1)]  # the head is the embedding
    report = compare(fuzz_models.t5, staged_plan(graph, layouts, actions=actions), steps=2, pool=pool)
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    assert len(unsplit(report)) == 1 and "decoder.block.0" in unsplit(report)[0]


@pytest.mark.parametrize(("first", "last", "name"), [(4, 6, "glue.4/embedding"), (6, 8, "unsqueeze_2")])
def test_what_follows_from_no_input_of_its_stage_and_leaves_it_keeps_the_backward_whole(
    pool: LocalPool, first: int, last: int, name: str
) -> None:
    """T5's decoder looks up its tokens, or makes a bias for later layers: torch would take no gradient of either."""
    graph = capture_for(fuzz_models.t5, "float64").graph
    actions = ("0F0,0F1,0B0,0B1", "1F0,1F1,1I0,1I1,1W0,1W1", "2F0,2F1,2B0,2B1")
    layouts = [Layout(blocks=first), Layout(blocks=last - first), Layout(blocks=len(graph.blocks) - last)]
    report = compare(fuzz_models.t5, staged_plan(graph, layouts, actions=actions), steps=2, pool=pool)
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    assert len(unsplit(report)) == 1 and f"{name} leaves it" in unsplit(report)[0]


def test_a_plan_that_was_found_for_unlike_nodes(pool: LocalPool) -> None:
    """A node of two quick devices and a slow one of one: stages with meshes of their own, in an order of their own."""
    quick = slow_cluster(2).nodes[0]
    network = replace(quick.network, name="slow", bandwidth_bytes_per_s=5e6)
    slow = replace(quick.device, name="slower", peak_flops=tuple((name, rate / 2) for name, rate in
                                                               quick.device.peak_flops))
    machine = Cluster(name="unlike", nodes=(
        replace(quick, network=network), replace(quick, device=slow, num_devices=1, network=network)))
    plan = find_plan(graph_of("llama_untied", "float64"), machine, PlanRequest(
        global_batch=8, dtype="float64", param_dtype="float64", optimizer="sgd"))
    assert plan.num_stages > 1
    assert len({stage.mesh for stage in plan.stages}) > 1
    check(pool, "llama_untied", plan)


@pytest.mark.parametrize(("number", "zeros"), [(1, (3, 0)), (2, (1, 2)), (2, (0, 3))])
def test_context_axes_that_are_searched_for_unlike_nodes(
    pool: LocalPool, number: int, zeros: tuple[int, int]
) -> None:
    """Single rows, which each stage of two devices splits."""
    quick = slow_cluster(2).nodes[0]
    slow = replace(quick, device=replace(quick.device, name="slower"), num_devices=number)
    machine = Cluster(name="unlike", nodes=(quick, slow))
    engine = Engine(graph_of("llama_untied", "float64"), machine, PlanRequest(
        global_batch=4, dtype="float64", param_dtype="float64", optimizer="sgd"))
    pools = ClusterPools(machine)
    (rewrites,) = context_families(engine, pools, 4)
    costs = MixedCosts(engine, pools, 4, rewrites, context=True)
    parts = []
    for stage, (size, zero) in enumerate(zip((2, number), zeros, strict=True)):
        group = costs.groups.index((stage, size))
        (setting,) = (own for own in costs.settings[group] if (own.candidate.cp, own.candidate.zero) == (size, zero))
        parts.append(Part(2 * stage, 2 * stage + 2, setting, pools.ranks(stage, 0, size), group))
    plan = mixed_plan(engine, costs, tuple(parts))
    assert [stage.mesh.cp for stage in plan.stages] == [2, number]
    check(pool, "llama_untied", plan)
