"""The search of a block against oracles: all assignments by brute force, HiGHS on real blocks, the simulator's sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import fewer, real_graph
from toy_graphs import LINK, NETWORK, ClassBuilder, device, empty_class

from autopar.cluster.cluster import GroupShape, Link
from autopar.graph.model_graph import Block, BlockClass, ModelGraph, Ref
from autopar.search.block_problem import Problem
from autopar.search.elimination import FactorGraph, eliminate
from autopar.search.explain import block_s
from autopar.search.intra_op import best_sharding, shard_class_jointly
from autopar.search.mathopt import solve
from autopar.sharding.joint import JointStrategy, Placement, joint_strategies
from autopar.sharding.state import R, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import ClassCosts, CostAxis

ROWS, LENGTH, HIDDEN = 4, 8, 16
MAX_ASSIGNMENTS = 400_000
FAST = Link(name="fast link", latency_s=1e-9, bandwidth_bytes_per_s=1e15)


def group(link: Link) -> GroupShape:
    return GroupShape(size=2, num_nodes=1, per_node=2, link=link, network=NETWORK)


@st.composite
def block_classes(draw: st.DrawFn, most_ops: int) -> BlockClass:
    """A random graph of linear, mul, add, gelu, view, softmax and sum over tensors (rows, length, features)."""
    build = ClassBuilder("random")
    found = [build.input("x", (ROWS, LENGTH, HIDDEN))]
    params: list[str] = []
    for number in range(draw(st.integers(1, most_ops))):
        x, out = draw(st.sampled_from(found)), f"t{number}"
        shape = build.tensors[x].shape
        peers = [name for name in found if build.tensors[name].shape == shape]
        kind = draw(st.sampled_from(["linear", "linear", "add", "mul", "gelu", "merge", "softmax", "sum"]))
        if kind == "linear":
            again = [name for name in params if build.tensors[name].shape[1] == shape[-1]]
            wide = draw(st.sampled_from([HIDDEN, 3 * HIDDEN, 5]))
            weight = draw(st.sampled_from(again)) if again and draw(st.booleans()) else (
                build.param(f"w{number}", (wide, shape[-1]))
            )
            params.append(weight)
            build.linear(x, weight, out)
        elif kind in ("add", "mul"):
            build.op(f"aten.{kind}.Tensor", (Ref(x), Ref(draw(st.sampled_from(peers)))), out, shape, saved=(x,))
        elif kind == "merge" and len(shape) == 3:
            merged = (shape[0] * shape[1], shape[2])
            build.op("aten.view.default", (Ref(x), merged), out, merged)
        elif kind == "softmax":
            build.op("aten.softmax.int", (Ref(x), -1), out, shape, saved=(out,))
        elif kind == "sum":
            dim = draw(st.integers(0, len(shape) - 1))
            kept = tuple(1 if i == dim else size for i, size in enumerate(shape))
            build.op("aten.sum.dim_IntList", (Ref(x), (dim,), True), out, kept)
        else:
            build.gelu(x, out)
        found.append(out)
    read = {name for op in build.ops for name in op.operands}
    return build.build(*(name for name in found[1:] if name not in read))


def graph_of(cls: BlockClass) -> ModelGraph:
    """A model of this block alone."""
    block = Block(name="layers.0", cls=cls.name, inputs=cls.inputs, params=cls.params, buffers=(), outputs=cls.outputs)
    return ModelGraph(
        name="random", rows=ROWS, rows_are_tagged=False, inputs=(), buffers=(), aliases=(),
        params=tuple(cls.tensor[name] for name in cls.params), classes=(cls, empty_class("shared")), blocks=(block,),
        shared=Block(name="shared", cls="shared", inputs=(), params=(), buffers=(), outputs=()), loss=cls.outputs[0],
    )


def costs_of(cls: BlockClass, num_axes: int, link: Link) -> ClassCosts:
    """On devices so slow that splitting pays where links are fast."""
    outer = (CostAxis(2, group(link)),) * (num_axes - 1)
    return ClassCosts(
        graph_of(cls), cls, tp=2, rows=ROWS, device=device(1e-4), tp_group=group(link), dtype="float32", outer=outer
    )


def brute_force(graph: FactorGraph) -> float:
    """The least sum of the tables over every assignment of all variables at once."""
    total = np.zeros(graph.sizes)
    for factor in graph.factors:
        order = sorted(range(len(factor.variables)), key=lambda i: factor.variables[i])
        shape = [1] * len(graph.sizes)
        for variable in factor.variables:
            shape[variable] = graph.sizes[variable]
        total += factor.table.transpose(order).reshape(shape)
    return float(total.min())


def priced(problem: Problem, found: Sequence[ClassSharding]) -> float:
    """What the simulator and the charges for stored parameters say of shardings."""
    costs, cls = problem.costs, problem.cls
    total = block_cost(
        costs.graph, cls, found, tp=costs.tp, rows=costs.rows, device=costs.device, tp_group=costs.tp_group,
        dtype=costs.dtype, outer=costs.outer,
    )
    stored = zip(cls.params, zip(*(own.params for own in found), strict=True), strict=True)
    return block_s(total) + math.fsum(problem.parameter_s(name, place) for name, place in stored)


def check_search(cls: BlockClass, boundary: Placement, link: Link, seed: int, weight: float) -> bool:
    """Search, brute force and simulator agree; whether the block can be split so at all."""
    costs, chance = costs_of(cls, len(boundary), link), np.random.default_rng(seed)
    strategies: Mapping[str, Sequence[JointStrategy]] = joint_strategies(cls, (2,) * len(boundary))
    if len(boundary) > 2:  # so many that tables of pairs alone take long
        strategies = fewer(strategies, 24, chance)
    problem = Problem(cls, strategies, boundary, costs, parameter_weight=weight)
    for most in (12, 8, 5, 4, 3, 2):
        if math.prod(problem.graph.sizes) <= MAX_ASSIGNMENTS:
            break
        strategies = fewer(strategies, most, chance)
        problem = Problem(cls, strategies, boundary, costs, parameter_weight=weight)
    assume(math.prod(problem.graph.sizes) <= MAX_ASSIGNMENTS)
    best = math.inf if problem.impossible else brute_force(problem.graph)
    found = best_sharding(cls, strategies, boundary, costs, parameter_weight=weight)
    if math.isinf(best):
        assert found is None
        return False
    assert found is not None
    assert [own.strategy.keys() for own in found.shardings] == [strategies.keys()] * len(boundary)
    assert found.cost_s == pytest.approx(best, rel=1e-9)
    assert found.gap <= 1e-9, "the optimum is proved"
    assert priced(problem, found.shardings) == pytest.approx(best, rel=1e-6)
    return True


@settings(max_examples=400)
@given(
    block_classes(5), st.sampled_from([(R,), (shard(1),)]), st.sampled_from([LINK, FAST]), st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
)
def test_one_axis_equals_brute_force(
    cls: BlockClass, boundary: Placement, link: Link, seed: int, weight: float
) -> None:
    check_search(cls, boundary, link, seed, weight)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    block_classes(4), st.sampled_from([(R, R), (shard(1), R), (shard(1), shard(1))]), st.sampled_from([LINK, FAST]),
    st.integers(0, 99), st.sampled_from([0.0, 1.0]),
)
def test_two_axes_equal_brute_force(
    cls: BlockClass, boundary: Placement, link: Link, seed: int, weight: float
) -> None:
    check_search(cls, boundary, link, seed, weight)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    block_classes(3),
    st.sampled_from([(R,) * 3, (shard(1), R, R), (shard(1), shard(1), R), (R,) * 4, (shard(1), shard(1), R, R)]),
    st.sampled_from([LINK, FAST]), st.integers(0, 99), st.sampled_from([0.0, 1.0]),
)
def test_three_and_four_axes_equal_brute_force(
    cls: BlockClass, boundary: Placement, link: Link, seed: int, weight: float
) -> None:
    check_search(cls, boundary, link, seed, weight)


@pytest.mark.parametrize("link", [LINK, FAST], ids=lambda link: link.name)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_three_axes_equal_highs_on_real_blocks(name: str, link: Link) -> None:
    """Three of each op's strategies, for HiGHS takes minutes with all of them."""
    graph = real_graph(name)
    cls = max(graph.classes, key=lambda own: len(own.ops))
    outer = (CostAxis(2, group(link)),) * 2
    costs = ClassCosts(
        graph, cls, tp=2, rows=graph.rows, device=device(1e-4), tp_group=group(link), dtype="float32", outer=outer
    )
    strategies = fewer(joint_strategies(cls, (2, 2, 2)), 3, np.random.default_rng(0))
    found = best_sharding(cls, strategies, (R,) * 3, costs)
    oracle = solve(Problem(cls, strategies, (R,) * 3, costs).graph)
    assert found is not None
    assert oracle is not None
    assert found.cost_s == pytest.approx(oracle.cost, rel=1e-9)
    assert found.gap <= 1e-9


