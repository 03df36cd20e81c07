"""How the loss of a global batch is put together from its micro-batches.

The loss is followed back through sums and constant factors to its *terms*. A cross-entropy that averages over its
targets becomes a sum divided by the number of valid targets of the whole global batch, so that rows with many ignored
targets weigh as they do in one process; a sum over rows stays as it is; a mean over rows is averaged over the parts of
the batch. A mean may be weighed by a histogram of the part, as the loss that balances a mixture's experts is: like
frameworks for training do, each part is balanced by itself then, which a note says. A loss of any other form is refused
where the batch is computed in parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

from autopar.errors import InputError
from autopar.graph.model_graph import Arg, Block, BlockClass, ModelGraph, Op, Ref

_LINEAR = frozenset({
    "add", "sub", "neg", "mul", "div", "clone", "view", "reshape", "squeeze", "unsqueeze", "to", "_to_copy", "alias",
    "contiguous",
})
# Where each loss has its reduction: the position in ATen's schema. All reduce over elements, or rows, alike.
_REDUCTION_AT = {
    "mse_loss": 2, "l1_loss": 2, "smooth_l1_loss": 2, "huber_loss": 2, "binary_cross_entropy": 3,
    "binary_cross_entropy_with_logits": 4, "kl_div": 2, "soft_margin_loss": 2, "multilabel_margin_loss": 2,
    "hinge_embedding_loss": 3, "cosine_embedding_loss": 4, "margin_ranking_loss": 4, "multi_margin_loss": 5,
    "poisson_nll_loss": 5, "triplet_margin_loss": 7,
}
_OVER_TARGETS = ("cross_entropy_loss", "cross_entropy", "nll_loss", "nll_loss_nd")
_MEAN, _SUM = 1, 2  # torch's numbers of the reductions
_ADVICE = "make the loss a mean or a sum over the rows, or train with one micro-batch on one data rank"


class Term(StrEnum):
    COUNT = "count"  # a mean over valid targets: sum here, divide by the global count
    SHARE = "share"  # averaged over rows: times this micro-batch's share of the rows
    SUM = "sum"  # already a sum over rows: as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Terms of the loss inside the class that computes it, by the op's name; `notes` says what was assumed.

    `path` has the names of the terms' ops and of those between them and the loss.
    """

    block: Block
    cls: BlockClass
    terms: tuple[tuple[str, Term], ...]
    notes: tuple[str, ...] = ()
    path: frozenset[str] = frozenset()

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


def loss_terms(graph: ModelGraph, tagged: ModelGraph | None = None, *, num_parts: int = 2) -> LossTerms:
    """The terms of `graph.loss`, found on `tagged`: the same model with tagged rows (`graph` itself where left out).

    `num_parts` is how many parts the global batch is computed in, micro-batches times data ranks. InputError where it
    is more than one and the loss of the whole is not known to follow from the losses of the parts.
    """
    followed = tagged or graph
    for block in graph.blocks:
        if graph.loss in block.outputs:
            cls = graph.block_class[block.cls]
            start = cls.outputs[block.outputs.index(graph.loss)]
            walk = _Walk(followed, block)
            notes: tuple[str, ...] = ()
            try:
                walk.follow(start, 0)
                terms = walk.terms
            except InputError:
                if num_parts > 1:
                    raise
                terms = {}  # one part: whatever it is, it is the whole loss
            if num_parts > 1:
                notes = (*walk.notes, *of_each_part(followed))
            return LossTerms(
                block=block, cls=cls, terms=tuple(terms.items()), notes=notes, path=frozenset(walk.path)
            )
    raise AssertionError(f"no block of {graph.name} computes the loss {graph.loss}")


