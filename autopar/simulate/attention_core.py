"""The attention cores of a block class: what selective recomputation drops and runs again (Korthikanti et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost_models.op_kinds import OpKind, base_name, op_kind
from autopar.graph.model_graph import BlockClass, Op

_BETWEEN = (OpKind.POINTWISE, OpKind.VIEW, OpKind.REDUCTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCore:
    """From the product of queries and keys through softmax and dropout to the product with the values, or a fused op.

    `ops` are in execution order, and no op outside lies on a way between two of them. `internal` are the tensors inside
    the core: what its last op gives is not one of them, for the next op needs it.
    """

    ops: tuple[str, ...]
    internal: frozenset[str]
    keys_and_values: tuple[str, ...]


def attention_cores(cls: BlockClass) -> tuple[AttentionCore, ...]:
    """The attention cores of a class in execution order; empty where none is recognized."""
    consumers: dict[str, list[Op]] = {}
    for op in cls.ops:
        for name in set(op.operands):
            consumers.setdefault(name, []).append(op)
    found = []
    taken: set[str] = set()
    for op in cls.ops:
        core = _fused(op) if op_kind(op.target) is OpKind.ATTENTION else _around(cls, consumers, op)
        if core is not None and taken.isdisjoint(core.ops) and _is_closed(cls, core):
            taken.update(core.ops)
            found.append(core)
    return tuple(found)


def _fused(op: Op) -> AttentionCore:
    return AttentionCore(ops=(op.name,), internal=frozenset(), keys_and_values=op.operands[1:3])


def _around(cls: BlockClass, consumers: Mapping[str, list[Op]], op: Op) -> AttentionCore | None:
    """The core around a softmax; None for another op, and for a softmax that is not between two products."""
    if base_name(op.target) not in ("softmax", "_softmax"):
        return None
    before, scores = _walk_back(cls, op)
    after, mixed = _walk_on(consumers, op)
    if scores is None or mixed is None:
        return None
    names = {item.name for item in (*before, op, *after, scores, mixed)}
    return AttentionCore(
        ops=tuple(item.name for item in cls.ops if item.name in names),
        internal=frozenset(o for item in (*before, op, *after, scores) for o in item.outputs if o),
        keys_and_values=(scores.operands[-1], mixed.operands[-1]),
    )


def _is_closed(cls: BlockClass, core: AttentionCore) -> bool:
    """Whether nothing that the core reads from outside depends on the core itself."""
    inside, depends = set(core.ops), set[str]()
    for op in cls.ops:
        own = op.name in inside
        if own and any(name in depends for name in op.operands):
            return False
        if own:
            continue
        produced_inside = any(
            (producer := cls.producer.get(name)) is not None and producer.name in inside for name in op.operands
        )
        if produced_inside or any(name in depends for name in op.operands):
            depends.update(output for output in op.outputs if output)
    return True


def _walk_back(cls: BlockClass, op: Op) -> tuple[list[Op], Op | None]:
    """The ops from a product to this op's first differentiable operand, and the product."""
    passed: list[Op] = []
    while True:
        names = [name for name in op.operands if cls.tensor[name].requires_grad]
        producer = cls.producer.get(names[0]) if names else None
        if producer is None or op_kind(producer.target) is OpKind.MATMUL:
            return passed, producer
        if op_kind(producer.target) not in _BETWEEN:
            return passed, None
        passed.append(producer)
        op = producer


def _walk_on(consumers: Mapping[str, list[Op]], op: Op) -> tuple[list[Op], Op | None]:
    """The ops from this op to the product that takes its result, and the product."""
    passed: list[Op] = []
    while True:
        following = [item for name in op.outputs if name for item in consumers.get(name, ())]
        if not following:
            return passed, None
        op = following[0]
        if op_kind(op.target) is OpKind.MATMUL:
            return passed, op
        if op_kind(op.target) not in _BETWEEN:
            return passed, None
        passed.append(op)
