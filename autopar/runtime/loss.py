"""The number of valid targets by which the loss's counted terms are divided (see `autopar.graph.loss_terms`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autopar.graph.loss_terms import LossTerms, Term, argument, base_name, ignored_index, loss_terms
from autopar.graph.model_graph import Op, Ref, refs_in

__all__ = [
    "LossTerms", "Term", "argument", "base_name", "count_function", "ignored_index", "loss_terms", "target_ops",
]


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