def test_the_random_blocks_are_split_where_links_are_fast_and_whole_where_they_are_slow() -> None:
    """Both kinds of optimum occur, so that the comparison above is one."""
    build = ClassBuilder("random")
    x = build.input("x", (ROWS, LENGTH, HIDDEN))
    build.linear(x, build.param("w", (3 * HIDDEN, HIDDEN)), "y")
    cls = build.build("y")
    split = {}
    for link in (FAST, Link(name="slow link", latency_s=1.0, bandwidth_bytes_per_s=1.0)):
        found = shard_class_jointly(cls, joint_strategies(cls, (2,)), (R,), costs_of(cls, 1, link))
        assert found is not None
        split[link.name] = bool(found[0].ops[0][1].factor)
    assert split == {"fast link": True, "slow link": False}


@pytest.mark.parametrize("link", [LINK, FAST], ids=lambda link: link.name)
@pytest.mark.parametrize("name", ["llama", "gpt2", "convolutions"])
def test_elimination_equals_highs_on_real_blocks(name: str, link: Link) -> None:
    graph = real_graph(name)
    cls = max(graph.classes, key=lambda own: len(own.ops))
    costs = ClassCosts(
        graph, cls, tp=2, rows=graph.rows, device=device(1e-4), tp_group=group(link), dtype="float32"
    )
    boundary = (shard(1) if name == "llama" else R,)
    problem = Problem(cls, joint_strategies(cls, (2,)), boundary, costs)
    assert not problem.impossible
    exact = eliminate(problem.graph)
    found = solve(problem.graph)
    assert exact is not None
    assert found is not None
    assert found.cost == pytest.approx(exact.cost, rel=1e-9)
    assert priced(problem, problem.shardings(exact.values)) == pytest.approx(exact.cost, rel=1e-6)
