"""No strategy ever has an uneven shard: a factor that an axis does not divide is padded where its rule allows that.

Everywhere else it is refused, and the reason is kept.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_samples import SAMPLES, Pick
from shard_compare import Built, Sample, build, check, sample_strategies

from autopar.sharding.local_args import local_infos
from autopar.sharding.rules import op_factors, refusals, strategies
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import Strategy

# torch warns of deprecated ops that models still call.
pytestmark = pytest.mark.filterwarnings("ignore")


class OddPick(Pick):
    """Sizes of which hardly any divides by the axis."""

    sizes = (1, 3, 5, 7, 9, 10, 15)

    def size(self) -> int:
        return self.rng.choice(self.sizes)


def is_even(shape: tuple[int, ...], state: State, size: int) -> bool:
    if state.length:
        return shape[state.dim] == state.length and state.length % size > 0 and state.outer == 1
    return state.kind is not Kind.SHARDED or shape[state.dim] % (state.outer * size) == 0


def assert_even(built: Built, found: tuple[Strategy, ...], size: int) -> None:
    for strategy in found:
        names = (*built.op.operands, *built.op.outputs)
        for name, state in zip(names, (*strategy.inputs, *strategy.outputs), strict=True):
            assert not name or is_even(built.tensors[name].shape, state, size), (built.op.target, strategy)
        local_infos(built.op, strategy, built.tensors, size)  # every local shape exists


@settings(max_examples=200)
@given(st.integers(0, len(SAMPLES) - 1), st.integers(0, 999), st.integers(2, 9))
def test_shards_of_any_op_are_even_or_refused_with_a_reason(index: int, seed: int, size: int) -> None:
    _, maker, _ = SAMPLES[index]
    built = build(maker(OddPick(seed)))
    found = sample_strategies(built, size)
    assert_even(built, found, size)
    for strategy in found:
        if any(state.length for state in (*strategy.inputs, *strategy.outputs)):
            torch.manual_seed(size)
            check(built, strategy, size)
    factors = op_factors(built.op, built.tensors)
    assert factors is not None
    refused = {refusal.factor: refusal for refusal in refusals(built.op, built.tensors, size)}
    for name, length in factors.sizes.items():
        if length % size or name in factors.blocked:
            assert refused[name].reason and refused[name].size == length
        else:
            assert (name in refused) == (length == 0 or length // size < factors.least.get(name, 0))
    assert not refused.keys() & {strategy.factor for strategy in strategies(built.op, built.tensors, size)}


IDS = torch.zeros(6, dtype=torch.int64)


def _sample(target: str, *shapes: tuple[int, ...], rest: tuple[Any, ...] = ()) -> Sample:
    return Sample(target, (*(torch.zeros(shape, dtype=torch.float64) for shape in shapes), *rest))


@pytest.mark.parametrize(("drawn", "size", "refused"), [
    (_sample("aten.linear.default", (8, 100), (30, 100)), 4, {"n": "size 30 does not divide by 4"}),
    (_sample("aten.linear.default", (8, 100), (30, 100)), 8, {
        "n": "size 30 does not divide by 8", "k": "size 100 does not divide by 8"}),
    (_sample("aten.linear.default", (8, 100), (30, 100)), 2, {}),
    (_sample("aten.embedding.default", (50257, 4), rest=(IDS,)), 2, {"v": "size 50257 does not divide by 2"}),
    (_sample("aten.cross_entropy_loss.default", (6, 50257), rest=(IDS,)), 2, {"c": "size 50257 does not divide by 2"}),
    (_sample("aten.scaled_dot_product_attention.default", *[(2, 25, 4, 8)] * 3), 2, {
        "b1": "size 25 does not divide by 2"}),
    (_sample("aten.scaled_dot_product_attention.default", *[(2, 25, 4, 8)] * 3), 5, {}),
    (_sample("aten.view.default", (6, 200), rest=([6, 25, 8],)), 2, {"f1": "size 25 does not divide by 2"}),
])
def test_what_does_not_divide_is_named(drawn: Sample, size: int, refused: dict[str, str]) -> None:
    built = build(drawn)
    reasons = {item.factor: item.reason for item in refusals(built.op, built.tensors, size) if "divide" in item.reason}
    named = {name: reason for name, reason in reasons.items() if name not in ("b0", "q")}
    assert named == refused
    assert_even(built, sample_strategies(built, size), size)
