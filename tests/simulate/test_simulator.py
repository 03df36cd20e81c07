"""Simulated steps: sums, closed forms, memory, the report's keys, and what is refused."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import hand_made as hand
import pytest

from autopar.cluster.cluster import Cluster, Node
from autopar.errors import InputError, PlanMismatchError
from autopar.plan.actions import actions_to_csv
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule
from autopar.simulate.links import boundary_bytes, link_times
from autopar.simulate.overlap import OVERLAP_SLOWDOWN, backward_exposed, forward_exposed
from autopar.simulate.schedules import schedule_actions
from autopar.simulate.simulator import simulate
from autopar.simulate.stage_cost import stage_cost
from autopar.simulate.timeline import Timeline, timeline_from_json, timeline_to_json

MODEL = hand.graph(4)
GIB = 2**30


def run(plan: Plan, num_nodes: int = 1) -> Timeline:
    timeline = simulate(MODEL, hand.cluster(num_nodes), plan)
    parts = timeline.report()["breakdown_s"]
    assert sum(parts.values()) == pytest.approx(timeline.step_time_s)
    assert all(value >= 0 for value in parts.values())
    return timeline


def test_one_device() -> None:
    plan = hand.plan(MODEL)
    cost, timeline = stage_cost(MODEL, hand.cluster(), plan, 0), run(plan)
    assert timeline.step_time_s == pytest.approx(4 * (cost.forward_s + cost.backward_s) + cost.optimizer_s)
    parts = timeline.breakdown
    assert (parts.tp_comm, parts.dp_comm, parts.pp_comm) == (0, 0, 0)
    assert parts.bubble == pytest.approx(0, abs=1e-15)  # the difference of two sums
    numel = MODEL.num_params
    memory = timeline.groups[0].memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == (6 * numel, 4 * numel, 8 * numel)
    flops = 3 * 4 * 4 * hand.SEQ * (4 * 4 * hand.HIDDEN * hand.INNER + 2 * hand.HIDDEN * 16)
    assert timeline.model_flops == pytest.approx(flops)
    assert timeline.mfu == pytest.approx(flops / timeline.step_time_s / 100e12)
    assert timeline.tokens_per_s_per_device == pytest.approx(16 * hand.SEQ / timeline.step_time_s)


def test_equal_stages_have_the_bubble_of_the_closed_form() -> None:
    plan = hand.plan(MODEL, cuts=(0, 3, 6), num_micro_batches=8)
    first, last = (stage_cost(MODEL, hand.cluster(), plan, i) for i in range(2))
    timeline = run(plan)
    slow, fast = max(first.forward_s + first.backward_s, last.forward_s + last.backward_s), min(
        first.forward_s + first.backward_s, last.forward_s + last.backward_s
    )
    assert 8 * slow < timeline.step_time_s < 8 * slow + fast + 20 * max(link_times(MODEL, hand.cluster(), plan, 0)) + (
        first.optimizer_s + last.optimizer_s
    )
    assert timeline.bubble_fraction == pytest.approx(1 / 9, abs=0.02)
    x = 2 * 4 * hand.SEQ * hand.HIDDEN
    assert boundary_bytes(MODEL, plan, 0) == (x, x)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedules(schedule: Schedule) -> None:
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    cuts = (0, 2, 3, 4, 6) if chunks == 2 else (0, 3, 6)
    timeline = run(hand.plan(MODEL, cuts=cuts, schedule=schedule, num_micro_batches=8, num_chunks=chunks))
    assert [group.stage for group in timeline.groups] == [0, 1]
    split = 8 if schedule is Schedule.ZERO_BUBBLE else 0  # on the second stage alone
    assert len([event for event in timeline.events if event.kind in "FBIW"]) == 2 * 8 * chunks * 2 + split


def test_the_first_stage_has_no_gradients_of_inputs_to_compute_before_those_of_weights() -> None:
    """Its backward is one, at its I: a W that stands later does not put any of it off."""
    first = "".join(f"0{a}," for a in ["F0", "F1", "F2", "F3", "I0", "I1", "I2", "I3", "W0", "W1", "W2", "W3"])[:-1]
    second = "".join(f"1{a}," for a in ["F0", "I0", "F1", "I1", "F2", "I2", "F3", "I3", "W0", "W1", "W2", "W3"])[:-1]
    plan = replace(hand.plan(MODEL, cuts=(0, 3, 6), num_micro_batches=4), actions=(first, second))
    timeline = run(plan)
    kinds = [{event.kind for event in timeline.events if event.group == rank} & set("FBIW") for rank in (0, 1)]
    assert kinds == [{"F", "B"}, {"F", "I", "W"}]
    whole = replace(plan, actions=("0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3", second))
    assert timeline == run(whole)


def test_gpipe_holds_more_than_1f1b_and_recomputation_less() -> None:
    def held(**kwargs: object) -> float:
        plan = hand.plan(MODEL, cuts=(0, 3, 6), num_micro_batches=8, **kwargs)  # type: ignore[arg-type]
        return max(group.memory.activations for group in run(plan).groups)

    assert held(schedule=Schedule.GPIPE) > held() > held(recompute=Recompute.FULL)


def test_zero_levels() -> None:
    timelines = [
        run(hand.plan(
            MODEL, mesh=Mesh(dp_replicate=1 if zero else 8, dp_shard=8 if zero else 1), zero=zero, micro_batch=1
        ))
        for zero in range(4)
    ]
    totals = [timeline.peak_memory_bytes for timeline in timelines]
    assert totals[0] > totals[1] > totals[3]
    # ZeRO 3 gathers in every micro-batch, 2 reduces in every one, 0 and 1 only once.
    assert timelines[3].breakdown.dp_comm > timelines[2].breakdown.dp_comm > timelines[1].breakdown.dp_comm
    assert timelines[1].breakdown.optimizer < timelines[0].breakdown.optimizer


def test_tensor_axis() -> None:
    timeline = run(hand.plan(MODEL, mesh=Mesh(tp=4, dp_shard=2), zero=1))
    assert timeline.breakdown.tp_comm > 0
    assert timeline.num_devices == 8


def test_report() -> None:
    timeline = run(hand.plan(MODEL, cuts=(0, 3, 6), mesh=Mesh(dp_shard=4), zero=3))
    report = json.loads(json.dumps(timeline.report()))
    assert set(report) >= {
        "step_time_s", "tokens_per_s_per_device", "mfu", "bubble_fraction", "feasible", "infeasible_reason",
        "breakdown_s", "devices",
    }
    assert set(report["breakdown_s"]) == {"compute", "tp_comm", "dp_comm", "pp_comm", "bubble", "optimizer"}
    assert [device["rank"] for device in report["devices"]] == list(range(8))
    assert [device["stage"] for device in report["devices"]] == [0] * 4 + [1] * 4
    for device in report["devices"]:
        assert set(device["memory_gib"]) == {"parameters", "gradients", "optimizer", "activations", "buffers"}
        assert sum(device["memory_gib"].values()) == pytest.approx(device["peak_memory_gib"])
    assert timeline_from_json(timeline_to_json(timeline)) == timeline


def test_bad_timeline_files() -> None:
    for text in ("", "{}", '{"format": "autopar-timeline", "version": 99}', "[1]", '{"format": 3}'):
        with pytest.raises(InputError):
            timeline_from_json(text)


def test_what_does_not_fit_is_named() -> None:
    timeline = run(hand.plan(MODEL, micro_batch=4096))
    assert not timeline.feasible
    assert timeline.infeasible_reason is not None
    assert "activations" in timeline.infeasible_reason
    assert "rank 0" in timeline.infeasible_reason


def test_an_expert_axis_needs_experts_and_a_context_axis_shardings() -> None:
    with pytest.raises(InputError, match="has no experts"):
        run(hand.plan(MODEL, mesh=Mesh(ep=2, dp_shard=2), zero=3))
    with pytest.raises(PlanMismatchError, match="cp axis of 2 but blocks without a sharding"):
        run(hand.plan(MODEL, mesh=Mesh(cp=2)))


def test_plans_that_do_not_match() -> None:
    good = hand.plan(MODEL)
    with pytest.raises(PlanMismatchError, match="covers 4 blocks"):
        simulate(MODEL, hand.cluster(), replace(good, stages=(replace(good.stages[0], last=4),)))
    with pytest.raises(PlanMismatchError, match="rank 99"):
        simulate(MODEL, hand.cluster(), replace(good, stages=(replace(good.stages[0], devices=(99,)),)))
    with pytest.raises(PlanMismatchError, match="mesh of 2"):
        simulate(MODEL, hand.cluster(), replace(good, stages=(replace(good.stages[0], mesh=Mesh(tp=2)),)))
    with pytest.raises(InputError, match="optimizer"):
        simulate(MODEL, hand.cluster(), replace(good, optimizer="magic"))
    with pytest.raises(InputError, match="dtype"):
        simulate(MODEL, hand.cluster(), replace(good, dtype="float3"))


def test_thousands_of_devices_are_fast() -> None:
    plan = hand.plan(MODEL, cuts=(0, 2, 3, 4, 6), mesh=Mesh(tp=8, dp_shard=256), zero=1, num_micro_batches=64)
    start = time.perf_counter()
    report = run(plan, num_nodes=1024).report()
    assert len(report["devices"]) == 8192
    assert time.perf_counter() - start < 2


def test_slow_links_between_stages_show() -> None:
    plan = hand.plan(MODEL, cuts=(0, 3, 6), mesh=Mesh(tp=8), num_micro_batches=8)
    near = replace(plan, stages=tuple(
        replace(stage, mesh=Mesh(), devices=(i,)) for i, stage in enumerate(plan.stages)
    ), num_devices=2, shardings=())
    assert run(plan, num_nodes=2).breakdown.pp_comm > run(near).breakdown.pp_comm >= 0


def test_overlap_by_hand() -> None:
    # Gathers 1 s, compute 2 s: only the first is waited for; two are hidden.
    hidden = forward_exposed([2, 2, 2], [1, 1, 1])
    assert hidden.during_s == pytest.approx(1 + 2 * OVERLAP_SLOWDOWN)
    # Gathers 3 s, compute 2 s: 3, then each gather outlasts the compute before it by 1.
    assert forward_exposed([2, 2, 2], [3, 3, 3]).during_s == pytest.approx(3 + 1 + 1 + 4 * OVERLAP_SLOWDOWN)
    # Reductions after each unit: the last one is left over.
    left = backward_exposed([2, 2], [0, 0], [1, 1])
    assert left.during_s == pytest.approx(OVERLAP_SLOWDOWN * 1)
    assert left.after_s == pytest.approx(1)
    assert backward_exposed([2, 2], [0, 0], [5, 5]).after_s == pytest.approx(8)
    # Gather 1, compute 2 with the next gather behind it, compute 2.
    assert backward_exposed([2, 2], [1, 1], [0, 0]).during_s == pytest.approx(1 + OVERLAP_SLOWDOWN)


def test_the_breakdown_is_of_the_busiest_device_and_a_short_last_stage_is_no_bubble() -> None:
    plan = hand.plan(MODEL, cuts=(0, 5, 6), num_micro_batches=8)
    timeline = run(plan)
    assert timeline.critical == 0
    assert timeline.report()["critical_rank"] == 0
    assert timeline.bubble_fraction < 0.05
    assert timeline.breakdown.compute > 0.9 * timeline.step_time_s


def two_types() -> Cluster:
    slow = replace(hand.DEVICE, name="slow", peak_flops=(("bfloat16", 50e12), ("float32", 10e12)))
    nodes = tuple(Node(device=device, num_devices=2, link=hand.LINK, network=hand.NETWORK)
                  for device in (hand.DEVICE, slow))
    return Cluster(name="two", nodes=nodes)


def test_devices_of_two_types_in_one_stage() -> None:
    plan = hand.plan(MODEL, mesh=Mesh(dp_replicate=4))
    timeline = simulate(MODEL, two_types(), plan)
    assert [group.ranks for group in timeline.groups] == [(0, 1), (2, 3)]
    assert timeline.rank_peak_bytes == (max(group.memory.total for group in timeline.groups),)
    fast, slow = timeline.groups
    assert slow.busy_s > 1.5 * fast.busy_s
    assert timeline.critical == 1
    assert timeline.step_time_s == pytest.approx(sum(timeline.report()["breakdown_s"].values()))
    ends = {(e.group, e.micro_batch): e.end_s - e.start_s for e in timeline.events if e.kind == "F"}
    assert ends[1, 0] > ends[0, 0]


def test_the_faster_type_takes_more_rows() -> None:
    plan = hand.plan(MODEL, mesh=Mesh(dp_replicate=4), micro_batch=6)
    shared = replace(plan, stages=(replace(plan.stages[0], rows=(8, 8, 4, 4)),))
    even, uneven = (simulate(MODEL, two_types(), item) for item in (plan, shared))
    assert uneven.step_time_s < 0.8 * even.step_time_s
    assert uneven.model_flops == pytest.approx(even.model_flops)
    assert uneven.groups[0].memory.activations == pytest.approx(2 * uneven.groups[1].memory.activations)
    assert timeline_from_json(timeline_to_json(uneven)) == uneven


def test_stages_of_unlike_layout() -> None:
    """Two devices feed one: it takes both halves of the rows, one after the other, and sends both gradients back."""
    plan = hand.plan(MODEL, cuts=(0, 3, 6), micro_batch=2)
    two = replace(plan.stages[0], devices=(0, 1), mesh=Mesh(dp_replicate=2))
    one = replace(plan.stages[1], devices=(2,), rows=(4,))
    unlike = replace(plan, stages=(two, one), num_devices=3, global_batch=16)
    half = 2 * 2 * hand.SEQ * hand.HIDDEN
    message = hand.LINK.latency_s + half / hand.LINK.bandwidth_bytes_per_s
    assert link_times(MODEL, hand.cluster(), unlike, 0) == pytest.approx((2 * message, 2 * message))
    timeline = run(unlike)
    assert [group.ranks for group in timeline.groups] == [(0, 1), (2,)]
    assert timeline.model_flops == pytest.approx(run(hand.plan(MODEL, micro_batch=4)).model_flops)


def test_tensor_ranks_of_unlike_number() -> None:
    """A whole tensor on two ranks goes to four: each of the two sends to two of them."""
    plan = hand.plan(MODEL, cuts=(0, 3, 6), mesh=Mesh(tp=2))
    four = replace(plan.stages[1], devices=(2, 3, 4, 5), mesh=Mesh(tp=4))
    unlike = replace(plan, stages=(plan.stages[0], four), num_devices=6)
    size = 2 * 4 * hand.SEQ * hand.HIDDEN
    message = hand.LINK.latency_s + size / hand.LINK.bandwidth_bytes_per_s
    assert link_times(MODEL, hand.cluster(), unlike, 0) == pytest.approx((2 * message, message))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_memory_over_time_peaks_at_what_is_reported(schedule: Schedule) -> None:
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    cuts = (0, 2, 3, 4, 6) if chunks == 2 else (0, 3, 6)
    for recompute in (Recompute.NONE, Recompute.FULL):
        timeline = run(hand.plan(
            MODEL, cuts=cuts, schedule=schedule, num_micro_batches=8, num_chunks=chunks, recompute=recompute
        ))
        for group in timeline.groups:
            assert max(size for _, size in group.memory_steps) == pytest.approx(group.memory.total)
            assert group.memory_steps[-1][0] <= timeline.step_time_s * (1 + 1e-12)


def test_a_plans_own_order_is_executed() -> None:
    plan = hand.plan(MODEL, cuts=(0, 3, 6), num_micro_batches=8)
    lists = schedule_actions(Schedule.GPIPE, 2, 8)
    own = replace(plan, actions=tuple(actions_to_csv(lists).split()))
    assert run(own) == run(replace(plan, schedule=Schedule.GPIPE))
    assert run(own) != run(plan)


def test_without_detail_the_figures_are_the_same() -> None:
    plan = hand.plan(MODEL, cuts=(0, 3, 6))
    brief, whole = simulate(MODEL, hand.cluster(), plan, detail=False), run(plan)
    parts = replace(
        whole.breakdown, bubble=pytest.approx(whole.breakdown.bubble + whole.breakdown.pp_comm), pp_comm=0.0
    )
    assert brief.breakdown == parts
    assert brief.report() == replace(
        whole, breakdown=brief.breakdown, bubble_fraction=brief.bubble_fraction
    ).report()
    assert brief.events == ()
