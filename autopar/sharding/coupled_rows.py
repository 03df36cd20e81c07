"""Whether the rows of a batch can be computed apart: what each row gives must depend on no other row.

Capture tags the batch with a prime number of rows, so a dim that holds rows shows by its size. The batch's tensors
begin split by rows; each op's rule says whether the op is a loop over the rows (the split then passes on to its
outputs), adds them up, or moves values between them. Ops without a rule are taken to be such loops. Batch norms take
the statistics of the rows that they see, as everywhere in training, which `loss_terms` notes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.graph.loss_terms import argument, base_name, loss_terms, op_place
from autopar.graph.model_graph import BlockClass, ModelGraph, Op, Ref, TensorInfo, refs_in
from autopar.sharding.factors import OpFactors, Split
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import normal_dim
from autopar.sharding.rules.table import gradients, op_factors
from autopar.sharding.state import Kind, State, shard

_BY_POSITION = ("eye", "linspace", "logspace", "randperm", "tril_indices", "triu_indices")
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "remainder", "floor_divide", "true_divide")
_DTYPE_ALONE = ("to", "type_as")  # the second operand gives its dtype
# Look-ups and writes along one dim: self, dim, index.
_ALONG_DIM = (
    "index_select", "gather", "index_add", "index_copy", "index_fill", "index_reduce", "scatter", "scatter_add",
    "scatter_reduce",
)
_BY_ROW = ("", Lowering.AXIS_RANDOM, Lowering.EXPERT_EXCHANGE)  # the programs that are loops all the same
_ADVICE = "compute each row by itself (a batch norm is allowed), or train with one micro-batch on one data rank"


@dataclass(frozen=True, slots=True)
class _Rows:
    """A tensor split by rows. `are_numbers`: it holds the rows' positions in the batch, or what follows from these."""

    state: State
    are_numbers: bool = False


_Found = tuple[tuple[_Rows | None, ...], str]  # the states of a class's outputs, and what couples rows first


def coupled_rows(graph: ModelGraph) -> str:
    """The first op outside of the loss's own sums that makes rows depend on one another; "" where there is none.

    None is found where rows are not tagged. A loss that is not put together from parts is `loss_terms`' to tell.
    """
    if not graph.rows_are_tagged:
        return ""
    terms = loss_terms(graph, num_parts=1)
    known: dict[str, _Rows | None] = {info.name: _by_shape(info, graph.rows) for info in graph.inputs}
    done: dict[tuple[str, tuple[_Rows | None, ...], Collection[str]], _Found] = {}
    for block in (graph.shared, *graph.blocks):
        cls = graph.block_class[block.cls]
        given = tuple(known[name] for name in block.inputs)
        own: frozenset[str] = terms.path if block == terms.block else frozenset()
        key = (block.cls, given, own)
        if key not in done:
            done[key] = _Class(cls, graph.rows, own).follow(given)
        states, problem = done[key]
        if problem:
            return f"{problem}; {_ADVICE}"
        known.update(zip(block.outputs, states, strict=True))
    return ""


def needs_whole_batch(graph: ModelGraph) -> str:
    """Why a step is not put together from those of parts of the batch; "" where it is."""
    try:
        loss_terms(graph)
    except InputError as error:
        return str(error)
    return coupled_rows(graph)


class _CoupledError(Exception):
    """Why an op makes rows depend on one another."""


