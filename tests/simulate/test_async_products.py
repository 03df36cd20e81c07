"""What is counted as Megatron does it, where degrees are simulated, against sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import hand_made as hand
import pytest

from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.memory import allocatable_bytes
from autopar.plan.plan import Mesh, Plan, Recompute
from autopar.sharding.reshard import Collective
from autopar.sharding.state import RP, P, padded_shard, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.async_products import PADDED_TO
from autopar.simulate.block_cost import BlockCost, block_cost
from autopar.simulate.class_costs import ClassCosts
from autopar.simulate.overlap import OVERLAP_SLOWDOWN
from autopar.simulate.simulator import simulate
from autopar.simulate.stage_cost import stage_cost

GRAPH, TP, ROWS = hand.graph(), 2, 4
LAYER = GRAPH.block_class["layer"]
HIDDEN_BYTES = 2 * ROWS * hand.SEQ * hand.HIDDEN  # of a whole hidden state
WEIGHTS = 2 * hand.HIDDEN * hand.INNER / TP  # on each rank
SPLIT = ClassSharding(
    cls="layer", inputs=(shard(1),), params=(shard(0), shard(1)), buffers=(), outputs=(shard(1),),
    ops=(
        ("a", Strategy(factor="n", inputs=(RP, shard(0)), outputs=(shard(2),))),
        ("b", Strategy(factor="n", inputs=(shard(2),), outputs=(shard(2),))),
        ("c", Strategy(factor="k", inputs=(shard(2), shard(1)), outputs=(P,))),
        ("d", Strategy(factor="s", inputs=(shard(1), shard(1)), outputs=(shard(1),))),
    ),
)


def layer_cost(sharding: ClassSharding, *, as_megatron: bool) -> BlockCost:
    return block_cost(
        GRAPH, LAYER, sharding, tp=TP, rows=ROWS, device=hand.DEVICE, tp_group=hand.cluster().group((0, 1)),
        dtype="bfloat16", as_megatron=as_megatron,
    )


def test_a_product_keeps_its_part_of_the_sequence() -> None:
    own, theirs = (layer_cost(SPLIT, as_megatron=flag) for flag in (False, True))
    assert own.saved_bytes - theirs.saved_bytes == HIDDEN_BYTES / 2
    assert theirs.transient_bytes >= own.transient_bytes


def test_communication_runs_beside_products_and_the_sum_is_made_by_them() -> None:
    own, theirs = (layer_cost(SPLIT, as_megatron=flag) for flag in (False, True))
    group = hand.cluster().group((0, 1))
    gather, scatter = (
        collective_time_s(kind, HIDDEN_BYTES, group) for kind in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    )
    assert theirs.forward_tp_comm_s == own.forward_tp_comm_s == pytest.approx(gather + scatter)
    # Both hide behind half of the first product's backward, but for what they slow it down.
    assert theirs.backward_tp_comm_s == pytest.approx(gather + OVERLAP_SLOWDOWN * (gather + scatter))
    # The end of a product reads and writes 4 bytes where it wrote 2.
    assert theirs.backward_compute_s - own.backward_compute_s == pytest.approx(6 * WEIGHTS / 1e12)
    assert theirs.summed_in_place == (True, True)
    assert own.summed_in_place == (False, False)


def test_communication_that_takes_longer_than_the_product_shows() -> None:
    slow = replace(hand.LINK, bandwidth_bytes_per_s=1e8)
    machine = replace(hand.cluster(), nodes=(replace(hand.cluster().nodes[0], link=slow),))
    group = machine.group((0, 1))
    costs = ClassCosts(GRAPH, LAYER, tp=TP, rows=ROWS, device=hand.DEVICE, tp_group=group, dtype="bfloat16")
    half = costs.op_time(LAYER.ops[0], SPLIT.strategy["a"]).backward_s / 2
    found = block_cost(GRAPH, LAYER, SPLIT, tp=TP, rows=ROWS, device=hand.DEVICE, tp_group=group, dtype="bfloat16",
                       as_megatron=True)
    gather, scatter = (
        collective_time_s(kind, HIDDEN_BYTES, group) for kind in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    )
    hidden = 2 * (1 - OVERLAP_SLOWDOWN) * half
    assert found.backward_tp_comm_s == pytest.approx(2 * gather + scatter - hidden)


def test_without_split_sequences_only_uneven_dims_change() -> None:
    whole = hand.megatron()[0]
    assert layer_cost(whole, as_megatron=True) == layer_cost(whole, as_megatron=False)


def test_checkpoints_of_systems_run_to_the_end() -> None:
    """Where parameters are whole, with stages and a tensor axis or without: the layers' second products run again."""
    plan, machine = hand.plan(GRAPH, recompute=Recompute.FULL), hand.cluster()
    for zero, again in ((1, 1), (3, 0)):
        plan = replace(plan, stages=tuple(replace(stage, zero=zero) for stage in plan.stages))
        own, theirs = simulate(GRAPH, machine, plan), simulate(GRAPH, machine, plan, as_system=True)
        cost, all_ = (
            block_cost(GRAPH, LAYER, None, tp=1, rows=plan.micro_batch, device=hand.DEVICE, tp_group=None,
                       dtype=plan.dtype, recomputes_all=flag)
            for flag in (False, True)
        )
        assert (all_.recompute_s, all_.recompute_tp_s) == (cost.forward_compute_s, cost.forward_tp_comm_s)
        added_s = 2 * plan.num_micro_batches * (all_.recompute_s - cost.recompute_s)
        assert theirs.step_time_s - own.step_time_s == pytest.approx(again * added_s)
        assert sum("run to its end" in note for note in theirs.notes) == again


