"""On one axis the sharding of every block of the zoo is proved the best: what the simulator says of it is the bound."""

import math
from dataclasses import replace

import pytest
from all_entries import ENTRIES
from entry import ROWS, Entry
from harness import DTYPE, captured
from local_machines import slow_cluster

from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.search.block_problem import Problem
from autopar.search.explain import block_s
from autopar.search.intra_op import Proved, best_sharding
from autopar.search.shardings import slowest_device, tp_group
from autopar.sharding.joint import joint_strategies
from autopar.sharding.state import R
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import ClassCosts


def gap(graph: ModelGraph, cls: BlockClass) -> float:
    """How far the simulator's time and the charges for stored parameters lie above what no sharding can beat."""
    machine = slow_cluster(2)
    # On a CPU: elsewhere the simulator adds what the host needs to issue ops where that is longer than the block.
    processor = replace(slowest_device(machine), name="CPU-slow")
    rows = ROWS if graph.rows_are_tagged else graph.rows
    costs = ClassCosts(graph, cls, tp=2, rows=rows, device=processor, tp_group=tp_group(machine, 2),
                       dtype=DTYPE)
    strategies = joint_strategies(cls, (2,))
    found = best_sharding(cls, strategies, (R,), costs)
    assert isinstance(found, Proved), f"{cls.name} has no sharding"
    total = block_cost(graph, cls, found.shardings, tp=2, rows=rows, device=costs.device, tp_group=costs.tp_group,
                       dtype=DTYPE)
    problem = Problem(cls, {name: own[:1] for name, own in strategies.items()}, (R,), costs)
    stored = [
        problem.parameter_s(name, (state,)) for name, state in zip(cls.params, found.shardings[0].params, strict=True)
    ]
    upper = block_s(total) + math.fsum(stored)
    return (upper - found.lower_bound_s) / found.lower_bound_s if found.lower_bound_s else upper


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_no_gap_on_one_axis(entry: Entry) -> None:
    graph = captured(entry).graph
    for name in dict.fromkeys(block.cls for block in graph.blocks):
        assert gap(graph, graph.block_class[name]) == pytest.approx(0.0, abs=1e-6), name