class _Class:
    """Follows the split by rows through a class's ops, but for those on the loss's `path`, which add rows up."""

    def __init__(self, cls: BlockClass, rows: int, path: Collection[str]) -> None:
        self.cls, self.rows, self.path = cls, rows, path
        self.states: dict[str, _Rows | None] = dict.fromkeys(cls.tensor)

    def follow(self, given: tuple[_Rows | None, ...]) -> _Found:
        self.states.update(zip(self.cls.inputs, given, strict=True))
        for op in self.cls.ops:
            try:
                found = self._outputs(op)
            except _CoupledError as reason:
                place = op_place(op) or f" in {self.cls.name}"
                return (), f"{op.target}{place} makes rows of the batch depend on one another ({reason})"
            self.states.update((name, state) for name, state in zip(op.outputs, found, strict=True) if name)
        return tuple(self.states[name] for name in self.cls.outputs), ""

    def _outputs(self, op: Op) -> list[_Rows | None]:
        """The states of an op's outputs."""
        operands = [self.states[name] for name in op.operands]
        if op.name in self.path:
            self._check_numbers(op, operands)
            return [None] * len(op.outputs)
        kind = base_name(op)
        if "batch_norm" in kind:
            return [operands[0], *(None for _ in op.outputs[1:])]
        if kind in _ARITHMETIC and any(self._in_proportion(value) for value in op.args):
            raise _CoupledError("it takes the number of rows")
        found = self._looked_up(op, kind.removesuffix("_"), operands)
        if found is not None:
            return found
        self._check_numbers(op, operands)
        factors = op_factors(op, self.cls.tensor)
        if not any(operands):
            return self._made(op, kind, factors)
        if factors is None or factors.is_opaque:
            return self._assumed(op, operands)
        return self._split(op, operands[:1] if kind in _DTYPE_ALONE else operands, factors)

    def _made(self, op: Op, kind: str, factors: OpFactors | None) -> list[_Rows | None]:
        """Of an op that reads nothing of the batch: whatever it makes is alike in all rows, but for their numbers."""
        found: list[_Rows | None] = []
        for place, name in enumerate(op.outputs):
            state = _by_shape(self.cls.tensor[name], self.rows) if name else None
            if state is not None and kind in _BY_POSITION:
                raise _CoupledError("it tells rows apart by their positions")
            if state is not None and factors is not None and not factors.is_opaque:
                names = factors.outputs[place][state.state.dim]
                inside = [each for each in names if factors.sizes[each] % self.rows == 0]
                made = factors.strategy((inside[0], 1), (False,) * len(op.operands), self.rows) if inside else None
                state = _Rows(made.outputs[place]) if made is not None else state
            found.append(_Rows(state.state, are_numbers=True) if state is not None and kind == "arange" else state)
        return found

    def _looked_up(self, op: Op, kind: str, operands: list[_Rows | None]) -> list[_Rows | None] | None:
        """Of a look-up (or a write) along the rows; None of any other op.

        Row numbers may look up: of x[arange(rows), ids] each part of the batch has its own.
        """
        looked_in = operands[0] if operands else None
        index: object = None
        if kind == "embedding_bag":
            index = argument(op, 2, "offsets", None)
        elif kind in ("index", "index_put") and looked_in is not None:
            indices = op.args[1]
            assert isinstance(indices, tuple)
            index = indices[looked_in.state.dim] if looked_in.state.dim < len(indices) else None
        elif kind == "index_put" and any(self.states[name] for name in refs_in(op.args[1:])):
            raise _CoupledError("it writes rows into what all of them share")
        elif kind in _ALONG_DIM and looked_in is not None:
            dim, rank = argument(op, 1, "dim", 0), len(self.cls.tensor[op.operands[0]].shape)
            assert isinstance(dim, int)
            index = argument(op, 2, "index", None) if normal_dim(dim, rank) == looked_in.state.dim else None
        if not isinstance(index, Ref):
            return None
        at = self.states[index.name]
        if at is None or not at.are_numbers:
            raise _CoupledError("it looks rows up by number")
        return [_by_shape(self.cls.tensor[name], self.rows) if name else None for name in op.outputs]

    def _split(self, op: Op, operands: list[_Rows | None], factors: OpFactors) -> list[_Rows | None]:
        """What a rule makes of operands that are split by rows."""
        splits: dict[Split, None] = {}
        for state, dims in zip(operands, factors.operands, strict=False):
            if state is not None:
                split = factors.split_for(dims, state.state)
                if split is None:
                    raise _CoupledError("it reads across rows")
                splits[split] = None
        if not splits:
            return self._assumed(op, operands)
        split, *others = splits
        refusal = factors.refusal(split, self.rows)
        if refusal is not None:
            raise _CoupledError(refusal.reason)
        if others:
            raise _CoupledError("each row meets others")
        if split[0] in factors.reducing or split[0] in factors.whole:
            raise _CoupledError("it reduces over the rows")
        if factors.lowering(split[0]) not in _BY_ROW:
            raise _CoupledError("it reads across rows")
        strategy = factors.strategy(split, gradients(op, self.cls.tensor)[0], self.rows)
        numbers = any(state.are_numbers for state in operands if state is not None)
        return [
            _Rows(state, are_numbers=numbers) if state.kind is Kind.SHARDED else None for state in strategy.outputs
        ]

    def _assumed(self, op: Op, operands: list[_Rows | None]) -> list[_Rows | None]:
        """Where no rule says how the op loops: it is taken to treat each row alone."""
        given = zip(op.operands, operands, strict=False)
        shapes = {self.cls.tensor[name].shape: state for name, state in given if state is not None}
        numbers = any(state.are_numbers for state in operands if state is not None)
        found: list[_Rows | None] = []
        for name in op.outputs:
            info = self.cls.tensor[name] if name else None
            state = (shapes.get(info.shape) or _by_shape(info, self.rows)) if info is not None else None
            found.append(_Rows(state.state, are_numbers=numbers) if state is not None else None)
        return found

    def _check_numbers(self, op: Op, operands: list[_Rows | None]) -> None:
        if any(state.are_numbers for state in operands if state) and any(
            name and self.cls.tensor[name].requires_grad for name in op.outputs
        ):
            raise _CoupledError("it tells rows apart by their positions")

    def _in_proportion(self, value: object) -> bool:
        return isinstance(value, int | float) and bool(value) and value % self.rows == 0


def _by_shape(info: TensorInfo, rows: int) -> _Rows | None:
    """The state of a tensor whose rows lie outermost in the first dim that holds any; None for one without rows."""
    return next((_Rows(shard(dim)) for dim, size in enumerate(info.shape) if size and size % rows == 0), None)