def test_an_uneven_dim_is_padded() -> None:
    group, state = hand.cluster().group((0, 1)), padded_shard(0, 1001)
    own, theirs = (
        ClassCosts(GRAPH, LAYER, tp=TP, rows=ROWS, device=hand.DEVICE, tp_group=group, dtype="bfloat16", pad=pad)
        for pad in (1, PADDED_TO)
    )
    assert own.local("up", state).shape[0] == 501
    assert theirs.local("up", state).shape[0] == 512
    assert theirs.local("up", shard(0)).shape[0] == hand.INNER / 2  # divides


def replicas(zero: int) -> Plan:
    return replace(hand.plan(GRAPH, mesh=Mesh(dp_replicate=2, tp=TP), zero=zero), num_devices=4)


def test_whole_replicas_reduce_after_the_backward() -> None:
    plan, machine = replicas(0), hand.cluster()
    own, theirs = (stage_cost(GRAPH, machine, plan, 0, as_megatron=flag) for flag in (False, True))
    size = 4 * theirs.param_numel
    expected = collective_time_s(Collective.ALL_REDUCE, size, machine.group((0, 2)), groups_per_node=2)
    assert theirs.step_end_s == pytest.approx(expected)
    assert own.step_end_s < theirs.step_end_s


def test_only_degrees_are_counted_so_and_the_notes_say_it() -> None:
    plan, machine = replicas(0), hand.cluster()
    own, theirs = simulate(GRAPH, machine, plan), simulate(GRAPH, machine, plan, as_system=True)
    assert own.step_time_s < theirs.step_time_s
    assert not any("Megatron" in note for note in own.notes)
    assert sum("as in Megatron" in note for note in theirs.notes) == 2
    cpu = replace(machine.nodes[0], device=replace(hand.DEVICE, name="CPU"))
    cpus = replace(machine, nodes=(cpu,))
    assert simulate(GRAPH, cpus, plan, as_system=True) == simulate(GRAPH, cpus, plan)
    one = hand.plan(GRAPH, mesh=Mesh(dp_replicate=2))
    assert simulate(GRAPH, machine, one, as_system=True).step_time_s == simulate(GRAPH, machine, one).step_time_s


def test_degrees_may_use_all_memory_that_there_is() -> None:
    """Between what plans leave and what the driver and the process take."""
    plan = hand.plan(GRAPH, micro_batch=512)
    peak = simulate(GRAPH, hand.cluster(), plan).groups[0].memory.total
    assert peak > 20 * 2**30  # so that the process's own share is small
    for need, own, theirs in ((0.90, True, True), (0.93, False, True), (0.99, False, False)):
        device = replace(hand.DEVICE, memory_bytes=int(peak / need))
        machine = replace(hand.cluster(), nodes=(replace(hand.cluster().nodes[0], device=device),))
        assert simulate(GRAPH, machine, plan).feasible is own
        assert simulate(GRAPH, machine, plan, as_system=True).feasible is theirs
    said = replace(hand.DEVICE, usable_memory_fraction=0.8)
    assert allocatable_bytes(said) == said.usable_memory_bytes
