"""The way between two placements is legal at every step, and takes what moves least first."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.sharding.joint import Placement
from autopar.sharding.reshard import Collective, conversion
from autopar.sharding.route import conversions, steps, summed_at_once
from autopar.sharding.state import RP, Kind, P, R, State, shard

STATES = (R, RP, P, shard(0), shard(1), shard(1, 3), shard(2))
PLACES = st.tuples(*[st.sampled_from(STATES)] * 4)
GATHER, SCATTER, REDUCE = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE


def after(before: Placement, axes: tuple[int, ...], state: State) -> Placement:
    return tuple(state if axis in axes else own for axis, own in enumerate(before))


@given(PLACES, PLACES, st.booleans(), st.booleans())
def test_every_step_is_a_conversion_that_no_axis_after_it_is_in_the_way_of(
    src: Placement, dst: Placement, differentiable: bool, is_large: bool
) -> None:
    path = steps(src, dst, differentiable, is_large)
    if not differentiable:
        src, dst = (tuple(R if state == RP else state for state in place) for place in (src, dst))
    if any(own != want and conversion(own, want, differentiable) is None for own, want in zip(src, dst, strict=True)):
        assert path is None
        return
    assert path is not None
    places = [src, *(after(step.before, step.axes, step.dst) for step in path)]
    assert places[-1] == dst
    assert all(step.before == place for step, place in zip(path, places, strict=False))
    for step in path:
        assert conversion(step.src, step.dst, differentiable) is not None
        assert {step.before[axis] for axis in step.axes} == {step.src}
        assert step.axes == (step.axis,) or Kind.SHARDED not in (step.src.kind, step.dst.kind)
        dims = {state.dim for state in (step.src, step.dst) if state.kind is Kind.SHARDED}
        held = {own.dim for own in step.before[step.axis + 1 :] if own.kind is Kind.SHARDED}
        assert not dims & held or len(step.axes) > 1
    kept = [axis for axis in range(4) if src[axis] == dst[axis] and src[axis].kind is not Kind.SHARDED]
    assert all(place[axis] == src[axis] for place in places for axis in kept), "only shards are given up for others"
    assert all(one != other for one, other in pairwise(places))


def test_a_shard_goes_straight_to_another_dim() -> None:
    path = steps((shard(2), shard(2), shard(2)), (shard(2), RP, shard(1)), True)
    assert path is not None
    assert [(step.axis, step.dst) for step in path] == [(2, shard(1)), (1, RP)]


def test_a_sum_comes_before_what_makes_the_tensor_larger() -> None:
    path = steps((P, shard(2), shard(2), shard(1)), (RP, RP, RP, R), True)
    assert path is not None
    assert [(step.axis, step.dst) for step in path] == [(0, RP), (2, RP), (1, RP), (3, R)]


@pytest.mark.parametrize(("src", "dst", "forward", "backward"), [
    (P, R, True, False), (R, RP, False, True), (P, RP, True, True),
])
def test_a_large_tensor_is_summed_over_several_axes_at_once(
    src: State, dst: State, forward: bool, backward: bool
) -> None:
    """Over the last axis in parts, over the first in parts of parts: together, not one whole sum after another."""
    found = conversions((src, shard(0), src, src), (dst, shard(0), dst, dst), True, (4, 2, 2, 5), True)
    assert found is not None
    assert [(axis, pytest.approx(share)) for axis, share, _ in found] == [
        (3, 1 / 2), (2, 1 / 10), (0, 1 / 20), (2, 1 / 10), (3, 1 / 2),
    ]
    down, nothing = [SCATTER, SCATTER, REDUCE, GATHER, GATHER], [None] * 5
    assert [step.forward for _, _, step in found] == (down if forward else nothing)
    assert [step.backward for _, _, step in found] == (down[::-1] if backward else nothing)
    one_by_one = conversions((src, shard(0), src, src), (dst, shard(0), dst, dst), True, (4, 2, 2, 5))
    assert one_by_one is not None
    assert [(axis, share) for axis, share, _ in one_by_one] == [(0, 1 / 2), (2, 1 / 2), (3, 1 / 2)]


def test_what_is_large() -> None:
    assert not summed_at_once(1)
    assert summed_at_once(8192 * 4096)
