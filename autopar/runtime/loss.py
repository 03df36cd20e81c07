"""How the loss of a global batch is put together from its micro-batches.

The loss is followed back through sums and constant factors to its *terms*. A cross-entropy that averages over its
targets becomes a sum divided by the number of valid targets of the whole global batch, so that rows with many ignored
targets weigh as they do in one process; a sum stays as it is; any other term is averaged over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.graph.model_graph import Block, BlockClass, ModelGraph, Op, Ref, refs_in

_LINEAR = frozenset(
    {"add", "sub", "neg", "mul", "div", "clone", "view", "reshape", "squeeze", "to", "_to_copy", "alias"}
)
_AVERAGES = ("mean", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
_CROSS_ENTROPY = "cross_entropy_loss"
_NONE, _MEAN, _SUM = 0, 1, 2


class Term(StrEnum):
    COUNT = "count"  # a mean over valid targets: sum here, divide by the global count
    SHARE = "share"  # averaged over rows: times this micro-batch's share of the rows
    SUM = "sum"  # already a sum over rows: as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Terms of the loss inside the class that computes it, by the op's name; `notes` says what was assumed."""

    block: Block
    cls: BlockClass
    terms: tuple[tuple[str, Term], ...]
    notes: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops of all terms."""
        names = {name for name, _ in self.terms}
        return tuple(op for op in self.cls.ops if op.name in names)

    @property
    def counted(self) -> tuple[Op, ...]:
        """The ops whose targets are counted."""
        names = {name for name, term in self.terms if term is Term.COUNT}
        return tuple(op for op in self.cls.ops if op.name in names)


def base_name(op: Op) -> str:
    """"linear" for "aten.linear.default"."""
    return op.target.split(".")[1]


def argument(op: Op, position: int, keyword: str, default: object) -> object:
    """An op's argument, wherever it was written."""
    named = dict(op.kwargs)
    if keyword in named:
        return named[keyword]
    return op.args[position] if len(op.args) > position else default


def ignored_index(op: Op) -> int:
    """The target that a cross-entropy leaves out."""
    found = argument(op, 4, "ignore_index", -100)
    assert isinstance(found, int)
    return found


def loss_terms(graph: ModelGraph) -> LossTerms:
    """The terms of `graph.loss`."""
    for block in graph.blocks:
        if graph.loss in block.outputs:
            cls = graph.block_class[block.cls]
            start = cls.outputs[block.outputs.index(graph.loss)]
            terms: dict[str, Term] = {}
            notes: list[str] = []
            _follow(cls, start, terms, notes)
            return LossTerms(block=block, cls=cls, terms=tuple(terms.items()), notes=tuple(notes))
    raise AssertionError(f"no block of {graph.name} computes the loss {graph.loss}")


def _follow(cls: BlockClass, name: str, terms: dict[str, Term], notes: list[str]) -> None:
    op = cls.producer.get(name)
    if op is None:
        raise InputError(
            f"the loss is a sum with {name!r}, which an earlier block computes; compute the whole loss at the end"
        )
    kind = base_name(op)
    operands = [ref for ref in op.operands if cls.tensor[ref].requires_grad]
    if kind == _CROSS_ENTROPY:
        reduction = argument(op, 3, "reduction", _MEAN)
        terms[op.name] = Term.COUNT if reduction == _MEAN else Term.SUM
        if argument(op, 5, "label_smoothing", 0.0) and argument(op, 2, "weight", None) is not None:
            terms[op.name] = Term.SHARE
            notes.append("a loss with class weights and label smoothing is averaged over rows")
    elif kind == "sum":
        terms[op.name] = Term.SUM
    elif kind in _LINEAR and operands and _is_linear(op, operands):
        for operand in operands:
            _follow(cls, operand, terms, notes)
    else:
        terms[op.name] = Term.SHARE
        if kind not in _AVERAGES:
            notes.append(f"the loss term {op.target} is averaged over the rows of the batch")


def _is_linear(op: Op, operands: list[str]) -> bool:
    """Whether the op is homogeneous and linear in its operands with gradient: x + y, 2 * x, x / 3, but not x + 1."""
    kind = base_name(op)
    if kind in ("add", "sub"):
        others = [arg for arg in op.args[:2] if not (isinstance(arg, Ref) and arg.name in operands)]
        return not others
    if kind == "mul":
        return len(operands) == 1
    if kind == "div":
        return len(operands) == 1 and op.args[0] == Ref(operands[0])
    return True


def target_ops(terms: LossTerms) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """The ops that make the targets (and class weights) of the counted terms, and the class's inputs that they need."""
    cls = terms.cls
    wanted: set[str] = set()
    for op in terms.counted:
        wanted.update(refs_in(tuple(_targets(op))))
    kept: list[Op] = []
    for op in reversed(cls.ops):
        if wanted.intersection(op.outputs):
            kept.append(op)
            wanted.update(op.operands)
    return tuple(reversed(kept)), tuple(name for name in cls.inputs if name in wanted)


def _targets(op: Op) -> tuple[Ref, ...]:
    found = (argument(op, 1, "target", None), argument(op, 2, "weight", None))
    return tuple(ref for ref in found if isinstance(ref, Ref))


def count_function(
    terms: LossTerms, run_ops: Callable[[tuple[Op, ...], dict[str, Tensor]], None]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from the class's named tensors to the local counts of the counted terms, one float64 for each.

    `run_ops` runs ops on whole (unsharded) tensors, adding their outputs to the dict.
    """
    ops, _ = target_ops(terms)

    def count(values: Mapping[str, Tensor]) -> Tensor:
        env = dict(values)
        with torch.no_grad():
            run_ops(ops, env)
            counts = [_count(op, env) for op in terms.counted]
        return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.float64)

    return count


def _count(op: Op, env: Mapping[str, Tensor]) -> Tensor:
    refs = _targets(op)
    target: Tensor = env[refs[0].name]
    if target.is_floating_point():  # class probabilities: the mean is over rows
        return torch.tensor(target.numel() / target.shape[1 if target.dim() > 1 else 0], device=target.device).double()
    valid = target.ne(ignored_index(op))
    if len(refs) > 1:
        return (env[refs[1].name][target.masked_fill(~valid, 0)] * valid).sum().double()
    return valid.sum().double()
