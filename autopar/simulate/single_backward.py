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
    """A stage `before` its backward over its `blocks`, at the most that this takes, and `after` all of it.

    `always`: what it holds beside that whatever the moment; no gradients.
    """

    always: StaticBytes
    before: Moment
    peak: Moment
    after: Moment
    blocks: tuple[BackwardBlock, ...]
    kept_copies: float  # until the end
    ending: Moment  # when what came last is reduced


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
    number, most = len(held), max((need for need, own in zip(beside, is_layer, strict=True) if own), default=0.0)
    copies, making, made, waiting, joined = ([0.0] * number for _ in range(5))
    kept_copies = whole = reducing = 0.0
    for own in numels:
        sizes = {
            layer: backward_bytes(
                zero=stage.zero, num_shards=own.num_shards, num_copies=stage.mesh.dp * stage.mesh.cp,
                dtype=plan.dtype, param_dtype=plan.param_dtype, is_layer=layer,
            ) for layer in (False, True)
        }
        for i, (numel, shared, again) in enumerate(zip(own.blocks, own.shared, own.again, strict=True)):
            size = sizes[is_layer[i]]
            in_copies = size.copy > 0 and not size.is_kept
            comes = size.copy if in_copies else size.made
            # What is summed in the compute dtype is part of what the first block that has it makes whole.
            making[i] += size.making * numel + comes * again + (0.0 if in_copies else comes * shared)
            made[i] += size.made * numel
            waiting[i] += comes * again
            joined[i] += comes * shared
            if size.is_kept:
                kept_copies += size.copy * numel
            else:
                copies[i] += size.copy * numel
            whole += size.whole * numel
            reducing += size.reducing * numel
    blocks = tuple(
        BackwardBlock(
            held=held[i], beside=most if is_layer[i] else beside[i], copy=copies[i], making=making[i], made=made[i],
            waiting=waiting[i], joined=joined[i],
        ) for i in range(number)
    )
    before = Moment(copies=kept_copies + sum(copies), activations=kept + sum(held))
    most_of_all = max(backward_moments(blocks, kept), key=lambda moment: moment.total).with_(
        Moment(copies=kept_copies)
    )
    after, ending = Moment(gradients=whole), Moment(gradients=whole, buffers=reducing - whole)
    return SingleBackward(
        always=replace(static, parameters=static.parameters - before.copies, gradients=0.0, buffers=buffers),
        before=before, peak=max(most_of_all, ending, key=lambda moment: moment.total), after=after, blocks=blocks,
        kept_copies=kept_copies, ending=ending,
    )
