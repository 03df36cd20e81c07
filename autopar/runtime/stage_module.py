"""The modules of one pipeline stage: its blocks, under the model's own names, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from autopar.graph.model_graph import Block
from autopar.plan.plan import Recompute, Variant
from autopar.runtime.collectives import Fn
from autopar.runtime.compiled_runs import Run, RunMaker, lengths
from autopar.runtime.compute_copies import ComputeCopies, CopyUnit
from autopar.runtime.lower import LoweredClass
from autopar.runtime.offload import Offloader
from autopar.runtime.recompute import recompute


class ExpertsModule(nn.Module):
    """What holds experts that the expert axis has by parts. It runs what uses them: FSDP2 gathers them around that."""

    def forward(self, run: Callable[..., Any], *inputs: Any) -> Any:
        return run(*inputs)


class BlockModule(nn.Module):
    """A block at its own path. Parameters are looked up at every call: FSDP2 swaps them under their names."""

    def __init__(self) -> None:
        super().__init__()
        self._autopar_program: LoweredClass | None = None
        self._autopar_evaluation: LoweredClass | None = None
        self._autopar_copies: tuple[list[CopyUnit], list[Tensor]] | None = None
        self._autopar_mark: Callable[[Sequence[Any]], None] | None = None  # told of the inputs before a forward
        self._autopar_within: tuple[ExpertsModule, ...] = ()  # modules of their own below this one

    def bind(
        self, program: LoweredClass, evaluation: LoweredClass, params: Sequence[tuple[nn.Module, str, Fn | None]],
        buffers: Sequence[Tensor], *, variant: Variant, offloader: Offloader | None,
    ) -> None:
        """`params` says where each parameter is and how it comes from its stored state to the one that is wanted.

        `evaluation` runs where no gradients are wanted.
        """
        self._autopar_within = tuple(
            module for module in dict.fromkeys(module for module, _, _ in params) if isinstance(module, ExpertsModule)
        )
        self._autopar_program, self._autopar_evaluation = program, evaluation
        self._autopar_params = list(params)
        self._autopar_buffers = list(buffers)
        self._autopar_variant = variant
        self._autopar_offloader = offloader

    @property
    def _autopar_bound(self) -> LoweredClass:
        """What runs in training."""
        assert self._autopar_program is not None
        return self._autopar_program

    @property
    def _autopar_factors(self) -> tuple[str, ...]:
        """The factors that the program takes."""
        return self._autopar_bound.factors

    @property
    def _autopar_is_plain(self) -> bool:
        """Whether a forward is the program's call alone: nothing is recomputed as a whole, offloaded or gathered."""
        recomputes = self._autopar_variant.recompute is Recompute.FULL
        return not (recomputes or self._autopar_offloader is not None or self._autopar_within)

    def _autopar_own_parameters(self) -> list[nn.Parameter]:
        """The parameters that the program takes, in its order, as they are at rest."""
        return [getattr(module, name) for module, name, _ in self._autopar_params]

    def _autopar_compute_with(self, copies: ComputeCopies, first: CopyUnit | None) -> None:
        """From now on the program takes what `copies` has in the place of parameters.

        `first`: the unit that no block before this one computes with.
        """
        own = self._autopar_own_parameters()
        copied = [param in copies.unit_of for param in own]
        units = dict.fromkeys(copies.unit_of[param] for param, is_copied in zip(own, copied, strict=True) if is_copied)
        taken = [copies.leaf(param) if is_copied else param for param, is_copied in zip(own, copied, strict=True)]
        self._autopar_copies = list(units), taken
        self._autopar_mark = partial(copies.mark, first) if first is not None else None

    def _params(self) -> list[Tensor]:
        """What the program computes with."""
        if self._autopar_copies is None:
            return [getattr(module, name) for module, name, _ in self._autopar_params]
        units, taken = self._autopar_copies
        for unit in units:
            unit.refresh()
        return taken

    def _autopar_converted(self) -> list[Tensor]:
        """The parameters in the placements that the program takes them in."""
        return [
            value if convert is None else convert(value)
            for value, (_, _, convert) in zip(self._params(), self._autopar_params, strict=True)
        ]

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        program = self._autopar_program if torch.is_grad_enabled() else self._autopar_evaluation
        assert program is not None
        return program.code(*self._autopar_converted(), *self._autopar_buffers, *inputs)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        run: Callable[..., tuple[Any, ...]] = self._forward
        for module in self._autopar_within:
            run = partial(module, run)
        return run(*inputs)

    def _forward(self, *inputs: Any) -> tuple[Any, ...]:
        """All parameters are gathered."""
        if not torch.is_grad_enabled():
            return self._run(*inputs)
        if self._autopar_mark is not None:
            self._autopar_mark(inputs)
        variant, offloader = self._autopar_variant, self._autopar_offloader
        run = partial(recompute, self._run) if variant.recompute is Recompute.FULL else self._run
        if offloader is None:
            return run(*inputs)
        return offloader.run(run, inputs, self._held(inputs) if variant.offload else None)

    def _held(self, inputs: Sequence[Any]) -> list[Tensor]:
        """What is on the device in any case: parameters, buffers, and inputs without gradient that all layers share."""
        params = self._params()
        shared = [value for value in inputs if isinstance(value, Tensor) and not value.requires_grad]
        return [*params, *self._autopar_buffers, *shared]


