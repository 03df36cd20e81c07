"""The ModelGraph: a captured training step as an immutable value.

A model is a *chain of blocks*: what comes before the repeated layers (`prologue`), each layer, what lies between them
(`glue`), and the head with the loss (`epilogue`). Identical blocks share one BlockClass. Names inside a class are
local to it; `Block` binds them to names that are global to the model: parameters and buffers by their own FQNs (the
names of `model.state_dict()`), activations by the names that earlier blocks gave their outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8, "complex128": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Name, shape, dtype (torch's own word, such as "float32") and whether a gradient flows to it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as an op's argument, by its name in the class."""

    name: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A torch constant as an op's argument: kind "dtype", "device", "layout" or "memory_format", and torch's word."""

    kind: str
    value: str


Arg = Ref | Literal | int | float | bool | str | None | tuple["Arg", ...]


def refs_in(arg: Arg) -> Iterator[str]:
    """The names of the tensors in an argument, in order, with repetition."""
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_in(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One ATen call. `outputs` has one name for each tensor output ("" where the output is unused or not a tensor)."""

    name: str
    target: str  # "aten.linear.default"
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[str, ...]
    module: str = ""  # FQN of the calling module, relative to the block
    source: str = ""  # "file.py:12", the user's line
    flops: float = 0.0  # forward, at the captured shapes
    backward_flops: float = 0.0
    saved: tuple[str, ...] = ()  # tensors that autograd keeps for the backward, named by the storage that holds them
    saved_extra_bytes: int = 0  # kept besides those (attention's log-sum-exp, dropout masks, ...), at captured shapes
    # Names of the tensor operands in order of appearance (args, then kwargs), with repetition.
    operands: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = tuple(value for _, value in self.kwargs)
        object.__setattr__(self, "operands", (*refs_in(self.args), *refs_in(named)))


@dataclass(frozen=True, kw_only=True)
class BlockClass:
    """The ops that identical blocks share, in execution order. All names are local to the class.

    `tensors` describes every input, parameter, buffer and op output. `params` and `buffers` are local names.
    """

    name: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: tuple[TensorInfo, ...]

    @cached_property
    def tensor(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.tensors}

    @cached_property
    def producer(self) -> dict[str, Op]:
        return {output: op for op in self.ops for output in op.outputs if output}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One link of the chain: a class bound to global names, each tuple parallel to the class's tuple of that name."""

    name: str  # "model.layers.3", "prologue", "epilogue", "glue.7"
    cls: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """A captured forward with its loss.

    `rows` is the size of the batch dim that was captured. `rows_are_tagged` says that `rows` is a prime that divides
    no size of the model, so that a tensor depends on the batch exactly if `rows` divides its number of elements:
    `bytes_at` and `scale` then give sizes at any other number of rows.

    `inputs` are the batch's tensors, by keyword ("input_ids") or position ("0"); `settings` its other values, as
    Python writes them ("return_loss", "True"): the graph is what the model does with these. `shared` is a block of
    parameter-free ops without gradient (masks, positions) that depend on the inputs alone: each stage computes what it
    needs of it. `aliases` maps the other names of tied parameters to the one in `params`. `loss` is the global name of
    the scalar.
    """

    name: str
    rows: int
    rows_are_tagged: bool
    inputs: tuple[TensorInfo, ...]
    params: tuple[TensorInfo, ...]
    buffers: tuple[TensorInfo, ...]
    aliases: tuple[tuple[str, str], ...]
    classes: tuple[BlockClass, ...]
    blocks: tuple[Block, ...]
    shared: Block
    loss: str
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # what capture had to assume or could not fold, for reports

    @cached_property
    def block_class(self) -> dict[str, BlockClass]:
        return {cls.name: cls for cls in self.classes}

    @cached_property
    def param(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.params}

    @cached_property
    def captured_dtype(self) -> str:
        """The dtype that most parameters were captured in (float32 for a model without parameters)."""
        counts = Counter(info.dtype for info in self.params)
        return counts.most_common(1)[0][0] if counts else "float32"

    @property
    def num_params(self) -> int:
        return sum(info.numel for info in self.params)

    @property
    def sequence_length(self) -> int | None:
        """Tokens a row: the second dim of the first batch tensor of integers with two dims; None without one."""
        return next((i.shape[1] for i in self.inputs if i.dtype in ("int64", "int32") and len(i.shape) == 2), None)

    def depends_on_rows(self, numel: int) -> bool:
        return numel > 0 and numel % self.rows == 0

    def scale(self, numel: int, rows: float) -> float:
        """What to multiply a tensor's size of `numel` captured elements with, to have it at `rows` rows."""
        if not self.rows_are_tagged:
            assert rows == self.rows, "only a graph with tagged rows can be rescaled"
            return 1.0
        return rows / self.rows if self.depends_on_rows(numel) else 1.0

    def bytes_at(self, info: TensorInfo, rows: float) -> float:
        """Bytes of a tensor when the batch has `rows` rows."""
        return info.size_bytes * self.scale(info.numel, rows)

    def boundary(self, index: int) -> tuple[str, ...]:
        """Global names of the tensors that pass from blocks[:index] to blocks[index:], in order of production.

        Batch inputs and the outputs of `shared` are left out: every stage has them.
        """
        produced = [name for block in self.blocks[:index] for name in block.outputs]
        needed = {name for block in self.blocks[index:] for name in block.inputs}
        return tuple(name for name in produced if name in needed)
