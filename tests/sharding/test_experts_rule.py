"""What may be split of a mixture's experts, by one axis and by two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experts_samples import halves, mixing, pairs
from sampling import Pick
from shard_compare import Built, Sample, build, check

from autopar.graph.experts import EXPERTS_OP, gate_text
from autopar.graph.model_graph import BlockClass
from autopar.sharding.joint import joint_strategies
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules import refusals, strategies
from autopar.sharding.state import RP, P, R, shard


def experts(*, num_experts: int = 4, gate: object = halves, biased: bool = False) -> Built:
    pick, width = Pick(0), 6 if gate is mixing else 12
    biases = (pick.x(num_experts, width), pick.x(num_experts, 3)) if biased else (None, None)
    text = gate_text(gate, width, torch.float64)  # type: ignore[arg-type]
    given = (pick.x(8, 3), pick.ids(num_experts, 8, 2), pick.x(8, 2), pick.x(num_experts, width, 3))
    return build(Sample(EXPERTS_OP, (*given, pick.x(num_experts, 3, 6), *biases, False, text)))


def test_tokens_experts_inner_columns_and_tokens_with_experts_split() -> None:
    built = experts()
    found = {s.factor: s for s in strategies(built.op, built.tensors, 2) if s.factor}
    assert {name: (s.inputs, s.outputs, s.lowering) for name, s in found.items()} == {
        "t": ((shard(0), shard(0), shard(0), RP, RP), (shard(0),), ""),
        "e": ((RP, R, RP, shard(0), shard(0)), (P,), Lowering.OWN_EXPERTS),
        "f": ((RP, R, RP, shard(1, 2), shard(2)), (P,), ""),  # each gate with its up
        "t+e": ((shard(0),) * 5, (shard(0),), Lowering.EXPERT_EXCHANGE),
    }


def test_gates_and_ups_by_turns_split_in_place_and_the_bias_counts_once() -> None:
    built = experts(gate=pairs, biased=True)
    (inner,) = (s for s in strategies(built.op, built.tensors, 3) if s.factor == "f")
    assert inner.inputs == (RP, R, RP, shard(1), shard(2), shard(1), RP)
    assert inner.lowering == Lowering.BIAS_ON_FIRST_RANK


@pytest.mark.parametrize(("built", "factor", "words"), [
    (experts(num_experts=5), "e", "size 5 does not divide by 2"),
    (experts(num_experts=5), "t+e", "size 5 does not divide by 2"),
    (experts(gate=mixing), "f", "the gate mixes inner columns"),
    (experts(), "d", "summed before the gate"),
], ids=["experts", "exchange", "gate", "hidden"])
def test_a_refusal_keeps_its_reason(built: Built, factor: str, words: str) -> None:
    assert all(s.factor != factor for s in strategies(built.op, built.tensors, 2))
    named = "e" if factor == "t+e" else factor
    assert any(words in refusal.reason and refusal.factor == named for refusal in refusals(built.op, built.tensors, 2))


@pytest.mark.parametrize("changes", [
    {"lowering": ""}, {"lowering": Lowering.OWN_EXPERTS}, {"outputs": (P,)},
])
def test_the_comparison_finds_a_wrong_exchange(changes: dict[str, object]) -> None:
    built = experts()
    (exchange,) = (s for s in strategies(built.op, built.tensors, 2) if s.factor == "t+e")
    check(built, exchange, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        check(built, replace(exchange, **changes), 2)  # type: ignore[arg-type]


def test_beside_an_exchange_a_second_axis_splits_tokens_or_inner_columns_but_no_experts() -> None:
    built = experts(biased=True)
    cls = BlockClass(
        name="c", inputs=tuple(built.op.operands), params=(), buffers=(), outputs=tuple(built.op.outputs),
        ops=(built.op,), tensors=tuple(built.tensors.values()),
    )
    found = {tuple(s.factor for s in choice) for choice in joint_strategies(cls, (2, 2))[built.op.name]}
    beside = {b for a, b in found if a == "t+e"} | {a for a, b in found if b == "t+e"}
    assert beside == {"", "t", "f"}
    assert ("e", "e") not in found
