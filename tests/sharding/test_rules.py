"""Every rule is proved: each strategy of each sample, run on shards, equals the whole op, forward and backward."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from op_samples import SAMPLES, Maker, Pick, draws
from shard_compare import Sample, build, check, check_jointly, sample_joint_strategies, sample_strategies

from autopar.sharding.factors import OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules import creation, indexing, refusals, strategies
from autopar.sharding.rules.registry import find_rule, registered_targets
from autopar.sharding.state import RP, Kind, P, R, shard
from autopar.sharding.strategy import Strategy

# Ops that draw at random or leave their values open; dropout stands for them.
_NOT_SAMPLED = {"bernoulli", "rand_like", "randn_like", "randint_like", "rrelu", "empty_like"}


@pytest.mark.parametrize(
    ("target", "maker", "number"), SAMPLES, ids=[f"{i}-{target}" for i, (target, _, _) in enumerate(SAMPLES)]
)
@pytest.mark.filterwarnings("ignore")  # torch warns of deprecated ops that models still call
def test_shards_put_together_equal_the_whole(target: str, maker: Maker, number: int) -> None:
    for drawn in draws(maker, number):
        built = build(drawn)
        for size in (2, 3):
            for strategy in sample_strategies(built, size):
                torch.manual_seed(size)
                check(built, strategy, size)


@pytest.mark.parametrize(
    ("target", "maker", "number"), SAMPLES, ids=[f"{i}-{target}" for i, (target, _, _) in enumerate(SAMPLES)]
)
@pytest.mark.filterwarnings("ignore")
def test_shards_of_two_axes_put_together_equal_the_whole(target: str, maker: Maker, number: int) -> None:
    """A few joint strategies of each sample, those before all that split twice."""
    chance = random.Random(target)
    for sizes, drawn in zip(itertools.cycle([(2, 2), (2, 3), (3, 2)]), draws(maker, max(3, number))):
        built = build(drawn)
        found = sample_joint_strategies(built, sizes)
        twice = [choice for choice in found if all(own.factor for own in choice)]
        for choice in (*chance.sample(twice, min(2, len(twice))), chance.choice(found)):
            torch.manual_seed(0)
            check_jointly(built, choice, sizes)


def _linear(*, rows: int = 4, bias: bool = True) -> Sample:
    pick = Pick(0)
    return Sample("aten.linear.default", (pick.x(rows, 6), pick.x(12, 6), *((pick.x(12),) if bias else ())))


@pytest.mark.parametrize(
    "wrong",
    [
        Strategy(factor="n", inputs=(R, shard(0), shard(0)), outputs=(shard(1),)),  # the input's gradient is partial
        Strategy(factor="k", inputs=(shard(1), shard(1), RP), outputs=(P,)),  # the bias would be added on every rank
        Strategy(factor="k", inputs=(shard(1), shard(1), R), outputs=(P,), lowering=Lowering.BIAS_ON_FIRST_RANK),
        Strategy(factor="b0", inputs=(shard(0), R, RP), outputs=(shard(0),)),
        Strategy(factor="", inputs=(RP, RP, R), outputs=(RP,)),
        Strategy(factor="", inputs=(P, RP, RP), outputs=(P,)),  # linear in the input, but the bias is added twice
    ],
)
def test_the_comparison_finds_a_wrong_strategy(wrong: Strategy) -> None:
    with pytest.raises(AssertionError):
        check(build(_linear()), wrong, 2)


def test_the_first_strategies_split_nothing() -> None:
    built = build(Sample("aten.add.Tensor", (Pick(0).x(4, 6), Pick(1).x(6))))
    found = strategies(built.op, built.tensors, 2)
    assert [(s.inputs, s.outputs) for s in found[:3]] == [((R, R), (R,)), ((RP, RP), (RP,)), ((P, P), (P,))]
    assert [(s.factor, s.inputs, s.outputs) for s in found[3:]] == [
        ("i0", (shard(0), RP), (shard(0),)),
        ("i1", (shard(1), shard(0)), (shard(1),)),
    ]


def test_an_op_without_gradient_has_no_partial_gradient() -> None:
    built = build(Sample("aten.add.Tensor", (Pick(0).ids(5, 4, 6), 1)))
    assert [s.inputs for s in strategies(built.op, built.tensors, 2)] == [(R,), (shard(0),), (shard(1),)]


@pytest.mark.parametrize(
    ("target", "args", "partial"),
    [
        ("aten.mul.Tensor", (Pick(0).x(4), 2.0), True),
        ("aten.add.Tensor", (Pick(0).x(4), 2.0), False),
        ("aten.relu.default", (Pick(0).x(4),), False),
        ("aten.masked_fill.Scalar", (Pick(0).x(4), Pick(0).ids(2, 4).bool(), 0), True),
        ("aten.masked_fill.Scalar", (Pick(0).x(4), Pick(0).ids(2, 4).bool(), -1e4), False),
        ("aten.div.Tensor", (2.0 * Pick(0).x(4), Pick(1).x(4)), True),
        ("aten.transpose.int", (Pick(0).x(4, 6), 0, 1), True),
    ],
)
def test_a_partial_value_passes_linear_ops_alone(target: str, args: tuple[object, ...], partial: bool) -> None:
    built = build(Sample(target, args))
    assert any(P in s.inputs for s in strategies(built.op, built.tensors, 2)) is partial


def test_megatron_pairs_follow_from_linear() -> None:
    built = build(_linear())
    by_factor = {s.factor: s for s in strategies(built.op, built.tensors, 2) if s.factor}
    assert by_factor["n"] == Strategy(factor="n", inputs=(RP, shard(0), shard(0)), outputs=(shard(1),))
    assert by_factor["k"] == Strategy(
        factor="k", inputs=(shard(1), shard(1), RP), outputs=(P,), lowering="bias_on_first_rank"
    )
    assert by_factor["b0"].outputs == (shard(0),)


def test_grouped_queries_split_by_key_head_or_inside_a_group() -> None:
    pick = Pick(0)
    q, kv = pick.x(2, 12, 4, 2), [pick.x(2, 4, 4, 2) for _ in range(2)]
    built = build(Sample("aten.scaled_dot_product_attention.default", (q, *kv), {"enable_gqa": True}))
    by_factor = {s.factor: s.inputs for s in strategies(built.op, built.tensors, 2)}
    assert by_factor["g"] == (shard(1),) * 3
    assert "r" not in by_factor  # 3 queries a key do not divide by 2
    by_factor = {s.factor: s.inputs for s in strategies(built.op, built.tensors, 3)}
    assert by_factor["r"] == (shard(1, 4), RP, RP)
    assert "g" not in by_factor


def test_queries_under_a_causal_mask_split_with_whole_keys() -> None:
    pick = Pick(0)
    given = (pick.x(2, 4, 6, 2), pick.x(2, 4, 6, 2), pick.x(2, 4, 6, 2))
    built = build(Sample("aten.scaled_dot_product_attention.default", given, {"is_causal": True}))
    found = {s.factor: s for s in strategies(built.op, built.tensors, 3)}["q"]
    assert (found.inputs, found.outputs) == ((shard(2), RP, RP), (shard(2),))
    assert found.lowering == Lowering.CAUSAL_CONTEXT
    given = (given[0], *(pick.x(2, 4, 3, 2) for _ in range(2)))
    built = build(Sample("aten.scaled_dot_product_attention.default", given, {"is_causal": True}))
    reasons = {refusal.factor: refusal.reason for refusal in refusals(built.op, built.tensors, 3)}
    assert "differ in number" in reasons["q"]


def test_random_ops_draw_apart_on_shards_alone() -> None:
    built = build(Sample("aten.dropout.default", (Pick(0).x(4, 6), 0.1, True)))
    found = strategies(built.op, built.tensors, 2)
    assert {s.lowering for s in found if s.inputs[0].kind is Kind.SHARDED} == {"axis_random"}
    assert {s.lowering for s in found if s.inputs[0].kind is not Kind.SHARDED} == {""}
    pick = Pick(0)
    attention = Sample("aten.scaled_dot_product_attention.default", tuple(pick.x(2, 4, 4, 2) for _ in range(3)))
    quiet, noisy = build(attention), build(replace(attention, args=(*attention.args, None, 0.1)))
    assert {s.lowering for s in strategies(quiet.op, quiet.tensors, 2)} == {"", Lowering.RING_ATTENTION}
    assert {s.lowering for s in strategies(noisy.op, noisy.tensors, 2) if s.factor} == {"axis_random"}


@pytest.mark.parametrize(
    ("drawn", "factor", "words"),
    [
        (_linear(rows=5), "b0", "size 5 does not divide by 2"),
        (Sample("aten.softmax.int", (Pick(0).x(4, 6), -1)), "i1", "softmax"),
        (Sample("aten.conv2d.default", (Pick(0).x(2, 2, 4, 4), Pick(0).x(4, 2, 3, 3))), "x0", "neighbours"),
        (Sample("aten.layer_norm.default", (Pick(0).x(4, 6), [6])), "c0", "mean"),
        (Sample("aten.view.default", (Pick(0).x(6, 4), [4, 6])), "a0", "mixes"),
        (Sample("aten.embedding.default", (Pick(0).x(7, 4), Pick(0).ids(7, 3))), "v", "size 7 does not divide by 2"),
    ],
)
def test_a_refusal_keeps_its_reason(drawn: Sample, factor: str, words: str) -> None:
    built = build(drawn)
    reasons = {refusal.factor: refusal.reason for refusal in refusals(built.op, built.tensors, 2)}
    assert words in reasons[factor]
    assert all(s.factor != factor for s in strategies(built.op, built.tensors, 2))


@pytest.mark.filterwarnings("ignore:The CPU|Causal:UserWarning")
def test_a_training_batch_norm_takes_the_statistics_of_the_whole_batch() -> None:
    pick = Pick(0)
    given = (pick.x(4, 6), None, None, pick.x(6), pick.positive(6))
    training, evaluating = (
        build(Sample("aten.batch_norm.default", (*given, mode, 0.1, 1e-5, False), frozen=(1, 2)))
        for mode in (True, False)
    )
    lowerings = {s.factor: s.lowering for s in strategies(training.op, training.tensors, 2)}
    assert (lowerings["n"], lowerings["c"]) == (Lowering.SYNC_BATCH_NORM, Lowering.CHANNEL_STATISTICS)
    assert {s.lowering for s in strategies(evaluating.op, evaluating.tensors, 2)} == {""}
    assert "n" in {s.factor for s in strategies(evaluating.op, evaluating.tensors, 2)}
    alone = replace(next(s for s in strategies(training.op, training.tensors, 2) if s.factor == "n"), lowering="")
    with pytest.raises(AssertionError):
        check(training, alone, 2)


def test_every_rule_has_a_sample() -> None:
    sampled = {target for target, _, _ in SAMPLES} | {target.rpartition(".")[0] for target, _, _ in SAMPLES}
    for name in registered_targets():
        packet = name.split(".")[1]
        out_of_place = name if packet.endswith("__") else name.removesuffix("_")
        found = find_rule(name)
        assert found is not None
        runs_whole = found[0] in (creation.creation, indexing.whole_only)
        exists = hasattr(torch.ops.aten, packet)
        assert (
            not exists
            or runs_whole
            or packet.rstrip("_") in _NOT_SAMPLED
            or not sampled.isdisjoint({name, out_of_place})
        ), name


def test_a_rule_that_contradicts_the_shapes_is_found() -> None:
    factors = OpFactors(sizes={"a": 4}, operands=((("a",),),), outputs=(((),),))
    assert "in no output" in (factors.problem([(4,)], [(1,)]) or "")
    assert "the rule says [4]" in (factors.problem([(5,)], [(1,)]) or "")
