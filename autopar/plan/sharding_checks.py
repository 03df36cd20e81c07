"""What a well-formed sharding of a block class is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autopar.graph.model_graph import BlockClass
from autopar.sharding.joint import JointStrategy, Placement, can_be_placed, joint_strategies, placement_text
from autopar.sharding.lowering import Lowering
from autopar.sharding.state import Kind
from autopar.sharding.strategy import ClassSharding

_LOWERINGS = frozenset(map(str, Lowering))


def sharding_problems(
    choice: ClassSharding | Sequence[ClassSharding], cls: BlockClass, size: int | Sequence[int], *,
    tagged_rows: int = 1, rows: int = 1,
) -> Iterator[str]:
    """What is malformed in one class's sharding over an axis of `size` ranks, or over several, outermost first.

    The class's shapes are seen with `rows` in the place of the `tagged_rows` that it was captured with.
    """
    choices = (choice,) if isinstance(choice, ClassSharding) else tuple(choice)
    sizes = (size,) if isinstance(size, int) else tuple(size)
    shapes = {
        info.name: tuple(dim // tagged_rows * rows if dim % tagged_rows == 0 else dim for dim in info.shape)
        for info in cls.tensors
    }
    where = f"the sharding of class {cls.name}"
    for word in ("inputs", "params", "buffers", "outputs"):
        names = getattr(cls, word)
        for own in choices:
            if len(names) != len(getattr(own, word)):
                yield f"{where} has {len(getattr(own, word))} {word}, and the class has {len(names)}"
                return
        for name, place in zip(names, zip(*(getattr(own, word) for own in choices), strict=True), strict=True):
            yield from _place_problems(f"{where}, {name}", shapes[name], place, sizes)
            if word in ("params", "buffers") and any(state.kind is Kind.PARTIAL for state in place):
                yield f"{where}, {name}: {placement_text(place)}, and what rests on a device is whole or split, never P"
    for own in choices:
        if [name for name, _ in own.ops] != [op.name for op in cls.ops]:
            yield f"{where} does not list the class's {len(cls.ops)} ops in their order"
            return
    for i, op in enumerate(cls.ops):
        strategies = [own.ops[i][1] for own in choices]
        operands, outputs = op.operands, op.outputs
        for strategy in strategies:
            if strategy.lowering and strategy.lowering not in _LOWERINGS:
                yield f"{where}, op {op.name}: there is no lowering {strategy.lowering!r}"
        wrong = [s for s in strategies if len(s.inputs) != len(operands) or len(s.outputs) != len(outputs)]
        if wrong:
            yield (
                f"{where}, op {op.name}: {len(wrong[0].inputs)} and {len(wrong[0].outputs)} states for "
                f"{len(operands)} operands and {len(outputs)} outputs"
            )
            continue
        places = zip(*((*s.inputs, *s.outputs) for s in strategies), strict=True)
        for name, place in zip((*operands, *outputs), places, strict=True):
            if name:
                yield from _place_problems(f"{where}, op {op.name}, {name}", shapes[name], place, sizes)


def illegal_strategies(
    choices: Sequence[ClassSharding], cls: BlockClass, sizes: Sequence[int], *, tagged_rows: int = 1, rows: int = 1
) -> Iterator[str]:
    """Ops of a well-formed sharding whose strategy is none that the rules give: it would compute something else."""
    legal = joint_strategies(cls, sizes)
    for i, op in enumerate(cls.ops):
        own = tuple(choice.ops[i][1] for choice in choices)
        known = {_effect(strategy) for strategy in legal[op.name]}
        if tagged_rows > 1:
            known |= {
                _effect(tuple(part.at_rows(tagged_rows, rows) for part in strategy)) for strategy in legal[op.name]
            }
        if _effect(own) not in known:
            words = "; ".join(
                f"{' '.join(map(str, part.inputs))} -> {' '.join(map(str, part.outputs))} {part.lowering}".strip()
                for part in own
            )
            yield f"the sharding of class {cls.name}, op {op.name}: no rule splits {op.target} as {words}"


def _effect(choice: JointStrategy) -> tuple[object, ...]:
    """What decides the program of a strategy; the name of its factor does not."""
    return tuple((part.inputs, part.outputs, str(part.lowering)) for part in choice)


def _place_problems(where: str, shape: tuple[int, ...], place: Placement, sizes: Sequence[int]) -> Iterator[str]:
    if not can_be_placed(shape, place, sizes):
        over = " x ".join(map(str, sizes))
        yield f"{where}: {placement_text(place)} over {over} ranks of a tensor of shape {list(shape)}"
