"""A graph that was captured with tagged rows, at a true number of rows.

Capture tags the batch with a prime that divides no size of the model, so every size and literal that is a multiple of
it depends on the rows, and is in proportion to them.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.errors import InputError
from autopar.graph.interpret import problem_of
from autopar.graph.model_graph import Arg, ModelGraph, Op, TensorInfo

_LARGEST_SIZE = 2**62  # slices without an end use the largest int64


def at_rows(graph: ModelGraph, rows: int) -> ModelGraph:
    """The graph at `rows` rows, every op checked against the shapes that follow.

    FLOPs and bytes of ops keep the captured rows' values. InputError, naming the op, where a size depends on the rows
    in another way than in proportion (half of the batch, say).
    """
    if not graph.rows_are_tagged:
        if graph.rows != rows:
            raise InputError(f"the model was captured with {graph.rows} rows, and the plan's micro_batch is {rows}")
        return graph

    def size(value: int) -> int:
        return value // graph.rows * rows if value % graph.rows == 0 and abs(value) < _LARGEST_SIZE else value

    def arg(value: Arg) -> Arg:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return size(value)
        if isinstance(value, float):
            return float(size(int(value))) if value.is_integer() else value
        return tuple(arg(item) for item in value) if isinstance(value, tuple) else value

    def info(value: TensorInfo) -> TensorInfo:
        return replace(value, shape=tuple(size(length) for length in value.shape))

    def op(value: Op) -> Op:
        return replace(
            value, args=tuple(arg(item) for item in value.args),
            kwargs=tuple((key, arg(item)) for key, item in value.kwargs),
        )

    classes = tuple(
        replace(cls, ops=tuple(op(item) for item in cls.ops), tensors=tuple(info(item) for item in cls.tensors))
        for cls in graph.classes
    )
    for cls in classes:
        problem = problem_of(cls)
        if problem is not None:
            raise InputError(f"{problem} in {cls.name}, at {rows} rows; sizes must be in proportion to the rows")
    return replace(
        graph, rows=rows, rows_are_tagged=False, classes=classes, inputs=tuple(info(item) for item in graph.inputs)
    )
