"""The number of valid targets of a batch, where the loss divides by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from autopar.errors import InputError
from autopar.graph.loss_terms import LossTerms
from autopar.graph.model_graph import ModelGraph, Op
from autopar.runtime.loss import count_function, target_ops
from autopar.runtime.stage import needed_ops


def row_counter(
    terms: LossTerms, graph: ModelGraph, run_ops: Callable[[tuple[Op, ...], dict[str, Tensor]], None],
    constants: Mapping[str, Tensor],
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from a rank's rows of the batch to its counts of valid targets, one float64 for each counted term.

    `run_ops` runs ops on whole tensors, adding their outputs to the dict. InputError where the targets are not of the
    batch: what the model computes of it is known too late.
    """
    ops, needed = target_ops(terms)
    name_of = dict(zip(terms.cls.inputs, terms.block.inputs, strict=True))
    shared, inputs = graph.shared, {info.name for info in graph.inputs}
    shared_cls = graph.block_class[shared.cls]
    early = {name_of[name] for name in needed} - inputs
    if not early <= set(shared.outputs):
        name = sorted(early - set(shared.outputs))[0]
        raise InputError(
            f"the targets of the loss depend on {name}, which the model computes; pass them in the batch"
        )
    wanted = tuple(shared_cls.outputs[shared.outputs.index(name)] for name in sorted(early))
    shared_ops, _ = needed_ops(shared_cls.ops, wanted)
    count = count_function(terms, run_ops)
    held = {
        local: constants[name]
        for cls, block in ((terms.cls, terms.block), (shared_cls, shared))
        for local, name in zip(cls.buffers, block.buffers, strict=True)
    }
    touched = {name for op in ops for name in op.operands}
    if trained := sorted(touched.intersection(terms.cls.params)):
        raise InputError(f"the targets of the loss depend on parameter {trained[0]}; pass them in the batch")

    def count_rows(batch: Mapping[str, Tensor]) -> Tensor:
        values = dict(zip(shared_cls.inputs, (batch[name] for name in shared.inputs), strict=True))
        values.update({name: held[name] for name in shared_cls.buffers})
        run_ops(shared_ops, values)
        found = dict(zip(sorted(early), (values[name] for name in wanted), strict=True))
        known = {**batch, **found}
        env = {local: known[name_of[local]] for local in needed}
        return count({**{name: held[name] for name in terms.cls.buffers}, **env})

    return count_rows
