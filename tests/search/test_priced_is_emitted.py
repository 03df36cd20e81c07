"""The collectives that a block is charged with are those that its program issues: kind, bytes, axis and direction.

One process emulates a rank: a listener stands in for the collectives and gives results of the right shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import fewer, real_graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_graphs import NETWORK, device

from autopar.cluster.cluster import GroupShape, Link
from autopar.graph.model_graph import BlockClass, ModelGraph, TensorInfo
from autopar.runtime.collectives import Axis
from autopar.runtime.lower import lower_class
from autopar.search.intra_op import shard_class_jointly
from autopar.sharding import route
from autopar.sharding.joint import JointStrategy, Placement, joint_strategies, placed_shape
from autopar.sharding.reshard import Collective
from autopar.sharding.state import R, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import block_charges, block_cost
from autopar.simulate.class_costs import ClassCosts, CostAxis

Issued = Counter[tuple[int, str, int, bool]]  # (axis, collective, bytes of the whole group, whether in the backward)
FAST = Link(name="fast link", latency_s=1e-9, bandwidth_bytes_per_s=1e15)
_EXCHANGES = (  # all-to-alls of uneven parts
    Collective.NEIGHBOUR_EXCHANGE, Collective.MIRRORED_EXCHANGE, Collective.RING_SHIFT,
)


class _Listener(TorchDispatchMode):
    """Answers collectives as if every rank had this rank's values, and keeps what was asked for."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        super().__init__()
        self.place = {axis.group_name: (at, axis.size) for at, axis in enumerate(axes)}
        self.heard: Issued = Counter()
        self.is_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "_c10d_functional":
            return func(*args, **(kwargs or {}))
        x = args[0]
        if name == "wait_tensor":
            return x
        at, size = self.place[args[-1]]
        local = x.numel() * x.element_size()
        if name == "all_reduce":
            return self._keep(at, Collective.ALL_REDUCE, local, x.clone())
        if name == "all_gather_into_tensor":
            return self._keep(at, Collective.ALL_GATHER, local * size, torch.cat([x] * size))
        if name == "reduce_scatter_tensor":
            return self._keep(at, Collective.REDUCE_SCATTER, local, x[: x.shape[0] // size].clone())
        assert name == "all_to_all_single", name
        received, sent = args[1], args[2]
        if sent == [1] * size:
            return self._keep(at, Collective.ALL_TO_ALL, local * size, x.clone())
        return self._keep(at, "exchange", local, x.new_ones((sum(received), *x.shape[1:])))

    def _keep(self, at: int, kind: str, size_bytes: int, result: Tensor) -> Tensor:
        self.heard[at, str(kind), size_bytes, self.is_backward] += 1
        return result


def issued(cls: BlockClass, shardings: Sequence[ClassSharding], sizes: Sequence[int], rank: int) -> Issued:
    """What one rank's program of the class issues, forward and backward."""
    axes = [Axis(group_name=f"group {at}", size=size, rank=rank) for at, size in enumerate(sizes)]
    program = lower_class(cls, shardings, axes, torch.device("cpu"))
    given = []
    for word in ("params", "buffers", "inputs"):
        for name, place in zip(getattr(cls, word), zip(*(getattr(own, word) for own in shardings), strict=True),
                               strict=True):
            given.append(_local(cls.tensor[name], place, sizes))
    listener = _Listener(axes)
    with listener:
        results = [out for out in program.code(*given) if out.requires_grad]
        listener.is_backward = True
        torch.autograd.backward(results, [torch.ones_like(out) for out in results])
    return listener.heard


def _local(info: TensorInfo, place: Placement, sizes: Sequence[int]) -> Tensor:
    dtype = getattr(torch, info.dtype)
    shape = placed_shape(info.shape, place, sizes)
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype).requires_grad_(info.requires_grad)
    return torch.ones(shape, dtype=dtype)


def priced(costs: ClassCosts, shardings: Sequence[ClassSharding]) -> Issued:
    """What the cost model charges for, and that it is all that the block's cost counts."""
    found: Issued = Counter()
    seconds = [0.0, 0.0]
    for item in block_charges(costs, shardings):
        kind = "exchange" if item.collective in _EXCHANGES else str(item.collective)
        found[item.axis, kind, round(item.size_bytes), item.is_backward] += 1
        seconds[item.is_backward] += item.time_s
    cost = block_cost(
        costs.graph, costs.cls, shardings, tp=costs.tp, rows=costs.rows, device=costs.device,
        tp_group=costs.tp_group, dtype=costs.dtype, outer=costs.outer,
    )
    assert seconds == pytest.approx([cost.forward_tp_comm_s, cost.backward_tp_comm_s])
    return found


def costs_of(graph: ModelGraph, cls: BlockClass, sizes: Sequence[int]) -> ClassCosts:
    """On devices so slow and links so fast that splitting these tiny blocks pays."""
    groups = [GroupShape(size=size, num_nodes=1, per_node=size, link=FAST, network=NETWORK) for size in sizes]
    outer = tuple(CostAxis(size, group) for size, group in zip(sizes[:-1], groups, strict=False))
    return ClassCosts(graph, cls, tp=sizes[-1], rows=graph.rows, device=device(1e-4), tp_group=groups[-1],
                      dtype="float32", outer=outer)


def compared(name: str, sizes: Sequence[int], boundary: Placement, rank: int, seeds: int) -> Issued:
    """All that was issued, each class's lists compared: of the best sharding, and of the best of a few strategies."""
    graph = real_graph(name)
    total: Issued = Counter()
    for cls in {block.cls: graph.block_class[block.cls] for block in graph.blocks}.values():
        costs = costs_of(graph, cls, sizes)
        strategies: Mapping[str, Sequence[JointStrategy]] = joint_strategies(cls, sizes)
        for seed in range(1 + seeds):
            some = fewer(strategies, 2, np.random.default_rng(seed)) if seed else strategies
            found = shard_class_jointly(cls, some, boundary, costs)
            if found is None:
                assert seed, f"{cls.name} has no sharding with {boundary} between blocks"
                continue
            heard = issued(cls, found, sizes, rank)
            assert heard == priced(costs, found), f"{cls.name}, seed {seed}"
            total += heard
    return total


@pytest.mark.parametrize("boundary", [R, shard(1)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_language_models_issue_what_is_priced(name: str, boundary: Any) -> None:
    total = compared(name, (2,), (boundary,), 0, 8)
    kinds = {(kind, is_backward) for _, kind, _, is_backward in total}
    assert {("all_gather", False), ("all_gather", True), ("all_reduce", False)} <= kinds


def test_convolutions_issue_what_is_priced() -> None:
    """On the middle one of three ranks, which has a neighbour on each side."""
    total = compared("convolutions", (3,), (R,), 1, 12)
    assert {"exchange", "all_gather"} <= {kind for _, kind, _, _ in total}


@pytest.mark.parametrize("boundary", [R, shard(1)], ids=str)
def test_two_axes_issue_what_is_priced(boundary: Any) -> None:
    total = compared("llama", (2, 2), (shard(1), boundary), 0, 6)
    assert {at for at, _, _, _ in total} == {0, 1}


def test_sums_over_two_axes_issue_what_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    few = compared("gpt2", (2, 2), (R, R), 0, 3)
    monkeypatch.setattr(route, "LEAST_SUMMED_AT_ONCE", 4)
    total = compared("gpt2", (2, 2), (R, R), 0, 3)
    kinds = [sum(n for (_, kind, _, _), n in found.items() if kind == "reduce_scatter") for found in (few, total)]
    assert kinds[1] > kinds[0]
