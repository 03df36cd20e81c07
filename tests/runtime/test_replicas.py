"""Gradients of whole copies are summed in buckets, while the last backward runs or after it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from autopar.runtime import replicas
from autopar.runtime.local import LocalPool
from autopar.runtime.replicas import Replicas


def test_buckets_run_from_the_last_parameter_and_hold_one_dtype() -> None:
    params = [nn.Parameter(torch.zeros(replicas.BUCKET_BYTES // 8)) for _ in range(5)]
    params.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    place = {id(param): index for index, param in enumerate(params)}
    one, other = object(), object()

    def found(group_of: dict[nn.Parameter, object]) -> list[list[int]]:
        return [[place[id(param)] for param in bucket] for bucket in replicas._buckets(group_of)]  # type: ignore[arg-type]

    assert found(dict.fromkeys(params, one)) == [[5], [4, 3], [2, 1], [0]]
    assert found({param: other if i == 3 else one for i, param in enumerate(params)}) == [[5], [4], [3], [2, 1], [0]]


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 1))


def sums(unused_last: bool) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Buckets that went during the backward, and all gradients, of a step that overlaps and of one that does not."""
    layers, unused = make_layers(), nn.Parameter(torch.ones(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "BUCKET_BYTES", 40)
        order = [*layers.parameters(), unused] if unused_last else [unused, *layers.parameters()]
        copies = Replicas(order, dist.group.WORLD)  # type: ignore[arg-type]
    found = []
    for overlaps in (True, False):
        layers.zero_grad(set_to_none=True)
        for last in (False, True):  # two micro-batches
            copies.overlaps = overlaps and last
            layers(torch.full((2, 4), dist.get_rank() + 1.0)).sum().backward()
        sent = copies._next
        copies.finish()
        assert unused.grad is None
        found.append((sent, {name: param.grad.clone() for name, param in layers.named_parameters()}))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("unused_last", [False, True])
def test_sums_over_the_copies(pool: LocalPool, unused_last: bool) -> None:
    """A parameter that no op uses holds its bucket, and those behind it, until the end."""
    results = pool.run(sums, unused_last, num_ranks=2)
    layers = make_layers()
    for rank in range(2):
        for _ in range(2):
            layers(torch.full((2, 4), rank + 1.0)).sum().backward()
    for (early, overlapped), (late, after) in results:
        assert (early, late) == ((0, 0) if unused_last else (2, 0))
        for name, param in layers.named_parameters():
            assert param.grad is not None
            torch.testing.assert_close(overlapped[name], param.grad)
            assert torch.equal(overlapped[name], after[name])


def released() -> bool:
    """Whether parameters go once nobody but their hooks holds what sums their gradients."""
    layers = make_layers()
    copies = Replicas(layers.parameters(), dist.group.WORLD)  # type: ignore[arg-type]
    layers(torch.ones(2, 4)).sum().backward()
    copies.finish()
    gone = weakref.ref(layers[0].weight)
    del layers, copies
    gc.collect()
    return gone() is None


@pytest.mark.processes
def test_hooks_do_not_keep_the_parameters(pool: LocalPool) -> None:
    assert pool.run(released, num_ranks=2) == [True, True]
