"""Which ops to measure: those of a model as one rank runs them, and a general grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import Cluster
from autopar.cluster.measured import OpTensor
from autopar.cost_models.compute import LocalTensor
from autopar.cost_models.measured import Key, exact_key, local_tensor, settings_of
from autopar.cost_models.op_kinds import OpKind, base_name, op_kind
from autopar.graph.interpret import run_op
from autopar.graph.model_graph import DTYPE_BYTES, BlockClass, ModelGraph, Op, Ref
from autopar.graph.rows import at_rows
from autopar.plan.plan import Plan
from autopar.search.shardings import ShardingChooser
from autopar.search.shardings import at_rows as shardings_at_rows
from autopar.sharding.joint import JointStrategy, local_joint_op
from autopar.sharding.rewrites import rewritten
from autopar.simulate.class_costs import RUNS_AS_IT_IS, ClassCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A tensor to make for a case. `order`: its dims from the outermost in memory; `repeated`: those of stride 0."""

    tensor: OpTensor
    order: tuple[int, ...]
    repeated: tuple[int, ...] = ()
    is_param: bool = False
    below: int = 2  # integers are drawn from [0, below)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """One op to measure. `op` is the call as a rank makes it; `target` and `settings` are the captured op's."""

    op: Op
    target: str
    settings: str
    dtype: str
    operands: tuple[Operand, ...]
    outputs: tuple[OpTensor, ...]
    is_copy: bool = False

    @property
    def key(self) -> Key:
        """Equal for cases whose times are one."""
        operands = [local_tensor(item.tensor) for item in self.operands]
        outputs = [local_tensor(item) for item in self.outputs]
        return exact_key(self.target, self.settings, self.dtype, operands, outputs, self.is_copy)


def model_cases(
    graph: ModelGraph, cluster: Cluster, dtype: str, *, rows: Sequence[int], tensor_axes: Sequence[int]
) -> tuple[OpCase, ...]:
    """The distinct ops of a model with tagged rows, for micro-batches of these sizes, whole and on these tensor axes.

    The shardings are those that the planner finds for `cluster`, with and without sequence parallelism.
    """
    found: dict[Key, OpCase] = {}
    for count in rows:
        true = at_rows(graph, count)
        chooser = ShardingChooser(graph, cluster, dtype, rows=count)
        for cls in chooser.classes:
            _add(found, true, true.block_class[cls.name], cluster, dtype, 1, {})
        for tp in tensor_axes:
            for sequence_parallel in (False, True):
                choice = chooser.choose(tp, sequence_parallel=sequence_parallel, split_products=True)
                for sharding in shardings_at_rows(choice.shardings, graph, count) if choice is not None else ():
                    strategies = {name: (strategy,) for name, strategy in sharding.ops}
                    _add(found, true, true.block_class[sharding.cls], cluster, dtype, tp, strategies)
    return tuple(found.values())


def plan_cases(graph: ModelGraph, plan: Plan, cluster: Cluster) -> tuple[OpCase, ...]:
    """The distinct ops of a plan as its ranks run them; `graph` has tagged rows, or the plan's.

    An axis beside the tensor axis is left out: its plans' ops are told between sizes.
    """
    true = at_rows(rewritten(graph, plan.rewrites), plan.micro_batch)
    found: dict[Key, OpCase] = {}
    for stage in plan.stages:
        for name in dict.fromkeys(block.cls for block in true.blocks[stage.first : stage.last]):
            shardings = plan.class_shardings(name, stage) if stage.mesh.cp == 1 else ()
            strategies = {op: (strategy,) for sharding in shardings for op, strategy in sharding.ops}
            size = stage.mesh.tp if shardings else 1
            _add(found, true, true.block_class[name], cluster, plan.dtype, size, strategies)
    return tuple(found.values())


def _add(
    found: dict[Key, OpCase], graph: ModelGraph, cls: BlockClass, cluster: Cluster, dtype: str, tp: int,
    strategies: Mapping[str, JointStrategy],
) -> None:
    costs = ClassCosts(graph, cls, tp=tp, rows=graph.rows, device=cluster.device(0), tp_group=None, dtype=dtype)
    layouts = _layouts(cls)
    for op in cls.ops:
        strategy = strategies.get(op.name)
        if op_kind(op.target) is OpKind.CREATION or any(own.lowering not in RUNS_AS_IT_IS for own in strategy or ()):
            continue
        placed_in, placed_out = costs.placements(op, strategy)
        given = [costs.local(name, place) for name, place in zip(op.operands, placed_in, strict=True)]
        results = [
            (name, costs.local(name, place)) for name, place in zip(op.outputs, placed_out, strict=False) if name
        ]
        if not given or any(not dim.is_integer() for item in given for dim in item.shape):
            continue
        case = OpCase(
            op=local_joint_op(op, strategy, cls.tensor, [tp]) if strategy else op,
            target=op.target, settings=settings_of(op), dtype=dtype, is_copy=op.name in costs.copies,
            operands=tuple(
                replace(
                    layouts[name], tensor=_op_tensor(cls, name, item), is_param=costs.root(name) in cls.params,
                    below=_below(op, given),
                ) for name, item in zip(op.operands, given, strict=True)
            ),
            outputs=tuple(_op_tensor(cls, name, item) for name, item in results),
        )
        found.setdefault(case.key, case)


def _op_tensor(cls: BlockClass, name: str, local: LocalTensor) -> OpTensor:
    info = cls.tensor[name]
    return OpTensor(shape=tuple(int(dim) for dim in local.shape), dtype=info.dtype, requires_grad=info.requires_grad)