class _Walk:
    """Follows the loss back to the ops that reduce over the rows, each a term.

    `power` counts factors in proportion to the rows on the way: a sum divided by them is a mean, a mean times them a
    sum.
    """

    def __init__(self, graph: ModelGraph, block: Block) -> None:
        self.graph, self.cls = graph, graph.block_class[block.cls]
        self.terms: dict[str, Term] = {}
        self.path: set[str] = set()
        self.notes: dict[str, None] = {}
        batch = {info.name for info in graph.inputs if not graph.depends_on_rows(info.numel)}
        binding = dict(zip(self.cls.inputs, block.inputs, strict=True))
        # Tensors that are the same in every part of the batch.
        self.fixed = {*self.cls.params, *self.cls.buffers, *(n for n, bound in binding.items() if bound in batch)}
        for op in self.cls.ops:
            if all(name in self.fixed for name in op.operands) and not any(
                graph.depends_on_rows(self.cls.tensor[out].numel) for out in op.outputs if out
            ):
                self.fixed.update(out for out in op.outputs if out)

    def follow(self, name: str, power: int) -> None:
        op = self.cls.producer.get(name)
        if op is None:
            raise InputError(
                f"the loss is a sum with {name!r}, which an earlier block computes; compute the whole loss at the end"
            )
        self.path.add(op.name)
        operands = [ref for ref in dict.fromkeys(op.operands) if self.cls.tensor[ref].requires_grad]
        reduces = any(self.graph.depends_on_rows(self.cls.tensor[ref].numel) for ref in operands)
        if reduces:
            self._add_term(op, self._reduction(op, operands), power)
            return
        power += self._linear(op, operands)
        for operand in operands:
            self.follow(operand, power)

    def _add_term(self, op: Op, term: Term, power: int) -> None:
        known = {(Term.SUM, -1): Term.SHARE, (Term.SHARE, 1): Term.SUM, (term, 0): term}
        term = known.get((term, power)) or self._fail(op)
        if self.terms.setdefault(op.name, term) is not term:
            self._fail(op)

    def _reduction(self, op: Op, operands: list[str]) -> Term:
        """What an op that reduces over the rows makes of them."""
        kind, rows = base_name(op), self.graph.rows
        if self.graph.rows_are_tagged and any(self.cls.tensor[ref].numel % (rows * rows) == 0 for ref in operands):
            self._fail(op)  # every row against every row
        if kind in _OVER_TARGETS:
            if argument(op, 5, "label_smoothing", 0.0) and argument(op, 2, "weight", None) is not None:
                self._fail(op)
            reduction, mean = argument(op, 3, "reduction", _MEAN), Term.COUNT
        elif kind in _REDUCTION_AT:
            reduction, mean = argument(op, _REDUCTION_AT[kind], "reduction", _MEAN), Term.SHARE
        else:
            reduction, mean = {"sum": _SUM, "mean": _MEAN}.get(kind), Term.SHARE
        if reduction not in (_MEAN, _SUM):
            self._fail(op)
        return mean if reduction == _MEAN else Term.SUM

    def _linear(self, op: Op, operands: list[str]) -> int:
        """The power of the rows in an op that is linear and homogeneous in its operands with gradient.

        x + y, 2 * x and x / 3, but not x + 1. InputError for any other op.
        """
        kind = base_name(op)
        if not operands or kind not in (_LINEAR | {"sum", "mean"}):
            self._fail(op)
        if kind in ("add", "sub"):
            named = tuple(value for _, value in op.kwargs)
            parts = [
                arg for arg in op.args[:2]
                if not (isinstance(arg, Ref) and (arg.name in operands or self._is_zero(arg.name)))
            ]
            return self._fail(op) if parts or any(self._rows_in(value) for value in named) else 0
        if kind in ("mul", "div"):
            if len(operands) != 1 or op.operands.count(operands[0]) != 1:
                self._fail(op)
            first, second = op.args[:2]
            other = second if first == Ref(operands[0]) else first
            if isinstance(other, Ref):
                if kind == "mul" and self._histogram(other.name) == 0:
                    self.notes[f"{op.target}{op_place(op)} weighs the loss by a histogram of the batch: that of one "
                               "micro-batch of one data rank"] = None
                elif other.name not in self.fixed or (kind == "div" and first == other):
                    self._fail(op)
                return 0
            if kind == "div" and first != Ref(operands[0]):
                self._fail(op)
            return self._rows_in(other) * (1 if kind == "mul" else -1)
        return 0

    def _histogram(self, name: str) -> int | None:
        """The power of the rows in a tensor that is a sum of histograms over them, scaled; None where it is no such."""
        op = self.cls.producer.get(name)
        if op is None or self.cls.tensor[name].requires_grad:
            return None
        kind = base_name(op)
        self.path.add(op.name)
        if kind == "histc":
            return int(self.graph.depends_on_rows(self.cls.tensor[op.operands[0]].numel))
        if kind == "add":
            parts = {self._histogram(ref) for ref in op.operands if not self._is_zero(ref)}
            return parts.pop() if len(parts) == 1 and len(op.operands) == 2 and not op.kwargs else None
        inside = self._histogram(op.operands[0]) if len(op.operands) == 1 and kind in _LINEAR else None
        if inside is None or kind not in ("mul", "div"):
            return inside
        first, second = op.args[:2]
        if kind == "div" and first != Ref(op.operands[0]):
            return None
        other = second if first == Ref(op.operands[0]) else first
        return inside + self._rows_in(other) * (1 if kind == "mul" else -1)

    def _is_zero(self, name: str) -> bool:
        op = self.cls.producer.get(name)
        return op is not None and base_name(op) == "zeros"

    def _rows_in(self, value: Arg) -> int:
        """1 for a number in proportion to the rows, else 0."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not value:
            return 0
        return int(value % self.graph.rows == 0)

    def _fail(self, op: Op) -> NoReturn:
        raise InputError(
            f"the loss{op_place(op)} takes {op.target} of the batch, and the loss of the whole batch does not follow "
            f"from those of its parts; {_ADVICE}"
        )


def op_place(op: Op) -> str:
    return f" at {op.source}" if op.source else ""


def of_each_part(graph: ModelGraph) -> tuple[str, ...]:
    """Notes on what is done once for each part of a batch, and so with other numbers than once for the whole.

    Batch norms take the statistics of the rows that they see, and what a forward writes into a buffer it writes anew.
    """
    if not graph.rows_are_tagged:
        return ()
    norms: list[str] = []
    writes: list[str] = []
    for cls in graph.classes:
        for op in cls.ops:
            if base_name(op) == "batch_norm":
                norms += [f"{op.target}{op_place(op)} in {cls.name}"] * (argument(op, 5, "training", False) is True)
            elif base_name(op).endswith("_") and op.operands[:1] and op.operands[0] in cls.buffers:
                if op.operands[0].endswith("num_batches_tracked"):  # which a batch norm reads nowhere
                    continue
                place = op_place(op) or f" in {cls.name}"
                writes.append(f"the buffer {op.operands[0]}{place} is written to")
    found = ((norms, "mixes rows: it sees one micro-batch of one data rank"), (writes, "once in each micro-batch"))
    return tuple(
        f"{first}" + (f" (and in {len(more)} more)" if more else "") + f" {what}"
        for (first, *more), what in ((places, what) for places, what in found if places)
    )
