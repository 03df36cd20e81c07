"""Recomputation of a whole block or of its attention cores: torch.utils.checkpoint, and where the cores are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import checkpoint

from autopar.graph.model_graph import BlockClass, Op
from autopar.simulate.attention_core import AttentionCore


def recompute(function: Callable[..., tuple[Any, ...]], *inputs: Any) -> tuple[Any, ...]:
    """The function's outputs; the backward runs it again, with the same random numbers, and only its inputs are kept.

    The inputs are kept by autograd, so that saved-tensor hooks around this call see them.
    """
    outputs: tuple[Any, ...] = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True)
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGroup:
    """One op, or the ops of an attention core. `leaving` are the core's tensors that are needed outside it."""

    ops: tuple[Op, ...]
    is_core: bool = False
    leaving: tuple[str, ...] = ()


def op_groups(cls: BlockClass, cores: Sequence[AttentionCore]) -> list[OpGroup]:
    """The ops of a class in an order of execution in which every core runs as one; the class's own without cores."""
    core_of = {name: core for core in cores for name in core.ops}
    groups: list[OpGroup] = []
    begun: set[str] = set()
    for op in cls.ops:
        core = core_of.get(op.name)
        if core is None:
            groups.append(OpGroup(ops=(op,)))
        elif core.ops[0] not in begun:
            begun.add(core.ops[0])
            groups.append(_core_group(cls, core))
    missing = {output for op in cls.ops for output in op.outputs if output}
    ordered: list[OpGroup] = []
    waiting = groups
    while waiting:
        left = []
        for group in waiting:
            own = {output for op in group.ops for output in op.outputs if output}
            if missing.isdisjoint({name for op in group.ops for name in op.operands} - own):
                ordered.append(group)
                missing -= own
            else:
                left.append(group)
        assert len(left) < len(waiting), "attention cores that wait for each other"
        waiting = left
    return ordered


def _core_group(cls: BlockClass, core: AttentionCore) -> OpGroup:
    inside = set(core.ops)
    ops = tuple(op for op in cls.ops if op.name in inside)
    used = {name for op in cls.ops if op.name not in inside for name in op.operands} | set(cls.outputs)
    leaving = tuple(output for op in ops for output in op.outputs if output in used)
    return OpGroup(ops=ops, is_core=True, leaving=leaving)
