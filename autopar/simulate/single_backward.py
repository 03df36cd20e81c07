"""What a stage holds in a step of one micro-batch: its backward frees activations as it makes gradients.

At the backward's start there are no gradients, at its end no activations; in between, what the blocks behind have left
of gradients meets what the blocks before still hold. With several micro-batches the gradients stay from the first
backward on, and all of it counts at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autopar.cost_models.memory import StaticBytes, backward_bytes
from autopar.plan.plan import Plan, Stage
from autopar.simulate.numels import Numels


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardBlock:
    """Bytes of one block of a stage in the step's only backward.

    `held`: activations until its backward is through. `beside`: what its backward needs beside them while it runs.
    `copy`: of parameters in the compute dtype, until its backward is through. `making`: gradients on their way as its
    backward ends, `made`: what is left of them. `waiting`: gradients that come here and are joined by those of an
    earlier block, where `joined` says how much of such ends.
    """

    held: float
    beside: float
    copy: float = 0.0
    making: float = 0.0
    made: float = 0.0
    waiting: float = 0.0
    joined: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Bytes at one moment that come and go in a step, by what they are for. `buffers`: gradients on their way."""

    copies: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.copies + self.gradients + self.activations + self.buffers

    def with_(self, other: Moment) -> Moment:
        """Both at once."""
        return Moment(
            copies=self.copies + other.copies, gradients=self.gradients + other.gradients,
            activations=self.activations + other.activations, buffers=self.buffers + other.buffers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleBackward:
    """A stage `before` its backward, at the most that this takes, and `after` all of it.

    `always`: what it holds beside that whatever the moment; no gradients.
    """

    always: StaticBytes
    before: Moment
    peak: Moment
    after: Moment


def backward_moments(blocks: Sequence[BackwardBlock], kept: float = 0.0) -> Iterable[Moment]:
    """The moments of a backward over these blocks, from the last to the first; `kept`: activations until its end.

    In a block's moment all that it holds is still there, and the larger of what its ops and its gradients need beside.
    """
    held, copies = kept + sum(block.held for block in blocks), sum(block.copy for block in blocks)
    made = waiting = 0.0
    for block in reversed(blocks):
        waiting -= block.joined
        ending = block.making > block.beside
        yield Moment(
            copies=copies, gradients=made + waiting, activations=held + (0.0 if ending else block.beside),
            buffers=block.making if ending else 0.0,
        )
        held, copies, made, waiting = held - block.held, copies - block.copy, made + block.made, waiting + block.waiting


def single_backward(
    plan: Plan, stage: Stage, numels: Sequence[Numels], held: Sequence[float], beside: Sequence[float],
    is_layer: Sequence[bool], kept: float, static: StaticBytes, buffers: float,
) -> SingleBackward:
    """The moments of a stage in a step of one micro-batch; bytes by block, `kept`: of the whole backward.

    `static` is what the stage holds if all of it is there at once, `buffers` those that are there whatever the moment.

    A layer counts with the most that any layer needs beside what it holds, so that a stage needs the same whichever of
    its layers that are alike takes which variant.
    """
    mesh, rest = stage.mesh, range(len(held))
    most = max((need for need, own in zip(beside, is_layer, strict=True) if own), default=0.0)
    blocks = [
        BackwardBlock(held=held[i], beside=most if is_layer[i] else beside[i]) for i in rest
    ]
    always = ending = Moment()
    for own in numels:
        sizes = [
            backward_bytes(
                zero=stage.zero, num_shards=own.num_shards, num_copies=mesh.dp * mesh.cp, dtype=plan.dtype,
                param_dtype=plan.param_dtype, is_layer=layer,
            ) for layer in is_layer
        ]
        for i, (size, numel, shared, again) in enumerate(
            zip(sizes, own.blocks, own.shared, own.again, strict=True)
        ):
            # A gradient that is summed in the compute dtype is part of what the first block that has it copies.
            in_copies = size.copy > 0 and not size.is_kept
            comes = size.copy if in_copies else size.made
            block, adding = blocks[i], 0.0 if in_copies else comes * shared
            blocks[i] = replace(
                block, copy=block.copy + (0.0 if size.is_kept else size.copy * numel),
                making=block.making + size.making * numel + comes * again + adding,
                made=block.made + size.made * numel,
                waiting=block.waiting + comes * again, joined=block.joined + comes * shared,
            )
            always = replace(always, copies=always.copies + (size.copy * numel if size.is_kept else 0.0))
            ending = replace(
                ending, gradients=ending.gradients + size.whole * numel,
                buffers=ending.buffers + (size.reducing - size.whole) * numel,
            )
    before = Moment(copies=sum(block.copy for block in blocks), activations=kept + sum(held)).with_(always)
    moments = [*(moment.with_(always) for moment in backward_moments(blocks, kept)), ending]
    at_rest = replace(static, parameters=static.parameters - before.copies, gradients=0.0, buffers=buffers)
    return SingleBackward(
        always=at_rest, before=before, peak=max(moments, key=lambda moment: moment.total),
        after=replace(ending, buffers=0.0),
    )
