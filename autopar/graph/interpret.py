"""Runs a ModelGraph op by op on real tensors: the oracle that a capture is right, and a readable reference.

On fake tensors it tells whether a class's ops fit together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.graph.assemble import overload_of
from autopar.graph.model_graph import Arg, Block, BlockClass, Literal, ModelGraph, Op, Ref


def run(graph: ModelGraph, *, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor],
        constants: Mapping[str, Tensor], device: torch.device | str | None = None) -> Tensor:
    """The loss of the graph at real values; gradients flow to `params`.

    `inputs` are the batch tensors by name, with the captured number of rows; `constants` are `Captured.constants`.
    Devices that the trace wrote into ops are replaced by `device` (that of the first input if None).
    """
    place = torch.device(device) if device is not None else next(iter(inputs.values())).device
    values: dict[str, Tensor] = dict(inputs)
    for block in (graph.shared, *graph.blocks):
        run_block(graph.block_class[block.cls], block, values, params, constants, place)
    return values[graph.loss]


def run_block(cls: BlockClass, block: Block, values: dict[str, Tensor], params: Mapping[str, Tensor],
              constants: Mapping[str, Tensor], device: torch.device) -> None:
    """Runs one block: reads its inputs from `values` and puts its outputs there, by their global names."""
    local: dict[str, Tensor] = {}
    local.update(zip(cls.inputs, (values[name] for name in block.inputs), strict=True))
    local.update(zip(cls.params, (params[name] for name in block.params), strict=True))
    local.update(zip(cls.buffers, (constants[name] for name in block.buffers), strict=True))
    for op in cls.ops:
        run_op(op, local, device)
    values.update(zip(block.outputs, (local[name] for name in cls.outputs), strict=True))


def problem_of(cls: BlockClass) -> str | None:
    """Why the class's ops do not give the shapes that it states, run without data; None where they do."""
    return _without_data(lambda device: [_problem(cls, {}, _made(cls, device), device)])[0]


def problems_of(cls: BlockClass, changed: Sequence[BlockClass]) -> list[str | None]:
    """`problem_of` classes that have most of the ops of `cls`, or its own problem where it has one.

    Its ops are not run again where their operands lie in memory as they do in it.
    """
    def problems(device: torch.device) -> list[str | None]:
        local = _made(cls, device)
        if problem := _problem(cls, {}, local, device):
            return [problem] * len(changed)
        run = dict.fromkeys(cls.ops, local)
        return [_problem(own, run, _made(own, device), device) for own in changed]

    return _without_data(problems) if changed else []


def _without_data(problems: Callable[[torch.device], list[str | None]]) -> list[str | None]:
    """Problems on fake tensors, unless there are none on the meta device, which is quicker and knows fewer ops."""
    with torch.no_grad():
        with contextlib.suppress(Exception):  # whatever a kernel says of a meta tensor
            found = problems(torch.device("meta"))
            if not any(found):
                return found
        with FakeTensorMode():
            return problems(torch.device("cpu"))


def _made(cls: BlockClass, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.empty(cls.tensor[name].shape, dtype=getattr(torch, cls.tensor[name].dtype), device=device)
        for name in (*cls.inputs, *cls.params, *cls.buffers)
    }


def _problem(
    cls: BlockClass, run: Mapping[Op, Mapping[str, Tensor]], local: dict[str, Tensor], device: torch.device
) -> str | None:
    """Why the ops do not give their shapes; `run`: what ops that were run before read and gave."""
    for op in cls.ops:
        before = run.get(op)
        if before is not None and all(_lies_alike(before[name], local[name]) for name in op.operands):
            local.update((name, before[name]) for name in op.outputs if name)
            continue
        try:
            run_op(op, local, device)
        except (RuntimeError, ValueError) as error:
            return f"{op.target} ({op.source or op.name}) does not run: {str(error).splitlines()[0]}"
        for name in op.outputs:
            if name and tuple(local[name].shape) != cls.tensor[name].shape:
                return f"{op.target} ({op.source or op.name}) gives {list(local[name].shape)}"
    return None


def _lies_alike(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def bind_op(op: Op, local: Mapping[str, Tensor], device: torch.device) -> Callable[[], Any]:
    """The call of an op on these tensors, with nothing left to look up."""
    args = [_value(arg, local, device) for arg in op.args]
    kwargs = {key: _value(arg, local, device) for key, arg in op.kwargs}
    return partial(overload_of(op.target), *args, **kwargs)


def run_op(op: Op, local: dict[str, Tensor], device: torch.device) -> None:
    result = bind_op(op, local, device)()
    results = result if isinstance(result, (tuple, list)) else (result,)
    local.update((name, out) for name, out in zip(op.outputs, results, strict=True) if name)


def _value(arg: Arg, local: Mapping[str, Tensor], device: torch.device) -> Any:
    if isinstance(arg, Ref):
        return local[arg.name]
    if isinstance(arg, Literal):
        return device if arg.kind == "device" else getattr(torch, arg.value)
    if isinstance(arg, tuple):
        return [_value(item, local, device) for item in arg]
    return arg
