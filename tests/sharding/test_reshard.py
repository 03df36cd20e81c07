"""The conversion table, run on tensors: the parts after it stand for the same value and the same gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from rank_programs import shard_of
from shard_compare import addends, unshard

from autopar.sharding.reshard import Collective, LocalAction, conversion, divides, local_shape, split_shape
from autopar.sharding.state import RP, Kind, P, R, State, shard

STATES = [R, RP, P, shard(0), shard(1), shard(1, 3)]
T = torch.Tensor


def _apply(parts: list[T], how: Collective | None, local: LocalAction, src: State, dst: State) -> list[T]:
    """What the ranks hold after the collective and the local action; `src` and `dst` are the layouts it sees."""
    size = len(parts)
    if how in (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER):
        parts = [sum(parts[1:], parts[0])] * size
    elif how in (Collective.ALL_GATHER, Collective.ALL_TO_ALL):
        parts = [unshard(parts, src)] * size
    if how in (Collective.REDUCE_SCATTER, Collective.ALL_TO_ALL) or local is LocalAction.SLICE:
        return [shard_of(part, dst, rank, size) for rank, part in enumerate(parts)]
    if local is LocalAction.PAD_ZEROS:
        zeros = torch.zeros_like(parts[0])
        return [unshard([part if i == rank else zeros for i in range(size)], src) for rank, part in enumerate(parts)]
    if local is LocalAction.DIVIDE:
        return [part / size for part in parts]
    return parts


def _value_parts(value: T, state: State, size: int) -> list[T]:
    return addends(value, size) if state == P else [shard_of(value, state, rank, size) for rank in range(size)]


def _gradient_parts(grad: T, state: State, size: int) -> list[T]:
    return addends(grad, size) if state == RP else [shard_of(grad, state, rank, size) for rank in range(size)]


def _value(parts: list[T], state: State) -> T:
    if state.kind is Kind.SHARDED:
        return unshard(parts, state)
    if state == P:
        return sum(parts[1:], parts[0])
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def _gradient(parts: list[T], state: State) -> T:
    if state == RP:
        return sum(parts[1:], parts[0])
    return _value(parts, R if state == P else state)


@pytest.mark.parametrize(("src", "dst"), list(itertools.product(STATES, STATES)), ids=lambda state: str(state))
@pytest.mark.parametrize("size", [2, 3])
def test_a_conversion_keeps_value_and_gradient(src: State, dst: State, size: int) -> None:
    torch.manual_seed(0)
    value, grad = torch.randn(6, 18, dtype=torch.float64), torch.randn(6, 18, dtype=torch.float64)
    found = conversion(src, dst, True)
    if found is None:
        assert dst == P
        assert src != P
        return
    after = _apply(_value_parts(value, src, size), found.forward, found.forward_local, src, dst)
    torch.testing.assert_close(_value(after, dst), value)
    back = _apply(_gradient_parts(grad, dst, size), found.backward, found.backward_local, dst, src)
    torch.testing.assert_close(_gradient(back, src), grad)


def test_megatron_and_sequence_parallel_pairs() -> None:
    copy, reduce = conversion(R, RP, True), conversion(P, R, True)
    assert copy is not None
    assert reduce is not None
    assert (copy.forward, copy.backward) == (None, Collective.ALL_REDUCE)
    assert (reduce.forward, reduce.backward) == (Collective.ALL_REDUCE, None)
    gather, scatter = conversion(shard(1), RP, True), conversion(P, shard(1), True)
    assert gather is not None
    assert scatter is not None
    assert (gather.forward, gather.backward) == (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    assert (scatter.forward, scatter.backward) == (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)


@pytest.mark.parametrize(("src", "dst"), [(R, RP), (RP, R), (R, shard(0)), (RP, shard(1))])
def test_without_gradient_replicated_is_free(src: State, dst: State) -> None:
    found = conversion(src, dst, False)
    assert found is not None
    assert found.is_free


def test_without_gradient_there_is_no_backward() -> None:
    for src, dst in itertools.product(STATES, STATES):
        found = conversion(src, dst, False)
        if found:
            assert found.backward is None
            assert found.backward_local is LocalAction.NONE


def test_local_shapes() -> None:
    assert local_shape((4, 6), shard(1, 3), 2) == (4, 3)
    assert local_shape((4, 6), RP, 2) == (4, 6)
    assert split_shape((4, 12), shard(1, 3), 2) == ((4, 3, 2, 2), 2)
    assert not divides((4, 6), shard(1, 2), 2)
    assert not divides((4, 6), shard(2), 2)
    with pytest.raises(AssertionError, match="does not divide"):
        local_shape((4, 5), shard(1), 2)


def test_a_state_is_written_and_read() -> None:
    for state in STATES:
        assert State.parse(str(state)) == state
    with pytest.raises(ValueError, match="not a sharding state"):
        State.parse("S(x)")


def test_outer_blocks_follow_the_rows() -> None:
    assert shard(0, 1009).at_rows(1009, 4) == shard(0, 4)
    assert shard(0, 3 * 1009).at_rows(1009, 1) == shard(0, 3)
    assert shard(0, 3).at_rows(1009, 4) == shard(0, 3)
    assert R.at_rows(1009, 4) == R
