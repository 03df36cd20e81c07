"""ModelGraph to and from JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from autopar.errors import InputError
from autopar.graph.model_graph import Arg, Block, BlockClass, Literal, ModelGraph, Op, Ref, TensorInfo

FORMAT = "autopar-model-graph"
VERSION = 1


def graph_to_json(graph: ModelGraph) -> str:
    """The graph as one JSON object."""
    return json.dumps({
        "format": FORMAT, "version": VERSION, "name": graph.name, "rows": graph.rows,
        "rows_are_tagged": graph.rows_are_tagged,
        "inputs": _infos_out(graph.inputs), "params": _infos_out(graph.params), "buffers": _infos_out(graph.buffers),
        "aliases": [list(pair) for pair in graph.aliases],
        "classes": [_class_out(cls) for cls in graph.classes],
        "blocks": [_block_out(block) for block in graph.blocks],
        "shared": _block_out(graph.shared), "loss": graph.loss, "notes": list(graph.notes),
        "settings": [list(pair) for pair in graph.settings],
    })


def graph_from_json(text: str, source: str = "model graph") -> ModelGraph:
    """The graph that `graph_to_json` wrote. InputError, naming `source`, for anything else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not JSON ({error.msg} at line {error.lineno}); the file may be cut off") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{source}: not an autopar model graph")
    if data.get("version") != VERSION:
        raise InputError(f"{source}: model graph of version {data.get('version')}; this autopar reads {VERSION}")
    try:
        return ModelGraph(
            name=data["name"], rows=data["rows"], rows_are_tagged=data["rows_are_tagged"],
            inputs=_infos_in(data["inputs"]), params=_infos_in(data["params"]), buffers=_infos_in(data["buffers"]),
            aliases=tuple((name, known) for name, known in data["aliases"]),
            classes=tuple(_class_in(cls) for cls in data["classes"]),
            blocks=tuple(_block_in(block) for block in data["blocks"]), shared=_block_in(data["shared"]),
            loss=data["loss"], notes=tuple(data["notes"]),
            settings=tuple((name, value) for name, value in data.get("settings", [])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: damaged model graph ({type(error).__name__}: {error})") from error


def _infos_out(infos: tuple[TensorInfo, ...]) -> list[list[Any]]:
    return [[info.name, list(info.shape), info.dtype, info.requires_grad] for info in infos]


def _infos_in(data: list[list[Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, shape=tuple(shape), dtype=dtype, requires_grad=requires_grad)
                 for name, shape, dtype, requires_grad in data)


def _block_out(block: Block) -> dict[str, Any]:
    return {"name": block.name, "cls": block.cls, "inputs": block.inputs, "params": block.params,
            "buffers": block.buffers, "outputs": block.outputs}


def _block_in(data: dict[str, Any]) -> Block:
    return Block(name=data["name"], cls=data["cls"], inputs=tuple(data["inputs"]), params=tuple(data["params"]),
                 buffers=tuple(data["buffers"]), outputs=tuple(data["outputs"]))


def _class_out(cls: BlockClass) -> dict[str, Any]:
    return {"name": cls.name, "inputs": cls.inputs, "params": cls.params, "buffers": cls.buffers,
            "outputs": cls.outputs, "ops": [_op_out(op) for op in cls.ops], "tensors": _infos_out(cls.tensors)}


def _class_in(data: dict[str, Any]) -> BlockClass:
    return BlockClass(name=data["name"], inputs=tuple(data["inputs"]), params=tuple(data["params"]),
                      buffers=tuple(data["buffers"]), outputs=tuple(data["outputs"]),
                      ops=tuple(_op_in(op) for op in data["ops"]), tensors=_infos_in(data["tensors"]))


def _op_out(op: Op) -> dict[str, Any]:
    return {
        "name": op.name, "target": op.target, "args": [_arg_out(arg) for arg in op.args],
        "kwargs": [[key, _arg_out(arg)] for key, arg in op.kwargs], "outputs": op.outputs, "module": op.module,
        "source": op.source, "flops": op.flops, "backward_flops": op.backward_flops, "saved": op.saved,
        "saved_extra_bytes": op.saved_extra_bytes,
    }


def _op_in(data: dict[str, Any]) -> Op:
    return Op(
        name=data["name"], target=data["target"], args=tuple(_arg_in(arg) for arg in data["args"]),
        kwargs=tuple((key, _arg_in(arg)) for key, arg in data["kwargs"]), outputs=tuple(data["outputs"]),
        module=data["module"], source=data["source"], flops=data["flops"], backward_flops=data["backward_flops"],
        saved=tuple(data["saved"]), saved_extra_bytes=data["saved_extra_bytes"],
    )


def _arg_out(arg: Arg) -> Any:
    """Tuples as lists; tensors, constants and the floats that JSON lacks as objects."""
    if isinstance(arg, Ref):
        return {"ref": arg.name}
    if isinstance(arg, Literal):
        return {arg.kind: arg.value}
    if isinstance(arg, tuple):
        return [_arg_out(item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    return arg


def _arg_in(data: Any) -> Arg:
    if isinstance(data, list):
        return tuple(_arg_in(item) for item in data)
    if isinstance(data, dict):
        ((kind, value),) = data.items()
        if kind == "ref":
            return Ref(value)
        return float(value) if kind == "float" else Literal(kind, value)
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    raise ValueError(f"not an argument: {data!r}")
