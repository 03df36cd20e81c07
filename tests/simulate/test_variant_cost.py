"""What variants of a layer cost, against sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import hand_made as hand
import pytest

from autopar.cluster.cluster import Cluster, DeviceType
from autopar.errors import InputError, PlanMismatchError
from autopar.plan.plan import Mesh, Plan, Recompute, Variant
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.simulator import simulate
from autopar.simulate.timeline import Timeline
from autopar.simulate.variant_cost import variant_cost

GRAPH = hand.graph(4)
BANDWIDTH = 1e12


def device(host_bandwidth: float | None) -> DeviceType:
    return replace(hand.DEVICE, host_bandwidth_bytes_per_s=host_bandwidth)


def cluster(host_bandwidth: float | None) -> Cluster:
    made = hand.cluster()
    node = replace(made.nodes[0], device=device(host_bandwidth))
    return replace(made, nodes=(node,))


def layer() -> BlockCost:
    return block_cost(
        GRAPH, GRAPH.block_class["layer"], None, tp=1, rows=4, device=hand.DEVICE, tp_group=None, dtype="bfloat16"
    )


def step(*variants: Variant, host_bandwidth: float | None = 1e10, **changes: object) -> Timeline:
    plan = hand.plan(GRAPH)
    stage = replace(plan.stages[0].with_variants(variants), **changes)  # type: ignore[arg-type]
    return simulate(GRAPH, cluster(host_bandwidth), replace(plan, stages=(stage,)))


def test_a_slow_copy_is_waited_for_and_a_quick_one_takes_memory_bandwidth() -> None:
    cost = layer()
    away = Variant(offload=True)
    slow = variant_cost(cost, away, device(1e9))
    copy_s = cost.saved_bytes / 0.8e9
    assert slow.forward_s == pytest.approx(copy_s - cost.forward_compute_s)
    assert slow.backward_s == pytest.approx(copy_s - cost.backward_compute_s)
    assert (slow.held_bytes, slow.host_bytes) == (0, cost.saved_bytes)
    assert slow.extra_bytes == pytest.approx(2 * cost.saved_bytes + cost.transient_bytes)
    quick = variant_cost(cost, Variant(recompute=Recompute.FULL, offload=True), device(5e11))
    assert quick.forward_s == pytest.approx(cost.boundary_bytes / BANDWIDTH)
    assert quick.backward_s == pytest.approx(cost.recompute_s + cost.boundary_bytes / BANDWIDTH)
    assert (quick.held_bytes, quick.host_bytes) == (0, cost.boundary_bytes)


def test_counts_add_up_in_a_step() -> None:
    none, full = Variant(), Variant(recompute=Recompute.FULL)
    times = [step(*([full] * count + [none] * (4 - count))) for count in range(5)]
    cost = layer()
    for count, timeline in enumerate(times):
        assert timeline.step_time_s == pytest.approx(times[0].step_time_s + count * 4 * cost.recompute_s)
        activations = timeline.groups[0].memory.activations
        if count:
            freed = count * (cost.saved_bytes - cost.boundary_bytes) - cost.saved_bytes
            assert times[0].groups[0].memory.activations - activations == pytest.approx(freed)


def test_optimizer_state_leaves_the_device_and_is_streamed() -> None:
    variants = [Variant()] * 4
    kept, away = step(*variants), step(*variants, offload_optimizer=True)
    state = kept.groups[0].memory.optimizer
    assert away.groups[0].memory.optimizer == 0
    assert away.step_time_s - kept.step_time_s == pytest.approx(2 * state / 0.8e10)
    assert f"up to {state / 2**30:.3g} GiB of host memory" in " ".join(away.notes)


def test_nothing_is_offloaded_without_a_host_link() -> None:
    for changes in (dict(variants=[Variant(offload=True)] * 4), dict(offload_optimizer=True, variants=[Variant()] * 4)):
        variants = changes.pop("variants")
        with pytest.raises(InputError, match="hand has no known link to host memory"):
            step(*variants, host_bandwidth=None, **changes)  # type: ignore[misc]


def test_what_exceeds_host_memory_is_infeasible() -> None:
    variants = [Variant(offload=True)] * 4
    made = cluster(1e10)
    stage = hand.plan(GRAPH).stages[0].with_variants(variants)
    plan = replace(hand.plan(GRAPH), stages=(stage,))
    size = 4 * layer().saved_bytes
    for share, feasible in ((size, True), (size - 1, False)):
        node = replace(made.nodes[0], device=replace(made.nodes[0].device, host_memory_bytes=share))
        timeline = simulate(GRAPH, replace(made, nodes=(node,)), plan)
        assert timeline.feasible == feasible
        assert feasible or "in host memory, and its share of that is" in str(timeline.infeasible_reason)


def test_counts_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match="variants of stage 0 are not counts of its 4 layers"):
        step(Variant(recompute=Recompute.FULL), Variant())


def test_what_a_stage_received_stays_where_its_layers_are_offloaded() -> None:
    plan: Plan = hand.plan(GRAPH, cuts=(0, 3, 6), mesh=Mesh())
    away = [Variant(offload=True)] * 2
    stages = tuple(stage.with_variants(away) for stage in plan.stages)
    timeline = simulate(GRAPH, cluster(1e10), replace(plan, stages=stages))
    cost, rest = layer(), block_cost(
        GRAPH, GRAPH.block_class["loss"], None, tp=1, rows=4, device=hand.DEVICE, tp_group=None, dtype="bfloat16"
    )
    extra = 2 * cost.saved_bytes + cost.transient_bytes
    assert timeline.groups[1].memory.activations == pytest.approx(cost.boundary_bytes + rest.saved_bytes + extra)
