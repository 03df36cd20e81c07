"""What a well-formed sharding of a block class is."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.graph.model_graph import BlockClass
from autopar.sharding.reshard import divides
from autopar.sharding.state import State
from autopar.sharding.strategy import ClassSharding


def sharding_problems(
    choice: ClassSharding, cls: BlockClass, size: int, *, tagged_rows: int = 1, rows: int = 1
) -> Iterator[str]:
    """What is malformed in one class's sharding over an axis of `size` ranks.

    The class's shapes are seen with `rows` in the place of the `tagged_rows` that it was captured with.
    """
    shapes = {
        info.name: tuple(dim // tagged_rows * rows if dim % tagged_rows == 0 else dim for dim in info.shape)
        for info in cls.tensors
    }
    where = f"the sharding of class {cls.name}"
    for word in ("inputs", "params", "buffers", "outputs"):
        names, states = getattr(cls, word), getattr(choice, word)
        if len(names) != len(states):
            yield f"{where} has {len(states)} {word}, and the class has {len(names)}"
            return
        for name, state in zip(names, states, strict=True):
            yield from _state_problems(f"{where}, {name}", shapes[name], state, size)
    if [name for name, _ in choice.ops] != [op.name for op in cls.ops]:
        yield f"{where} does not list the class's {len(cls.ops)} ops in their order"
        return
    for op, (_, strategy) in zip(cls.ops, choice.ops, strict=True):
        operands, outputs = op.operands, op.outputs
        if len(strategy.inputs) != len(operands) or len(strategy.outputs) != len(outputs):
            yield (
                f"{where}, op {op.name}: {len(strategy.inputs)} and {len(strategy.outputs)} states for "
                f"{len(operands)} operands and {len(outputs)} outputs"
            )
            continue
        for name, state in zip((*operands, *outputs), (*strategy.inputs, *strategy.outputs), strict=True):
            if name:
                yield from _state_problems(f"{where}, op {op.name}, {name}", shapes[name], state, size)


def _state_problems(where: str, shape: tuple[int, ...], state: State, size: int) -> Iterator[str]:
    if not divides(shape, state, size):
        yield f"{where}: {state} over {size} ranks of a tensor of shape {list(shape)}"
