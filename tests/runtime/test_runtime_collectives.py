"""Conversions between states: the value and the gradient that each leaves, on two and on four ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.collectives import Axis, all_reduce, converter, take_shard
from autopar.runtime.local import LocalPool
from autopar.sharding.reshard import conversion
from autopar.sharding.route import SUMS
from autopar.sharding.state import RP, Kind, P, R, State, padded_shard, shard

pytestmark = pytest.mark.processes

SHAPE = (8, 16, 24, 5)
STATES = (R, RP, P, shard(0), shard(1), shard(2), shard(1, 2), shard(2, 3), padded_shard(3, 5))


def world_axis() -> Axis:
    """The whole job as an axis."""
    group = dist.group.WORLD
    assert group is not None
    return Axis(group_name=group.group_name, size=dist.get_world_size(), rank=dist.get_rank())


def represent(axis: Axis, whole: Tensor, state: State, *, is_gradient: bool, seed: int) -> Tensor:
    """One rank's tensor in a state. What is partial differs by rank and sums to the whole."""
    if state.kind is Kind.SHARDED:
        return take_shard(axis, whole, state.dim, state.outer, state.length)
    if state.kind is (Kind.REPLICATED_PARTIAL_GRAD if is_gradient else Kind.PARTIAL):
        parts = torch.randn(axis.size, *whole.shape, dtype=whole.dtype, generator=torch.Generator().manual_seed(seed))
        parts[-1] = whole - parts[:-1].sum(dim=0)
        return parts[axis.rank].clone()
    return whole.clone()


def wrong_conversions(dtype: torch.dtype) -> list[str]:
    """What is wrong with the conversions on this rank."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(SHAPE, dtype=dtype, generator=generator)
    gradient = torch.randn(SHAPE, dtype=dtype, generator=generator)
    wrong = []
    for src, dst in itertools.product(STATES, STATES):
        rule = conversion(src, dst, True)
        if rule is None or src == dst:
            continue
        convert = converter(src, dst, axis, differentiable=True)
        assert convert is not None
        start = represent(axis, value, src, is_gradient=False, seed=1).requires_grad_()
        out = convert(start)
        if not torch.allclose(out, represent(axis, value, dst, is_gradient=False, seed=1), rtol=1e-12):
            wrong.append(f"value of {src} -> {dst}")
        out.backward(represent(axis, gradient, dst, is_gradient=True, seed=2))
        found = start.grad
        assert found is not None
        if src == RP:
            found = all_reduce(axis, found)
        if not torch.allclose(found, represent(axis, gradient, R if src == RP else src, is_gradient=True, seed=3)):
            wrong.append(f"gradient of {src} -> {dst}")
        plain = converter(src, dst, axis, differentiable=False)
        same = start.detach() if plain is None else plain(start.detach())
        if not torch.allclose(same, out.detach()):
            wrong.append(f"without gradient {src} -> {dst}")
    return wrong


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float64), (4, torch.float64), (2, torch.complex128)])
def test_values_and_gradients_of_all_conversions(pool: LocalPool, size: int, dtype: torch.dtype) -> None:
    assert pool.run(wrong_conversions, dtype, num_ranks=size) == [[]] * size


def wrong_sums(dtype: torch.dtype) -> list[str]:
    """What is wrong with sums over both axes of two by two ranks, of tensors that the inner axis cuts and does not."""
    rank, rows, columns = dist.get_rank(), [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    outer, inner = (
        Axis(group_name=next(group for own, group in zip(groups, made, strict=True) if rank in own).group_name, size=2,
             rank=rank % 2 if groups is rows else rank // 2)
        for groups in (columns, rows) for made in [[dist.new_group(own) for own in groups]]
    )
    wrong = []
    for shape in ((4, 6), (3, 5), ()):
        parts = torch.randn(4, *shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
        for src, dst in SUMS:
            convert = converter(src, dst, outer, [inner], differentiable=True)
            assert convert is not None
            start = parts[rank].clone().requires_grad_()
            out = convert(start)
            out.backward(parts[rank])
            assert start.grad is not None
            expected = parts.sum(0) if src == P else parts[rank]
            if not torch.allclose(out, expected, rtol=1e-12):
                wrong.append(f"value of {src} -> {dst}, {shape}")
            if not torch.allclose(start.grad, parts.sum(0) if dst == RP else parts[rank], rtol=1e-12):
                wrong.append(f"gradient of {src} -> {dst}, {shape}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_sums_over_two_axes_at_once(pool: LocalPool, dtype: torch.dtype) -> None:
    assert pool.run(wrong_sums, dtype, num_ranks=4) == [[]] * 4


COMPILED = ((R, shard(0)), (RP, shard(0)), (R, shard(1, 2)), (shard(1), shard(1, 2)), (P, shard(0)), (shard(0), RP))


def wrong_compiled_gradients() -> list[str]:
    """The conversions whose gradient is another one where they are compiled."""
    axis, wrong = world_axis(), []
    for src, dst in COMPILED:
        convert = converter(src, dst, axis, differentiable=True)
        assert convert is not None
        found = []
        for compiled in (False, True):
            start = represent(axis, torch.ones(SHAPE), src, is_gradient=False, seed=1).requires_grad_()
            used = torch.compile(lambda x, convert=convert: convert(x * 2), backend="aot_eager", fullgraph=True)
            out = used(start) if compiled else convert(start * 2)
            out.backward(torch.arange(1.0, 1 + out.numel()).view(out.shape))
            found.append(start.grad)
        if not torch.equal(found[0], found[1]):
            wrong.append(f"{src} -> {dst}")
    return wrong


def test_compiled_conversions_have_the_same_gradients(pool: LocalPool) -> None:
    """A forward that ends in an op with nothing to do lost its gradient in torch 2.11."""
    assert pool.run(wrong_compiled_gradients, num_ranks=2) == [[]] * 2
