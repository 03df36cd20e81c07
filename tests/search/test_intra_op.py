import itertools

import pytest
from toy_graphs import LINK, NETWORK, device, mlp_chain

from autopar.cluster.cluster import GroupShape
from autopar.graph.model_graph import ModelGraph
from autopar.plan.sharding_checks import sharding_problems
from autopar.search.block_problem import Problem
from autopar.search.intra_op import shard_class
from autopar.search.mathopt import solve
from autopar.sharding.joint import joint_strategies
from autopar.sharding.propagate import class_strategies
from autopar.sharding.state import R, State, shard
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import ClassCosts

GROUP = GroupShape(size=2, num_nodes=1, per_node=2, link=LINK, network=NETWORK)


def costs_of(graph: ModelGraph, name: str, rows: float = 8) -> ClassCosts:
    return ClassCosts(graph, graph.block_class[name], tp=2, rows=rows, device=device(), tp_group=GROUP, dtype="float32")


@pytest.mark.parametrize("boundary", [R, shard(1)], ids=str)
@pytest.mark.parametrize("name", ["prologue", "layer", "epilogue"])
def test_optimum_equals_brute_force_and_integer_programming(name: str, boundary: State) -> None:
    graph = mlp_chain(hidden=256, inner=1024, seq_len=64)
    cls = graph.block_class[name]
    problem = Problem(cls, joint_strategies(cls, (2,)), (boundary,), costs_of(graph, name))
    choice = shard_class(cls, class_strategies(cls, 2), boundary, costs_of(graph, name))
    assert choice is not None
    assert list(sharding_problems(choice, cls, 2)) == []
    best = min(problem.graph.cost(v) for v in itertools.product(*(range(n) for n in problem.graph.sizes)))
    found = solve(problem.graph)
    assert found is not None
    assert found.cost == pytest.approx(best, rel=1e-9)
    total = block_cost(graph, cls, choice, tp=2, rows=8, device=device(), tp_group=GROUP, dtype="float32")
    time_s = (total.forward_compute_s + total.backward_compute_s + total.forward_tp_comm_s
              + total.backward_tp_comm_s)
    stored = [problem.parameter_s(name, (state,)) for name, state in zip(cls.params, choice.params, strict=True)]
    assert time_s + sum(stored) == pytest.approx(best, rel=1e-6), "the search and the simulator price a sharding alike"


def test_column_and_row_splits_are_found() -> None:
    graph = mlp_chain(hidden=2048, inner=8192, seq_len=512)
    cls = graph.block_class["layer"]
    choice = shard_class(cls, class_strategies(cls, 2), R, costs_of(graph, "layer", rows=16))
    assert choice is not None
    assert dict(zip(cls.params, choice.params, strict=True)) == {"up": shard(0), "down": shard(1)}


def test_a_sequence_that_does_not_divide_has_no_sequence_parallel_sharding() -> None:
    graph = mlp_chain(seq_len=33)
    cls = graph.block_class["layer"]
    assert shard_class(cls, class_strategies(cls, 2), shard(1), costs_of(graph, "layer")) is None
    assert shard_class(cls, class_strategies(cls, 2), R, costs_of(graph, "layer")) is not None
