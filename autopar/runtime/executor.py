"""Runs a rank's list of pipeline actions: forwards and backwards of its stages, with sends and receives between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import InputError
from autopar.runtime.data_parallel import prepare_backward
from autopar.runtime.stage import StageModule
from autopar.simulate.schedules import Action, ActionKind, ActionLists, check_actions


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A tensor that passes a stage boundary: its local shape, and whether a gradient comes back."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """Both directions between this rank and one rank of a neighbour stage, each on its own process group."""

    peer: int
    activations: dist.ProcessGroup
    gradients: dist.ProcessGroup
    wires: tuple[Wire, ...]


@dataclass(slots=True, kw_only=True)
class LocalStage:
    """One of this rank's stages. `before` and `after` are None at the ends of the pipeline."""

    index: int
    module: StageModule
    zero: int
    inputs: tuple[str, ...]  # the batch tensors that it needs
    before: Channel | None
    after: Channel | None
    loss: str | None  # the name of the loss where this stage computes it


@dataclass(slots=True)
class _InFlight:
    received: dict[str, Tensor]
    produced: dict[str, Tensor]


def check_channels(lists: ActionLists, num_stages: int, num_micro_batches: int) -> None:
    """InputError for lists that would deadlock or mix up micro-batches.

    Each direction of each boundary is a channel of its own that delivers in order: both ends must take the
    micro-batches in one order, and with every receive blocking something must always be able to run.
    """
    check_actions(lists, num_stages, num_micro_batches)
    flat = [action for actions in lists for action in actions]
    for kind, word in ((ActionKind.FORWARD, "forward"), (ActionKind.BACKWARD, "backward")):
        order = [[a.micro_batch for a in flat if a.stage == stage and a.kind is kind] for stage in range(num_stages)]
        for stage in range(num_stages - 1):
            if order[stage] != order[stage + 1]:
                raise InputError(
                    f"the schedule takes {word} micro-batches in the order {order[stage]} on stage {stage} and "
                    f"{order[stage + 1]} on stage {stage + 1}; a channel delivers in one order"
                )


class Executor:
    """Runs one step's actions over this rank's stages."""

    def __init__(self, stages: Sequence[LocalStage], actions: Sequence[Action], device: torch.device) -> None:
        assert all(action.kind in (ActionKind.FORWARD, ActionKind.BACKWARD) for action in actions)
        self.stages = {stage.index: stage for stage in stages}
        self.actions = tuple(actions)
        self.device = device
        self._last_backward = {action.stage: action for action in actions if action.kind is ActionKind.BACKWARD}
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def run(
        self, batches: Sequence[Mapping[str, Tensor]], factors: Mapping[str, Tensor],
        observe: Callable[[Action], None] | None = None,
    ) -> Tensor:
        """The sum of the losses that this rank computed over its micro-batches, as float64 (0 on other stages).

        Gradients are added to the parameters. `observe` is called before each action.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for action in self.actions:
            if observe is not None:
                observe(action)
            stage = self.stages[action.stage]
            if action.kind is ActionKind.FORWARD:
                loss = self._forward(stage, action.micro_batch, batches[action.micro_batch], factors)
                if loss is not None:
                    total += loss
            else:
                self._backward(stage, action.micro_batch, is_last=self._last_backward[stage.index] == action)
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        assert not self._in_flight, "a micro-batch had no backward"
        return total

    def _forward(
        self, stage: LocalStage, micro_batch: int, batch: Mapping[str, Tensor], factors: Mapping[str, Tensor]
    ) -> Tensor | None:
        values = {name: batch[name] for name in stage.inputs}
        received: dict[str, Tensor] = {}
        if stage.before is not None:
            received = self._receive(stage.before.wires, stage.before, stage.before.activations)
            for wire in stage.before.wires:
                received[wire.name].requires_grad_(wire.requires_grad)
        produced = stage.module({**values, **received}, factors)
        if stage.after is not None:
            both = {**received, **produced}
            self._send([both[wire.name].detach() for wire in stage.after.wires], stage.after, stage.after.activations)
        self._in_flight[stage.index, micro_batch] = _InFlight(received, produced)
        return produced[stage.loss].detach() if stage.loss is not None else None

    def _backward(self, stage: LocalStage, micro_batch: int, *, is_last: bool) -> None:
        kept = self._in_flight.pop((stage.index, micro_batch))
        gradients: dict[str, Tensor] = {}
        if stage.after is not None:
            wires = [wire for wire in stage.after.wires if wire.requires_grad]
            gradients = self._receive(wires, stage.after, stage.after.gradients)
        roots = [name for name, value in kept.produced.items() if value.requires_grad]
        if stage.loss is not None:
            gradients[stage.loss] = torch.ones_like(kept.produced[stage.loss])
        prepare_backward(stage.module, stage.zero, is_last=is_last)
        torch.autograd.backward([kept.produced[name] for name in roots], [gradients[name] for name in roots])
        if stage.before is not None:
            back = []
            for wire in stage.before.wires:
                if wire.requires_grad:
                    grad = kept.received[wire.name].grad
                    passed = gradients.get(wire.name)  # the tensor also went on to the next stage
                    parts = [part for part in (grad, passed) if part is not None]
                    back.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(kept.received[wire.name]))
            self._send(back, stage.before, stage.before.gradients)

    def _receive(self, wires: Sequence[Wire], channel: Channel, group: dist.ProcessGroup) -> dict[str, Tensor]:
        found = {wire.name: torch.empty(wire.shape, dtype=wire.dtype, device=self.device) for wire in wires}
        works = [dist.irecv(value, channel.peer, group=group) for value in found.values()]
        for work in works:
            assert work is not None
            work.wait()
        return found

    def _send(self, values: Sequence[Tensor], channel: Channel, group: dist.ProcessGroup) -> None:
        self._sending = [(work, value) for work, value in self._sending if not work.is_completed()]
        for value in values:
            kept = value.contiguous()
            work = dist.isend(kept, channel.peer, group=group)
            assert work is not None
            self._sending.append((work, kept))
