"""The collectives that lowerings are charged with are those that their programs issue, to the byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_runtime_collectives import world_axis
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.cost_models.compute import LocalTensor
from autopar.graph.experts import EXPERTS_OP, gate_text
from autopar.graph.model_graph import Arg, BlockClass, Op, Ref, TensorInfo
from autopar.runtime.local import LocalPool
from autopar.runtime.lower import lower_class
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules import strategies
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.lowering_costs import Exchange, lowering_cost

pytestmark = pytest.mark.processes

SIZE = 3
_RANKS_PART = {"all_reduce": 1, "all_gather_into_tensor": SIZE, "neighbour_exchange": 1, "all_to_all": SIZE,
               "mirrored_exchange": 1, "ring_shift": 1}
_NAME = {"all_gather_into_tensor": "all_gather"}
_TO_ALL = {Lowering.EXPERT_EXCHANGE: "all_to_all", Lowering.RING_ATTENTION: "ring_shift"}
_GATE = gate_text(torch.relu, 4, torch.float32)

# (lowering, target, shapes of the operands, what follows them, dim of the first operand that is cut, without gradient)
Case = tuple[Lowering, str, dict[str, tuple[int, ...]], tuple[Arg, ...], int, tuple[str, ...]]
CASES: dict[str, Case] = {
    "convolution": (
        Lowering.SPATIAL_HALO, "aten.conv2d.default", {"x": (2, 4, 12, 6), "w": (4, 4, 3, 3)},
        (None, (1, 1), (1, 1)), 2, (),
    ),
    "pooling": (
        Lowering.SPATIAL_HALO, "aten.max_pool2d.default", {"x": (2, 4, 12, 6)}, ((3, 3), (2, 2), (1, 1)), 2, (),
    ),
    "image": (
        Lowering.SPATIAL_HALO, "aten.conv2d.default", {"x": (2, 4, 12, 6), "w": (4, 4, 3, 3)},
        (None, (1, 1), (1, 1)), 2, ("x",),
    ),
    "batch norm of parts": (
        Lowering.SYNC_BATCH_NORM, "aten.batch_norm.default",
        {"x": (6, 6, 4), "w": (6,), "b": (6,), "mean": (6,), "var": (6,)}, (True, 0.1, 1e-5, False), 0,
        ("mean", "var"),
    ),
    "batch norm of channels": (
        Lowering.CHANNEL_STATISTICS, "aten.batch_norm.default",
        {"x": (6, 6, 4), "w": (6,), "b": (6,), "mean": (6,), "var": (6,)}, (True, 0.1, 1e-5, False), 1,
        ("mean", "var"),
    ),
    "classes": (
        Lowering.VOCAB_PARALLEL_CROSS_ENTROPY, "aten.cross_entropy_loss.default", {"x": (5, 6), "ids": (5,)}, (), 1,
        ("ids",),
    ),
    "rows": (
        Lowering.SUM_OVER_COUNT, "aten.cross_entropy_loss.default", {"x": (6, 5), "ids": (6,)}, (), 0, ("ids",),
    ),
    "vocabulary": (
        Lowering.VOCAB_PARALLEL_EMBEDDING, "aten.embedding.default", {"x": (6, 5), "ids": (4,)}, (), 0, ("ids",),
    ),
    "experts": (
        Lowering.EXPERT_EXCHANGE, EXPERTS_OP,
        {"x": (18, 5), "ids": (18, 1), "weights": (18, 1), "up": (6, 4, 5), "down": (6, 5, 4)},
        (None, None, False, _GATE), 0, ("ids",),
    ),
    "bags": (
        Lowering.VOCAB_PARALLEL_EMBEDDING_BAG, "aten.embedding_bag.default", {"x": (6, 5), "ids": (4,), "starts": (1,)},
        (), 0, ("ids", "starts"),
    ),
    "queries": (
        Lowering.CAUSAL_CONTEXT, "aten.scaled_dot_product_attention.default",
        {"x": (2, 2, 12, 4), "k": (2, 2, 12, 4), "v": (2, 2, 12, 6)}, (None, 0.0, True), 2, (),
    ),
    "ring": (
        Lowering.RING_ATTENTION, "aten.scaled_dot_product_attention.default",
        {"x": (2, 2, 12, 4), "k": (2, 2, 12, 4), "v": (2, 2, 12, 6)}, (None, 0.0, False), 2, (),
    ),
    "causal ring": (
        Lowering.RING_ATTENTION, "aten.scaled_dot_product_attention.default",
        {"x": (2, 2, 12, 4), "k": (2, 2, 12, 4), "v": (2, 2, 12, 6)}, (None, 0.0, True), 2, (),
    ),
}  # fmt: skip
_INTEGERS = ("ids", "starts")


class _Listening(TorchDispatchMode):
    """Keeps the collectives that are issued: their names and the bytes that this rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("_c10d_functional::") and "wait" not in name:
            word = name.partition("::")[2]
            if word == "all_to_all_single" and args[2] == [0, 1, 0]:
                word = "mirrored_exchange"  # the middle rank's mirror image is itself
            self.heard.append((word, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


def class_of(case: Case) -> tuple[BlockClass, Strategy]:
    lowering, target, shapes, rest, dim, frozen = case
    whole = [torch.zeros(shape, dtype=torch.int64 if n in _INTEGERS else torch.float32) for n, shape in shapes.items()]
    made = _run(target, whole, rest)
    tensors = tuple(
        TensorInfo(name=n, shape=s, dtype="int64" if n in _INTEGERS else "float32", requires_grad=n not in frozen)
        for n, s in {**shapes, "y": tuple(made.shape)}.items()
    )
    outputs = ("y", "", "", "") if "bag" in target else ("y",)
    op = Op(name="op", target=target, args=(*(Ref(name) for name in shapes), *rest), outputs=outputs)
    cls = BlockClass(
        name="c", inputs=tuple(shapes), params=(), buffers=(), outputs=("y",), ops=(op,), tensors=tensors
    )
    chosen = next(
        s for s in strategies(op, cls.tensor, SIZE)
        if s.lowering == lowering and s.inputs[0].kind is Kind.SHARDED and s.inputs[0].dim == dim
    )  # fmt: skip
    return cls, chosen


def _run(target: str, operands: list[Tensor], rest: tuple[Arg, ...]) -> Tensor:
    namespace, name, overload = target.split(".")
    following = [list(arg) if isinstance(arg, tuple) else arg for arg in rest]
    result = getattr(getattr(getattr(torch.ops, namespace), name), overload)(*operands, *following)
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def issued(case: Case) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a rank issues forward and backward."""
    axis = world_axis()
    cls, strategy = class_of(case)
    sharding = ClassSharding(
        cls="c", inputs=strategy.inputs, params=(), buffers=(), outputs=strategy.outputs[:1], ops=(("op", strategy),)
    )
    program = lower_class(cls, sharding, axis, torch.device("cpu"))
    given = [_local(cls.tensor[name], state) for name, state in zip(cls.inputs, strategy.inputs, strict=True)]
    with _Listening() as forward:
        (out,) = program.code(*given)
    with _Listening() as backward:
        out.sum().backward()
    return forward.heard, backward.heard


def _local(info: TensorInfo, state: State) -> Tensor:
    cut = state.dim if state.kind is Kind.SHARDED else None
    shape = [size // SIZE if dim == cut else size for dim, size in enumerate(info.shape)]
    if info.dtype == "int64":
        return torch.arange(math.prod(shape)).remainder(6).view(shape)  # all experts are chosen equally often
    return torch.rand(shape).requires_grad_(info.requires_grad)


def _priced(exchanges: tuple[Exchange, ...]) -> list[tuple[str, float]]:
    return [(str(item.collective), item.size_bytes) for item in exchanges]


@pytest.mark.parametrize("name", CASES)
def test_priced_collectives_are_those_issued(pool: LocalPool, name: str) -> None:
    cls, strategy = class_of(CASES[name])
    whole = {
        info.name: LocalTensor(tuple(map(float, info.shape)), 8 if info.dtype == "int64" else 4, info.requires_grad)
        for info in cls.tensors
    }
    cost = lowering_cost(cls, cls.ops[0], strategy, SIZE, whole.__getitem__)
    middle = pool.run(issued, CASES[name], num_ranks=SIZE)[1]  # the rank with a neighbour on each side
    to_all = _TO_ALL.get(CASES[name][0], "neighbour_exchange")
    for priced, issued_here in zip((cost.forward, cost.backward), middle, strict=True):
        heard = [(to_all if word == "all_to_all_single" else word, size) for word, size in issued_here]
        assert _priced(priced) == [(_NAME.get(word, word), size * _RANKS_PART[word]) for word, size in heard]


def test_some_lowerings_communicate_both_ways_and_some_not_at_all() -> None:
    """The cases above are of both kinds."""
    counts = {}
    for name, case in CASES.items():
        cls, strategy = class_of(case)
        whole = {i.name: LocalTensor(tuple(map(float, i.shape)), 4, i.requires_grad) for i in cls.tensors}
        cost = lowering_cost(cls, cls.ops[0], strategy, SIZE, whole.__getitem__)
        counts[name] = (len(cost.forward), len(cost.backward))
    assert counts == {
        "convolution": (1, 1), "pooling": (1, 1), "image": (1, 0), "batch norm of parts": (1, 1),
        "batch norm of channels": (1, 0), "classes": (2, 0), "rows": (1, 0), "vocabulary": (0, 0), "bags": (0, 0),
        "experts": (3, 2),
        "queries": (2, 2), "ring": (2, 5), "causal ring": (5, 8),
    }  # fmt: skip
