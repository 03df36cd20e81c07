"""A tensor axis that a user asks for splits products, even where repeating them would be faster."""

from dataclasses import replace

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.search.planner import Degrees, plan_from_degrees
from autopar.search.shardings import ShardingChooser
from autopar.sharding.state import padded_shard
from autopar.simulate.class_costs import ClassCosts


def test_an_asked_axis_splits_what_the_search_would_repeat() -> None:
    graph, machine = mlp_chain(num_layers=2, hidden=64, inner=256, seq_len=32), cluster(1, 2)
    free = ShardingChooser(graph, machine, "bfloat16").choose(2, sequence_parallel=False)
    assert free is not None and not free.splits, "a tiny model is best repeated"
    plan = plan_from_degrees(graph, machine, Degrees(global_batch=8, tp=2))
    assert any(strategy.factor for choice in plan.shardings for _, strategy in choice.ops)
    assert any("as asked" in note for note in plan.notes)


def test_what_nothing_can_split_is_said() -> None:
    graph, machine = mlp_chain(num_layers=2, hidden=3, inner=3, seq_len=3), cluster(1, 2)
    layer = graph.block_class[graph.blocks[1].cls]
    unruled = replace(layer, ops=tuple(replace(op, target=op.target.replace("aten", "mine")) for op in layer.ops))
    graph = replace(graph, classes=tuple(unruled if cls is layer else cls for cls in graph.classes))
    plan = plan_from_degrees(graph, machine, Degrees(global_batch=8, tp=2))
    assert not any(strategy.factor for _, strategy in plan.sharding[graph.blocks[1].cls].ops)
    assert any("can split no product" in note for note in plan.notes)


def test_what_does_not_divide_is_padded_at_its_price() -> None:
    graph, machine = mlp_chain(num_layers=2, hidden=3, inner=3, seq_len=3), cluster(1, 2)
    plan = plan_from_degrees(graph, machine, Degrees(global_batch=8, tp=2))
    cls = graph.block_class[graph.blocks[1].cls]
    op, strategy = cls.ops[0], plan.sharding[cls.name].strategy[cls.ops[0].name]
    assert strategy.outputs == (padded_shard(2, 3),)
    costs = ClassCosts(graph, cls, tp=2, rows=1000, device=machine.nodes[0].device, tp_group=machine.group((0, 1)),
                       dtype="float32")
    big = replace(op, flops=1e15, backward_flops=2e15)
    found, whole = costs.op_time(big, strategy), ClassCosts(
        graph, cls, tp=1, rows=1000, device=machine.nodes[0].device, tp_group=None, dtype="float32").op_time(big)
    assert found.forward_s / whole.forward_s == pytest.approx(2 / 3, rel=1e-3)  # 2 of 3 steps, and 1 with padding
