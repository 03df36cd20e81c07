"""Whether a stage's backward runs in two parts: the gradients of its inputs (I), later those of its weights (W)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.graph.model_graph import ModelGraph
from autopar.plan.actions import Action, ActionLists, B, I, W
from autopar.plan.plan import Plan, Recompute, Stage, is_layer


def as_run(graph: ModelGraph, plan: Plan, lists: ActionLists) -> ActionLists:
    """The lists with a B for the I of every stage whose backward runs whole, and without its W."""
    splitting = {action.stage for actions in lists for action in actions if action.kind is I}
    whole = {
        index for index in splitting
        if not _trained_inputs(graph, plan.stages[index]) or unsplit_reason(graph, plan, plan.stages[index])
    }
    if not whole:
        return lists
    return tuple(
        tuple(
            Action(B, action.stage, action.micro_batch) if action.kind is I and action.stage in whole else action
            for action in actions if action.kind is not W or action.stage not in whole
        ) for actions in lists
    )


def unsplit_reason(graph: ModelGraph, plan: Plan, stage: Stage) -> str:
    """Why a stage's backward cannot be split; "" where it can, or where it has no gradients of inputs to compute.

    torch's functions give wrong gradients, or compute things twice, in these cases.
    """
    blocks = graph.blocks[stage.first : stage.last]
    if stage.zero == 3:
        return "zero 3 drops the gathered weights that its second part would need"
    if plan.compile:
        return "a compiled block computes all gradients at once"
    layers = stage.layer_variants(sum(is_layer(block.name) for block in blocks))
    if any(variant.recompute is not Recompute.NONE or variant.offload for variant in layers):
        return "both parts would recompute or fetch the activations"
    return _lost_or_twice(graph, stage)


def _lost_or_twice(graph: ModelGraph, stage: Stage) -> str:
    """Why torch would lose gradients or take them twice: for what does not follow from the stage's inputs; or "".

    torch goes from each weight to the first ops that follow from the stage's inputs. A trained tensor that does not,
    and leaves the stage, gives its gradient to none of them: the look-up of a decoder's own tokens, a bias that later
    layers share. Weights that share some of these ops and not others, as those behind such a tensor with several uses
    do, would go through an op twice. So would those behind one that is cut in parts of which some are used after others
    (a modulation by the time step): what lies between keeps nothing for its own weights then, and the process may end.
    A stage that receives nothing to train computes its whole backward at once.
    """
    blocks = graph.blocks[stage.first : stage.last]
    trained = {info.name for info in graph.params if info.requires_grad}
    received = _trained_inputs(graph, stage)
    if not received:
        return ""
    leaving = {graph.loss} if stage.last == len(graph.blocks) else set(graph.boundary(stage.last))
    follows = set(received)
    uses: Counter[str] = Counter()
    made_of: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in trained}  # of what does not follow
    taken: dict[str, list[int]] = {}  # by weight: the ops that follow and take it, or what is made of it
    ops: list[_Op] = []
    for block in blocks:
        cls = graph.block_class[block.cls]
        whole = dict(zip((*cls.params, *cls.inputs), (*block.params, *block.inputs), strict=True))
        whole.update(zip(cls.outputs, block.outputs, strict=True))
        for op in cls.ops:
            operands = [whole.get(name, f"{block.name}: {name}") for name in op.operands]
            outputs = [whole.get(name, f"{block.name}: {name}") for name in filter(None, op.outputs)]
            behind = not follows.isdisjoint(operands)
            weights = frozenset[str]()
            for local, name in zip(op.operands, operands, strict=True):
                if name not in follows and (name in trained or cls.tensor[local].requires_grad):
                    uses[name] += 1
                    weights |= made_of.get(name, frozenset())
            for local, name in zip(filter(None, op.outputs), outputs, strict=True):
                if behind:
                    follows.add(name)
                elif name in leaving and cls.tensor[local].requires_grad:
                    return f"{name} leaves it and does not follow from what it receives"
                else:
                    made_of[name] = weights
            for weight in weights if behind else ():
                taken.setdefault(weight, []).append(len(ops))
            ops.append(_Op(operands=operands, outputs=outputs, weights=weights if behind else frozenset()))
    twice = next((name for name, count in uses.items() if count > 1), "")
    twice = twice or next((name for name, at in taken.items() if len(at) > 1 and _crosses(ops, taken, at)), "")
    return f"it uses {twice} more than once" if twice else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Op:
    """`weights`: what it takes of those, or what is made of them, where it follows from what the stage receives."""

    operands: list[str]
    outputs: list[str]
    weights: frozenset[str]


def _crosses(ops: Sequence[_Op], taken: Mapping[str, list[int]], at: Sequence[int]) -> bool:
    """Whether one of these ops follows from another, or a weight is taken by some of them and not by all."""
    if any(taken[weight] != at for index in at for weight in ops[index].weights):
        return True
    follows = set(ops[at[0]].outputs)
    for index in range(at[0] + 1, at[-1] + 1):
        behind = not follows.isdisjoint(ops[index].operands)
        if behind and index in at:
            return True
        if behind or index in at:
            follows.update(ops[index].outputs)
    return False


def _trained_inputs(graph: ModelGraph, stage: Stage) -> set[str]:
    """What a stage receives and has to send a gradient back for."""
    return {name for name in graph.boundary(stage.first) if _requires_grad(graph, name)} if stage.first else set()


def _requires_grad(graph: ModelGraph, name: str) -> bool:
    """Whether a tensor that passes between blocks takes a gradient."""
    for block in graph.blocks:
        if name in block.outputs:
            cls = graph.block_class[block.cls]
            return cls.tensor[cls.outputs[block.outputs.index(name)]].requires_grad
    return False