def _below(op: Op, operands: Sequence[LocalTensor]) -> int:
    """How large the integers of an op may be: rows of a table, classes of a loss."""
    shape = operands[0].shape
    name = base_name(op.target)
    if name == "embedding" or name.startswith("index"):
        return max(1, int(shape[0]))
    if "loss" in name:
        return max(1, int(shape[1] if len(shape) > 1 else shape[0]))
    return 2


def _layouts(cls: BlockClass) -> dict[str, Operand]:
    """How each tensor of a class lies in memory, from a run on fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        values: dict[str, Tensor] = {
            name: torch.empty(cls.tensor[name].shape, dtype=getattr(torch, cls.tensor[name].dtype))
            for name in (*cls.inputs, *cls.params, *cls.buffers)
        }
        for op in cls.ops:
            run_op(op, values, torch.device("cpu"))
    return {
        name: Operand(
            tensor=OpTensor(shape=tuple(value.shape), dtype=cls.tensor[name].dtype),
            order=_order(value),
            repeated=tuple(dim for dim in range(value.dim()) if value.stride(dim) == 0 and value.shape[dim] > 1),
        ) for name, value in values.items()
    }


def _order(value: Tensor) -> tuple[int, ...]:
    """The dims from the outermost in memory."""
    strides: Sequence[int] = value.stride()
    return tuple(sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim)))


# -- the general grid

ROWS = (128, 512, 2048)
WIDTHS = (256, 768, 2048)
ATTENTION = tuple(  # (batch, heads, sequence, head dim)
    (max(1, rows // 256), heads, min(rows, 256), dim) for rows in ROWS for heads, dim in ((4, 64), (16, 64), (8, 128))
)
ROWS_CUDA = (512, 2048, 8192)
WIDTHS_CUDA = (1024, 4096, 8192)
ATTENTION_CUDA = tuple(
    (16384 // length, heads, length, dim)
    for length in (512, 1024, 2048, 4096, 8192, 16384) for heads, dim in ((16, 64), (32, 128))
)


def grid_cases(dtype: str, *, device_type: str) -> tuple[OpCase, ...]:
    """Matrix products, attention, norms, elementwise ops, embedding, cross-entropy and convolution over sizes."""
    found: dict[Key, OpCase] = {}
    sizes = (ROWS_CUDA, WIDTHS_CUDA, ATTENTION_CUDA) if device_type == "cuda" else (ROWS, WIDTHS, ATTENTION)
    for case in _grid(dtype, *sizes):
        found.setdefault(case.key, case)
    return tuple(found.values())


def _grid(
    dtype: str, all_rows: Sequence[int], widths: Sequence[int], attention: Sequence[tuple[int, ...]]
) -> Iterator[OpCase]:
    for rows in all_rows:
        for width in widths:
            x, one = (rows, width), (width,)
            for columns in widths:
                out = (rows, columns)
                yield _case("linear.default", dtype, [x, (columns, width)], [out], params=(1,))
                yield _case("linear.default", dtype, [x, (columns, width), (columns,)], [out], params=(1, 2))
            yield _case("add.Tensor", dtype, [x, x], [x])
            yield _case("mul.Tensor", dtype, [x, x], [x])
            yield _case("silu.default", dtype, [x], [x])
            yield _case("gelu.default", dtype, [x], [x])
            yield _case("layer_norm.default", dtype, [x, one, one], [x], params=(1, 2), after=(one,), at=1)
            yield _case("rms_norm.default", dtype, [x, one], [x], params=(1,), after=(one,), at=1)
            yield _case("softmax.int", dtype, [x], [x], after=(-1,))
            table = (4 * width, width)
            yield _case("embedding.default", dtype, [table, (rows,)], [x], params=(0,), below=4 * width)
            yield _case("cross_entropy_loss.default", dtype, [x, (rows,)], [()], below=width)
    for shape in attention:
        yield _case("scaled_dot_product_attention.default", dtype, [shape] * 3, [shape], after=(None, 0.0, True))
    for size in (16, 32, 64):
        for channels in (16, 64):
            image = (4, channels, size, size)
            yield _case(
                "conv2d.default", dtype, [image, (channels, channels, 3, 3), (channels,)], [image], params=(1, 2),
                after=((1, 1), (1, 1)),
            )


def _case(
    name: str, dtype: str, operands: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], *,
    params: tuple[int, ...] = (), after: tuple[object, ...] = (), at: int | None = None, below: int = 0,
) -> OpCase:
    """A case of an ATen op whose tensors come first, or the first of them before the constants `after` (`at` of them).

    The last operand holds integers where `below` bounds them.
    """
    names = [f"x{i}" for i in range(len(operands))]
    refs = tuple(map(Ref, names))
    cut = len(refs) if at is None else at
    op = Op(name="op", target=f"aten.{name}", args=(*refs[:cut], *after, *refs[cut:]), outputs=("y",))  # type: ignore[arg-type]
    given = []
    for i, shape in enumerate(operands):
        is_index = below > 0 and i == len(operands) - 1
        tensor = OpTensor(shape=shape, dtype="int64" if is_index else dtype, requires_grad=not is_index)
        given.append(Operand(tensor=tensor, order=tuple(range(len(shape))), is_param=i in params, below=below or 2))
    return OpCase(
        op=op, target=op.target, settings=settings_of(op), dtype=dtype, operands=tuple(given),
        outputs=tuple(OpTensor(shape=shape, dtype=dtype, requires_grad=True) for shape in outputs),
    )


def size_bytes(case: OpCase) -> float:
    """Bytes of all tensors of a case."""
    tensors = [*(item.tensor for item in case.operands), *case.outputs]
    return float(sum(math.prod(item.shape) * DTYPE_BYTES[item.dtype] for item in tensors))
