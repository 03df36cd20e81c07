"""Which parameters hold the experts of a mixture, and whether the data ranks can share them out."""

from __future__ import annotations

from collections import Counter

from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import BlockClass, ModelGraph, Op, Ref

_FIRST_WEIGHT, _AFTER_WEIGHTS = 3, 7  # of the op's arguments: up, down and their biases


def expert_ops(cls: BlockClass) -> tuple[Op, ...]:
    """The ops of a class that run the experts of a mixture."""
    return tuple(op for op in cls.ops if op.target == EXPERTS_OP)


def expert_weights(op: Op) -> tuple[str, ...]:
    """What such an op takes of each expert, the experts along dim 0: its two products' weights and their biases."""
    named = dict(op.kwargs)
    keywords = (named.get(word) for word in ("up", "down", "up_bias", "down_bias"))
    given = (*op.args[_FIRST_WEIGHT:_AFTER_WEIGHTS], *keywords)
    return tuple(arg.name for arg in given if isinstance(arg, Ref))


def num_experts(cls: BlockClass, op: Op) -> int:
    """How many experts the op has."""
    return cls.tensor[expert_weights(op)[0]].shape[0]


def expert_params(cls: BlockClass) -> frozenset[str]:
    """The parameters of a class, by its own names, that hold experts."""
    return frozenset(name for op in expert_ops(cls) for name in expert_weights(op)).intersection(cls.params)


def unsplit_experts(graph: ModelGraph, size: int) -> str:
    """Why `size` data ranks cannot have the model's experts between them; "" where they can."""
    if not graph.rows_are_tagged:
        return f"{graph.name} was captured for one number of rows alone"
    found = False
    for cls in graph.classes:
        ops = expert_ops(cls)
        held = [name for op in ops for name in expert_weights(op)]
        for op in ops:
            found = True
            if num_experts(cls, op) % size:
                return f"the {num_experts(cls, op)} experts of {cls.name} do not divide over ep {size}"
        if any(name not in cls.params for name in held):
            return f"{cls.name} computes the weights of its experts from its parameters"
        users = [name for op in cls.ops for name in dict.fromkeys(op.operands)]
        if any(users.count(name) > 1 for name in held):
            return f"{cls.name} uses the weights of its experts in more than one op"
    if not found:
        return f"{graph.name} has no experts that autopar knows (mixture layers of transformers' experts interface)"
    names = [
        name for block in graph.blocks
        for own, name in zip(graph.block_class[block.cls].params, block.params, strict=True)
        if own in expert_params(graph.block_class[block.cls])
    ]
    uses = Counter(name for block in graph.blocks for name in block.params)
    shared = next((name for name in names if uses[name] > 1), None)
    return f"several blocks use {shared}" if shared is not None else ""
