"""Memory of a step of one micro-batch: by hand, against a list of allocations, and as the simulator reports it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hand_made as hand
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost_models.memory import WORKSPACE_BYTES
from autopar.plan.plan import Mesh, Plan, Recompute
from autopar.simulate.block_cost import block_cost
from autopar.simulate.simulator import simulate
from autopar.simulate.single_backward import BackwardBlock, backward_moments
from autopar.simulate.stage_cost import stage_cost
from autopar.simulate.timeline import MemoryBytes

MODEL = hand.graph(4)
HEAD, TABLE = 16 * hand.HIDDEN, 1000 * hand.HIDDEN
LAYER = 2 * hand.HIDDEN * hand.INNER


def test_moments_by_hand() -> None:
    first = BackwardBlock(held=10, beside=4, copy=2, making=6, made=5)
    last = BackwardBlock(held=20, beside=8, copy=3, making=7, made=9)
    found = [moment.total for moment in backward_moments([first, last], kept=1)]
    assert found == [1 + 10 + 20 + 2 + 3 + 8, 1 + 10 + 2 + 9 + 6]
    sizes = [(moment.activations, moment.buffers) for moment in backward_moments([first, last], kept=1)]
    assert sizes == [(1 + 30 + 8, 0), (1 + 10, 6)]


def test_a_gradient_of_two_blocks_waits_for_the_first() -> None:
    first, between, last = (
        BackwardBlock(held=1, beside=0, making=40, made=30, joined=20), BackwardBlock(held=1, beside=0),
        BackwardBlock(held=1, beside=5, making=20, waiting=20),
    )
    assert [moment.total for moment in backward_moments([first, between, last])] == [3 + 20, 2 + 20, 1 + 40]


BYTES = st.integers(0, 100)
BLOCKS = st.lists(
    st.builds(BackwardBlock, held=BYTES, beside=BYTES, copy=BYTES, making=BYTES, made=BYTES), min_size=1, max_size=5
)


@given(BLOCKS, BYTES)
def test_the_peak_is_that_of_a_list_of_allocations(blocks: list[BackwardBlock], kept: int) -> None:
    live: Counter[str] = Counter({"kept": kept})
    for i, block in enumerate(blocks):  # the forward
        live[f"activations {i}"], live[f"copy {i}"] = int(block.held), int(block.copy)
    peak = 0
    for i in reversed(range(len(blocks))):
        for beside in (blocks[i].beside, blocks[i].making):
            live["beside"] = int(beside)
            peak = max(peak, live.total())
            del live["beside"]
        del live[f"activations {i}"], live[f"copy {i}"]
        live[f"gradients {i}"] = int(blocks[i].made)
    assert max(moment.total for moment in backward_moments(blocks, kept)) == peak


def memory(plan: Plan, index: int = 0) -> MemoryBytes:
    return simulate(MODEL, hand.cluster(), plan).groups[index].memory


def test_one_device_has_hardly_any_gradients_when_its_backward_begins() -> None:
    """Of many rows: the last layer's moment, which the head's gradients are left to."""
    plan = hand.plan(MODEL, num_micro_batches=1, micro_batch=4096)
    cost = stage_cost(MODEL, hand.cluster(), plan, 0)
    layer, head = (
        block_cost(
            MODEL, MODEL.block_class[name], plan.class_shardings(name, plan.stages[0]), tp=1, rows=4096,
            device=hand.DEVICE, tp_group=None, dtype="bfloat16",
        ) for name in ("layer", "loss")
    )
    found = memory(plan)
    assert (found.parameters, found.optimizer) == (6 * MODEL.num_params - 2 * HEAD, 8 * MODEL.num_params)
    assert found.gradients == 4 * HEAD
    assert found.activations == cost.held_bytes - head.saved_bytes + layer.transient_bytes
    assert found.total == cost.peak_bytes(1)


def test_one_device_has_hardly_any_activations_when_its_backward_ends() -> None:
    """Of one row: the first layer's gradients in both dtypes, beside those of all others and copies yet to be used."""
    found = memory(hand.plan(MODEL, num_micro_batches=1, micro_batch=1))
    assert found.parameters == 4 * MODEL.num_params + 2 * (TABLE + LAYER)
    assert found.gradients == 4 * (HEAD + 3 * LAYER)
    assert found.activations < 0.01 * found.total
    assert found.buffers == (2 + 4) * LAYER + WORKSPACE_BYTES


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shards_of_gradients_are_left_by_each_layer(zero: int) -> None:
    """Of one row for each of four ranks. What lies outside layers, and its gradients, are whole until the end."""
    found = memory(hand.plan(MODEL, num_micro_batches=1, micro_batch=1, mesh=Mesh(dp_shard=4), zero=zero))
    if zero == 3:  # the first layer's moment
        assert found.parameters == MODEL.num_params + 2 * (HEAD + TABLE)
        assert found.gradients == 2 * HEAD + 3 * LAYER
        assert found.buffers == 2 * 3 * LAYER + (2 + 4 + 1) * LAYER + WORKSPACE_BYTES
    else:  # the last layer's: each frees more of a copy than it leaves of gradients
        assert found.parameters == (1 + 2) * MODEL.num_params
        assert found.gradients == 2 * HEAD
        assert found.buffers == (4 + 1) * LAYER + WORKSPACE_BYTES


def test_several_micro_batches_keep_their_gradients() -> None:
    plan = hand.plan(MODEL, num_micro_batches=2)
    cost = stage_cost(MODEL, hand.cluster(), plan, 0)
    assert cost.single is None
    assert memory(plan).total == cost.static.total + max(cost.held_bytes + cost.extra_bytes, cost.step_end_bytes)


@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize(("cuts", "chunks"), [((0, 6), 1), ((0, 3, 6), 1), ((0, 1, 3, 5, 6), 2)])
def test_it_is_never_more_than_all_at_once(
    rows: int, recompute: Recompute, cuts: tuple[int, ...], chunks: int
) -> None:
    plan = hand.plan(
        MODEL, num_micro_batches=1, micro_batch=rows, cuts=cuts, num_chunks=chunks, recompute=recompute,
    )
    if chunks > 1:
        plan = replace(plan, actions=("0F0,2F0,2B0,0B0", "1F0,3F0,3B0,1B0"))
    timeline = simulate(MODEL, hand.cluster(), plan)
    for rank, group in enumerate(timeline.groups):
        own = [stage_cost(MODEL, hand.cluster(), plan, i) for i in range(rank, plan.num_stages, len(timeline.groups))]
        together = sum(cost.static.total + cost.held_bytes + cost.extra_bytes for cost in own)
        making = 4 * sum(cost.param_numel for cost in own)  # of gradients in the compute dtype, and copies
        assert 0.3 * together < group.memory.total < together + making
        assert max(size for _, size in group.memory_steps) == pytest.approx(group.memory.total)


def test_systems_keep_their_gradients_where_parameters_are_whole() -> None:
    plan = hand.plan(MODEL, num_micro_batches=1, micro_batch=4096)
    cost = stage_cost(MODEL, hand.cluster(), plan, 0)
    kept = simulate(MODEL, hand.cluster(), plan, as_system=True).groups[0].memory
    assert kept.total == cost.static.total + cost.held_bytes + cost.extra_bytes > memory(plan).total
    shards = replace(plan, stages=(replace(plan.stages[0], zero=3),))
    assert simulate(MODEL, hand.cluster(), shards, as_system=True).groups[0].memory == memory(shards)