class StageModule(nn.Module):
    """The blocks of a stage in their order, and what the stage needs of the masks and positions."""

    def __init__(self) -> None:
        super().__init__()
        self._autopar_chain: list[tuple[Block, BlockModule]] = []
        self._autopar_offloader: Offloader | None = None
        self._autopar_free: list[BlockModule] = []  # blocks that are no module of the model
        self._autopar_runs: dict[int, Run] = {}  # by their first block's number

    @property
    def _autopar_blocks(self) -> list[BlockModule]:
        """The blocks in their order."""
        return [module for _, module in self._autopar_chain]

    def forward(self, values: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From batch inputs and received tensors by their global names to the tensors that leave the stage."""
        if self._autopar_offloader is not None:
            self._autopar_offloader.begin()
        env = dict(values)
        if self._autopar_shared is not None:
            names, outputs, program, buffers = self._autopar_shared
            found = program.code(*buffers, *(env[name] for name in names))
            env.update(zip(outputs, found, strict=True))
        runs = self._autopar_runs if torch.is_grad_enabled() else {}
        done = 0
        while done < len(self._autopar_chain):
            run = runs.get(done)
            if run is not None:
                env.update(zip(run.outputs, self._run_together(run, env, factors), strict=True))
                last = run.last
            else:
                block, module = self._autopar_chain[done]
                extra = [factors[name] for name in module._autopar_factors]
                env.update(zip(block.outputs, module(*(env[name] for name in block.inputs), *extra), strict=True))
                last = done + 1
            for dead in self._autopar_dead[done:last]:
                for name in dead:
                    env.pop(name, None)  # what a run makes for itself is not there
            done = last
        return {name: env[name] for name in self._autopar_leaving}

    def _run_together(
        self, run: Run, env: Mapping[str, Tensor], factors: Mapping[str, Tensor]
    ) -> tuple[Any, ...]:
        """The outputs of several blocks by one compiled call."""
        modules = self._autopar_blocks[run.first : run.last]
        inputs = [env[name] for name in run.inputs]
        for module in modules:
            if module._autopar_mark is not None:
                module._autopar_mark(inputs)
        return run.code(
            *(value for module in modules for value in module._autopar_converted()),
            *(value for module in modules for value in module._autopar_buffers), *inputs,
            *(factors[name] for module in modules for name in module._autopar_factors),
        )

    def _autopar_compile_together(self) -> None:
        """Compile blocks in runs, where nothing has to happen between one and the next."""
        maker = RunMaker()
        together = (module._autopar_is_plain for module in self._autopar_blocks)
        for is_plain, group in groupby(enumerate(together), key=itemgetter(1)):
            numbers = [number for number, _ in group]
            if not is_plain:
                continue
            first = numbers[0]
            for length in lengths([self._autopar_chain[number][0].cls for number in numbers]):
                chain = self._autopar_chain[first : first + length]
                later = {name for block, _ in self._autopar_chain[first + length :] for name in block.inputs}
                if length > 1:
                    self._autopar_runs[first] = maker.run(
                        first, [block for block, _ in chain], [module._autopar_bound for _, module in chain],
                        frozenset({*later, *self._autopar_leaving}),
                    )
                first += length

    _autopar_shared: tuple[tuple[str, ...], tuple[str, ...], LoweredClass, list[Tensor]] | None
    _autopar_dead: list[tuple[str, ...]]
    _autopar_leaving: tuple[str, ...]
