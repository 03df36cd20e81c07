"""What a reshape does to factors, checked element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_programs import shard_of

from autopar.sharding.factors import OpFactors
from autopar.sharding.refine import refine
from autopar.sharding.state import R


@pytest.mark.parametrize(
    ("before", "after", "factors"),
    [
        ((4, 6), (24,), [4, 6]),
        ((4, 6), (4, 2, 3), [4, 2, 3]),
        ((4, 8, 72), (32, 72), [4, 8, 72]),
        ((4, 8, 24), (4, 8, 6, 4), [4, 8, 6, 4]),
        ((2, 1, 6), (12,), [2, 6]),
        ((6, 6, 4), (36, 2, 2), [6, 6, 2, 2]),
        ((5,), (5, 1), [5]),
    ],
)
def test_nested_shapes_share_every_factor(before: tuple[int, ...], after: tuple[int, ...], factors: list[int]) -> None:
    found = refine(before, after)
    assert list(found.sizes.values()) == factors
    assert not found.opaque


def test_strides_that_do_not_nest_share_the_outermost_part() -> None:
    found = refine((2, 6, 4), (2, 4, 6))
    assert [found.sizes[name] for name in found.sizes if name not in found.opaque] == [2, 2]
    assert sorted(found.sizes[name] for name in found.opaque) == [2, 3, 4, 6]
    assert found.before[1][0] == found.after[1][0]


def test_an_empty_tensor_shares_nothing() -> None:
    found = refine((0, 4), (2, 0))
    assert set(found.opaque) == set(found.sizes)


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=1, max_size=6))

    def grouped(order: list[int]) -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=3)))
        edges = [0, *cuts, len(order)]
        return tuple(math.prod(order[a:b]) for a, b in itertools.pairwise(edges))

    return grouped(primes), grouped(draw(st.permutations(primes)))


@given(_shapes())
def test_every_common_factor_cuts_both_shapes_alike(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = shapes
    found = refine(before, after)
    factors = OpFactors(
        sizes=found.sizes, operands=(found.before,), outputs=(found.after,), blocked=dict.fromkeys(found.opaque, "")
    )
    assert factors.problem([before], [after]) is None
    x = torch.arange(math.prod(before))
    for name, length in found.sizes.items():
        for size in (2, 3, 5):
            for inner in (o for o in range(1, length + 1) if length % (o * size) == 0):
                if factors.refusal((name, inner), size):
                    continue
                choice = factors.strategy((name, inner), (False,))
                assert R not in choice.inputs
                for rank in range(size):
                    one = shard_of(x.reshape(before), choice.inputs[0], rank, size)
                    two = shard_of(x.reshape(after), choice.outputs[0], rank, size)
                    assert torch.equal(one.flatten(), two.flatten())
                assert factors.split_for(found.before, choice.inputs[0]) == (name, inner)
                assert factors.split_for(found.after, choice.outputs[0]) == (name, inner)
