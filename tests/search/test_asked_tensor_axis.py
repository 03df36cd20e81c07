"""A tensor axis that a user asks for splits products, even where repeating them would be faster."""

from toy_graphs import cluster, mlp_chain

from autopar.search.planner import Degrees, plan_from_degrees
from autopar.search.shardings import ShardingChooser


def test_an_asked_axis_splits_what_the_search_would_repeat() -> None:
    graph, machine = mlp_chain(num_layers=2, hidden=64, inner=256, seq_len=32), cluster(1, 2)
    free = ShardingChooser(graph, machine, "bfloat16").choose(2, sequence_parallel=False)
    assert free is not None and not free.splits, "a tiny model is best repeated"
    plan = plan_from_degrees(graph, machine, Degrees(global_batch=8, tp=2))
    assert any(strategy.factor for choice in plan.shardings for _, strategy in choice.ops)
    assert any("as asked" in note for note in plan.notes)


def test_what_nothing_can_split_is_said() -> None:
    graph, machine = mlp_chain(num_layers=2, hidden=3, inner=3, seq_len=3), cluster(1, 2)
    plan = plan_from_degrees(graph, machine, Degrees(global_batch=8, tp=2))
    assert not any(strategy.factor for _, strategy in plan.sharding[graph.blocks[1].cls].ops)
    assert any("can split no product" in note for note in plan.notes)
