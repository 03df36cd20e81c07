"""Lower bounds of strategies on several axes are below whatever a choice with them costs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_intra_op_oracles import FAST, block_classes, costs_of
from toy_graphs import LINK, ClassBuilder

from autopar.cluster.cluster import Link
from autopar.graph.model_graph import BlockClass
from autopar.search.block_problem import Problem
from autopar.search.elimination import eliminate
from autopar.search.placement_grid import Grid
from autopar.search.relaxed import Relaxed
from autopar.sharding import route
from autopar.sharding.joint import JointOptions, Placement, joint_strategies
from autopar.sharding.state import RP, P, R, shard


def options_of(cls: BlockClass, num_axes: int) -> dict[str, JointOptions]:
    return {name: JointOptions.of(own, num_axes) for name, own in joint_strategies(cls, (2,) * num_axes).items()}


def relaxed_of(cls: BlockClass, options: dict[str, JointOptions], boundary: Placement, link: Link) -> Relaxed:
    return Relaxed(
        cls, options, boundary, costs_of(cls, len(boundary), link), parameter_weight=1.0,
        whole_params=(False,) * len(boundary),
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    block_classes(4), st.sampled_from([(R, R), (shard(1), R), (R, R, R), (shard(1), shard(1), R)]),
    st.sampled_from([LINK, FAST]), st.integers(0, 2**32 - 1), st.booleans(),
)
def test_no_choice_costs_less_than_its_bounds(
    cls: BlockClass, boundary: Placement, link: Link, seed: int, at_once: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if at_once:
            patch.setattr(route, "LEAST_SUMMED_AT_ONCE", 2)
        _no_choice_costs_less(cls, boundary, link, seed)


def _no_choice_costs_less(cls: BlockClass, boundary: Placement, link: Link, seed: int) -> None:
    options, chance = options_of(cls, len(boundary)), np.random.default_rng(seed)
    relaxed = relaxed_of(cls, options, boundary, link)
    rows = {name: int(chance.integers(len(own))) for name, own in options.items()}
    # The chosen strategy and the whole one, which its neighbours may need.
    some = {name: [own[rows[name]], own[0]] for name, own in options.items()}
    problem = Problem(cls, some, boundary, relaxed.costs)
    found = None if problem.impossible else eliminate(problem.graph)
    assume(found is not None)
    assert found is not None
    for _ in range(3):
        relaxed.sweep()
        assert relaxed.lower_bound <= found.cost * (1 + 1e-9)
        for at, op in enumerate(cls.ops):
            row = rows[op.name] if found.values[at] == 0 else 0
            assert relaxed.lower_bound + relaxed.slack(at)[row] <= found.cost * (1 + 1e-9), op.name


def test_what_costs_more_is_dropped_and_the_likeliest_is_the_best_of_a_chain() -> None:
    build = ClassBuilder("chain")
    x = build.input("x", (4, 8, 16))
    build.linear(build.gelu(build.linear(x, build.param("up", (48, 16)), "wide"), "active"),
                 build.param("down", (16, 48)), "y")
    cls = build.build("y")
    options = options_of(cls, 3)
    relaxed = relaxed_of(cls, options, (R, R, R), FAST)
    relaxed.sweep()
    rows = relaxed.likely()
    problem = Problem(
        cls, {op.name: [options[op.name][row]] for op, row in zip(cls.ops, rows, strict=True)}, (R, R, R),
        relaxed.costs,
    )
    best = eliminate(problem.graph)
    assert best is not None
    assert best.cost == pytest.approx(relaxed.lower_bound, rel=1e-9), "a chain has no gap"
    before = relaxed.count
    slacks = relaxed.drop(best.cost)
    assert relaxed.count < before
    assert [len(own) for own in slacks] == [len(own) for own in relaxed.rows] == [len(own) for own in relaxed.ids]
    assert all(row in own for row, own in zip(rows, relaxed.rows, strict=True)), "the optimum stays"



@pytest.mark.parametrize("least", [1, 1 << 20])
def test_a_way_between_placements_costs_no_more_than_the_conversion(
    monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Where sums over several axes are made at once, and where they are not."""
    monkeypatch.setattr(route, "LEAST_SUMMED_AT_ONCE", least)
    build = ClassBuilder("one")
    cls = build.build(build.linear(build.input("x", (4, 8, 16)), build.param("w", (16, 16)), "y"))
    costs, labels = costs_of(cls, 3, LINK), (R, RP, P, shard(0), shard(1), shard(2, 2))
    grid, places = Grid(costs, "y", (labels,) * 3, (), False, {}), list(product(labels, repeat=3))
    for src in places[::7]:
        start = np.full((1, grid.size), np.inf)
        start[0, grid.code(src)] = 0.0
        least = grid.spread(start, backwards=False)[0]
        for dst in places:
            exact = costs.conversion_time("y", src, dst)
            if exact is not None:
                assert least[grid.code(dst)] <= (exact.forward_s + exact.backward_s) * (1 + 1e-12), (src, dst)
