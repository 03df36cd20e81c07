"""From an op to its factors, and from these to strategies and refusals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autopar.errors import InputError
from autopar.graph.model_graph import Op, TensorInfo
from autopar.sharding.factors import OpFactors, Refusal, Split, distinct, unsplit_strategies
from autopar.sharding.rules.registry import Call, find_rule
from autopar.sharding.strategy import Strategy


def has_rule(target: str) -> bool:
    """Whether the op has a rule; one without is replicated."""
    return find_rule(target) is not None


def op_factors(op: Op, tensors: Mapping[str, TensorInfo]) -> OpFactors | None:
    """The op's factors, checked against its tensors' shapes, or None for an op with no rule."""
    found = find_rule(op.target)
    if found is None:
        return None
    function, signature = found
    call = Call(op, tensors, signature)
    factors = function(call)
    outputs = [tensors[name].shape if name else None for name in op.outputs]
    problem = factors.problem(call.operand_shapes(), outputs)
    if problem:
        raise InputError(f"rule of {op.target} at {op.name} ({op.source or 'no source'}): {problem}")
    return factors


def gradients(op: Op, tensors: Mapping[str, TensorInfo]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each operand whether a gradient flows back to it through this op, and for each output whether it has one."""
    outputs = tuple(bool(name) and tensors[name].requires_grad for name in op.outputs)
    return tuple(any(outputs) and tensors[name].requires_grad for name in op.operands), outputs


def strategies_with(
    op: Op, tensors: Mapping[str, TensorInfo], size: int, factors: OpFactors | None, splits: Iterable[Split]
) -> tuple[Strategy, ...]:
    """The unsplit strategies (R, RP, P where linear) and then those of the given splits that the axis can make.

    Where it does not divide a factor and the rule allows it, the shards are padded.
    """
    differentiable, output_gradient = gradients(op, tensors)
    if factors is None:
        return unsplit_strategies(differentiable, output_gradient)
    found = list(unsplit_strategies(differentiable, output_gradient, factors.linear))
    if size > 1:
        found += [
            factors.strategy(split, differentiable, size)
            for split in splits if not factors.refusal(split, size, may_pad=True)
        ]
    return distinct(found)


def strategies(op: Op, tensors: Mapping[str, TensorInfo], size: int) -> tuple[Strategy, ...]:
    """Every way to run the op on an axis of `size` ranks: R, RP, P where linear, then one for each splittable factor.

    Strided splits and padded shards are left out here: which of them are of use shows only among neighbours
    (`class_strategies`).
    """
    factors = op_factors(op, tensors)
    splits = factors.default_splits() if factors else ()
    even = [split for split in splits if factors and not factors.refusal(split, size)]
    return strategies_with(op, tensors, size, factors, even)


def refusals(op: Op, tensors: Mapping[str, TensorInfo], size: int) -> tuple[Refusal, ...]:
    """The factors that an axis of `size` ranks cannot split, each with its reason."""
    factors = op_factors(op, tensors)
    if factors is None:
        return (Refusal(factor="", size=0, reason=f"{op.target} has no rule and runs whole on every rank"),)
    found = (factors.refusal(split, size) for split in factors.default_splits())
    return tuple(refusal for refusal in found if refusal)
