"""Consecutive blocks as one function for torch.compile.

Each compiled call costs the host its guards, autograd's node and their wrappers, about a quarter of a millisecond
forward and backward, and kernels are fused within it alone. Runs of equal blocks that are equally long share one
function, so that what there is to compile does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from autopar.graph.model_graph import Block
from autopar.runtime.lower import Code, LoweredClass, make_function

MAX_TOGETHER = 8  # blocks: beyond it the host gains little, and compiling takes as much longer as there are more


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Blocks `first` up to `last` of a stage: `code(*params, *buffers, *inputs, *factors)` gives `outputs`.

    `inputs` and `outputs` are global names; parameters, buffers and factors are those of the blocks one after another.
    """

    first: int
    last: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    code: Code


def lengths(classes: Sequence[Hashable]) -> list[int]:
    """How many blocks go together, in their order, at most `MAX_TOGETHER`.

    Several of one class in a row are cut as evenly as can be; neighbours of which each is alone in its class go
    together.
    """
    found: list[int] = []
    lone = 0
    for _, same in groupby(classes):
        count = sum(1 for _ in same)
        if count == 1:
            lone += 1
            continue
        found += _even(lone) + _even(count)
        lone = 0
    return found + _even(lone)


def _even(count: int) -> list[int]:
    pieces = -(-count // MAX_TOGETHER)
    return [count // pieces + (i < count % pieces) for i in range(pieces)]


class RunMaker:
    """Makes runs; those of one structure share their function."""

    def __init__(self, compile_: Callable[[Code], Code] | None = None) -> None:
        """`compile_`: torch.compile, where nothing else is given."""
        self._compile = compile_ or torch.compile
        self._made: dict[tuple[Any, ...], Code] = {}

    def run(
        self, first: int, blocks: Sequence[Block], programs: Sequence[LoweredClass], needed: frozenset[str]
    ) -> Run:
        """The run of these blocks, of which the first is number `first`; `needed`: names that are used after it."""
        produced = {name for block in blocks for name in block.outputs}
        inputs = tuple(dict.fromkeys(name for block in blocks for name in block.inputs if name not in produced))
        outputs = tuple(name for block in blocks for name in block.outputs if name in needed)
        variable = {name: f"v{i}" for i, name in enumerate(inputs)}
        counts = {"p": 0, "b": 0, "f": 0}

        def fresh(kind: str, count: int) -> list[str]:
            start = counts[kind]
            counts[kind] += count
            return [f"{kind}{i}" for i in range(start, start + count)]

        codes: dict[Code, str] = {}
        lines = []
        for block, program in zip(blocks, programs, strict=True):
            called = codes.setdefault(program.eager, f"block{len(codes)}")
            given = [
                *fresh("p", len(block.params)), *fresh("b", len(block.buffers)),
                *(variable[name] for name in block.inputs), *fresh("f", len(program.factors)),
            ]
            for name in block.outputs:
                variable[name] = f"v{len(variable)}"
            results = "".join(f"{variable[name]}, " for name in block.outputs)
            lines.append(f"{results}= {called}({', '.join(given)})")
        arguments = [f"{kind}{i}" for kind in "pb" for i in range(counts[kind])]
        arguments += [variable[name] for name in inputs] + [f"f{i}" for i in range(counts["f"])]
        body = "\n    ".join([*lines, f"return ({''.join(variable[name] + ', ' for name in outputs)})"])
        source = f"def block_run({', '.join(arguments)}):\n    {body}\n"
        key = source, *map(id, codes)
        if key not in self._made:
            named: dict[str, Any] = {name: code for code, name in codes.items()}
            self._made[key] = self._compile(make_function("run", source, named))
        return Run(
            first=first, last=first + len(blocks), inputs=inputs, outputs=outputs, code=self._made[key],
        )
