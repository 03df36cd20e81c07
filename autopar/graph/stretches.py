"""Stretches of block calls alike, each of which takes what the one before gives: a trace needs their two ends alone.

Between the first and the last call of a stretch, calls are answered with tensors that no tracer knows, and the last one
is traced as if it came right after the first. That holds where nothing else reads those tensors; it is checked in what
was traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from autopar.graph.fake import is_fake, untraced_like
from autopar.graph.record import BlockCall

Value = TypeVar("Value")
SHORTEST = 4  # calls; from here on leaving some out is worth while


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The calls from number `first` to `last`.

    `sources` says of each tensor that a call takes which output of the call before it is; None is what the first takes.
    """

    first: int
    last: int
    sources: tuple[int | None, ...]

    def inputs(self, taken: Sequence[Value], given: Sequence[Value]) -> list[Value]:
        """What a call takes after one that takes `taken` and gives `given`."""
        return [own if source is None else given[source] for own, source in zip(taken, self.sources, strict=True)]


class Shortcut:
    """Answers block calls in their order. `stretches` has those that were found, by their last call."""

    def __init__(self, calls: Sequence[BlockCall]) -> None:
        self.stretches: dict[int, Stretch] = {}
        self._bounds: dict[int, tuple[int, int]] = {}
        first = 0
        for index in range(1, len(calls) + 1):
            if index == len(calls) or calls[index].key != calls[first].key or calls[first].collected:
                if index - first >= SHORTEST:
                    self._bounds.update(dict.fromkeys(range(first, index), (first, index - 1)))
                first = index
        self._taken: list[Tensor] = []
        self._given: list[Tensor] = []
        self._traced: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._bounds)

    def answer(self, index: int, tensors: list[Tensor], trace: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """The outputs of call number `index` on `tensors`; LookupError where it takes other ones than a stretch's."""
        if index not in self._bounds:
            return trace(tensors)
        first, last = self._bounds[index]
        if index == first:
            self._taken, self._given = tensors, trace(tensors)
            self._traced = self._given
            return self._given
        sources = tuple(
            next((number for number, out in enumerate(self._given) if out is tensor), None) for tensor in tensors
        )
        stretch = Stretch(first=first, last=last, sources=sources)
        if index == first + 1:
            self.stretches[last] = stretch
        known = zip(stretch.inputs(self._taken, self._given), tensors, strict=True)
        if self.stretches[last] != stretch or any(one is not other for one, other in known):
            raise LookupError("calls alike take their inputs from elsewhere")
        if index == last:
            return trace(stretch.inputs(self._taken, self._traced))
        self._taken, self._given = tensors, [untraced_like(out) for out in self._traced]
        return self._given

    def holds(self, program: ExportedProgram, block_op: object) -> bool:
        """Whether in what was traced nothing lies between the two ends of a stretch, and nothing read what does."""
        for spec in program.graph_signature.input_specs:  # a tensor that the tracer does not know becomes a constant
            if spec.kind is InputKind.CONSTANT_TENSOR and is_fake(program.constants[spec.target or ""]):
                return False
        before: object = None
        for node in program.graph.nodes:
            if node.target is operator.getitem:
                continue
            index = node.args[1] if node.target is block_op else None
            if index in self.stretches and before != self.stretches[index].first:
                return False
            before = index
        return True
