"""Runs a rank's list of pipeline actions: computations of its stages, with sends and receives between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.plan.actions import COMPUTE, Action, ActionKind
from autopar.runtime.compute_copies import ComputeCopies
from autopar.runtime.data_parallel import end_evaluation, finish_gradients, prepare_backward
from autopar.runtime.recording import REDUCE, WAIT_BACKWARD, WAIT_FORWARD, Recorder
from autopar.runtime.regions import Crossing, Piece
from autopar.runtime.replicas import Replicas
from autopar.runtime.split_backward import Pending, backward_input, backward_weight
from autopar.runtime.stage_module import StageModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """A boundary as this rank sees it from one side; each direction has a process group of its own.

    The groups are None where the same rank is on both sides.
    """

    crossings: tuple[Crossing, ...]
    activations: dist.ProcessGroup | None
    gradients: dist.ProcessGroup | None

    @property
    def is_local(self) -> bool:
        return self.activations is None


@dataclass(slots=True, kw_only=True)
class LocalStage:
    """One of this rank's stages. `before` and `after` are None at the ends of the pipeline.

    `splits`: its backward has two parts, I and W.
    """

    index: int
    module: StageModule
    zero: int
    inputs: tuple[str, ...]  # the batch tensors that it needs
    before: Channel | None
    after: Channel | None
    loss: str | None  # the name of the loss where this stage computes it
    splits: bool = False
    replicas: Replicas | None = None
    copies: ComputeCopies | None = None

    def prepare_backward(self, *, is_last: bool, defers: bool = False) -> None:
        """Say what the next backward is; see `data_parallel.prepare_backward`."""
        prepare_backward(self.module, self.zero, is_last=is_last, defers=defers)
        if self.replicas is not None:
            self.replicas.overlaps = is_last and not defers
        if self.copies is not None:
            self.copies.ends = is_last and not defers

    def finish_gradients(self, *, is_last: bool) -> None:
        """Reduce what backwards outside FSDP2's hooks left whole."""
        finish_gradients(self.module, self.zero, is_last=is_last)
        self.collect(is_last=is_last)
        if self.replicas is not None and is_last:
            self.replicas.launch()

    def collect(self, *, is_last: bool) -> None:
        """Add the gradients of copies to the parameters': the next backward's are not added to them in their dtype."""
        if self.copies is not None:
            self.copies.collect(is_last=is_last)

    def weights(self) -> list[Tensor]:
        """What gathers gradients: the parameters as FSDP2 has them now, or their copies in the compute dtype."""
        params: list[Tensor] = [param for param in self.module.parameters() if param.requires_grad]
        if self.copies is None:
            return params
        return [*self.copies.trained(), *(param for param in params if param not in self.copies.unit_of)]

    def end_step(self) -> None:
        """Every backward has run: what was kept for them goes, and what is still to be added up is."""
        if self.copies is not None:
            self.copies.end()


@dataclass(slots=True)
class _InFlight:
    received: dict[str, Tensor]
    produced: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    pending: Pending | None = None


@dataclass(slots=True)
class _Arriving:
    """Tensors on their way to this rank."""

    values: dict[str, Tensor]
    works: list[tuple[dist.Work, Tensor, Tensor | None, Piece]]  # what is received, and where it goes if elsewhere

    def wait(self) -> dict[str, Tensor]:
        for work, received, target, piece in self.works:
            work.wait()
            if target is not None:
                part = target[piece.part]
                part.add_(received) if piece.adds else part.copy_(received)
        return self.values


_Key = tuple[ActionKind, int, int]
FORWARD, BACKWARD, INPUT, WEIGHT = (
    ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD, ActionKind.WEIGHT_BACKWARD
)


class Executor:
    """Runs one step's actions over this rank's stages.

    `actions` are those of `autopar.plan.actions`, checked, with sends and receives where other ranks are concerned.
    """

    def __init__(self, stages: Sequence[LocalStage], actions: Sequence[Action], device: torch.device) -> None:
        self.stages = {stage.index: stage for stage in stages}
        self.actions = tuple(actions)
        self.device = device
        # What ends the step's gradients of a stage: its last weight gradients, or the reduction that the list asks for.
        self._ending: dict[int, Action] = {}
        for a in actions:
            asked = a.kind is ActionKind.REDUCE and self.stages[a.stage].zero < 2  # others reduce at every backward
            if asked or a.kind in (BACKWARD, INPUT, WEIGHT):
                self._ending[a.stage] = a
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self._arriving: dict[_Key, _Arriving] = {}
        self._leaving: dict[_Key, dict[str, Tensor]] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self.recorder: Recorder | None = None

    def run(
        self, batches: Sequence[Mapping[str, Tensor]], factors: Mapping[str, Tensor],
        observe: Callable[[Action], None] | None = None,
    ) -> Tensor:
        """The sum of the losses that this rank computed over its micro-batches, as float64 (0 on other stages).

        Gradients are added to the parameters. `observe` is called before each computation.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for action in self.actions:
            if observe is not None and action.kind in COMPUTE:
                observe(action)
            stage, i = self.stages[action.stage], action.micro_batch
            match action.kind:
                case ActionKind.FORWARD:
                    with self._recorded(action.kind, action.stage, i):
                        loss = self._forward(stage, i, batches[i], factors)
                    if loss is not None:
                        total += loss
                case ActionKind.BACKWARD | ActionKind.INPUT_BACKWARD | ActionKind.WEIGHT_BACKWARD:
                    with self._recorded(action.kind, action.stage, i):
                        self._backward(stage, action)
                case ActionKind.RECEIVE_FORWARD:
                    self._receive(action, stage.before, gradients=False)
                case ActionKind.RECEIVE_BACKWARD:
                    self._receive(action, stage.after, gradients=True)
                case ActionKind.SEND_FORWARD:
                    self._send(action, stage.after, gradients=False)
                case ActionKind.SEND_BACKWARD:
                    self._send(action, stage.before, gradients=True)
                case ActionKind.REDUCE:
                    if self._ending[stage.index] == action:
                        with self._recorded(REDUCE, action.stage, -1):
                            stage.finish_gradients(is_last=True)
                case ActionKind.UNSHARD | ActionKind.RESHARD:
                    pass  # FSDP2 gathers and drops by itself
        self._end()
        for one in self.stages.values():
            one.end_step()
            if one.replicas is not None:
                with self._recorded(REDUCE, one.index, -1):
                    one.replicas.finish()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Mapping[str, Tensor]], factors: Mapping[str, Tensor]) -> Tensor:
        """The same sum of losses by forwards alone, in the order that the actions have them in."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for action in self.actions:
            stage, i = self.stages[action.stage], action.micro_batch
            match action.kind:
                case ActionKind.FORWARD:
                    loss = self._forward(stage, i, batches[i], factors)
                    if loss is not None:
                        total += loss
                case ActionKind.RECEIVE_FORWARD:
                    self._receive(action, stage.before, gradients=False)
                case ActionKind.SEND_FORWARD:
                    self._send(action, stage.after, gradients=False)
        self._end()
        for stage in self.stages.values():
            stage.end_step()
            end_evaluation(stage.module)
        return total

    def _end(self) -> None:
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        assert not (self._in_flight or self._arriving or self._leaving), "actions left something undone"

    def _recorded(self, kind: str, stage: int, micro_batch: int) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.span(str(kind), stage, micro_batch)

    # -- computations

    def _forward(
        self, stage: LocalStage, micro_batch: int, batch: Mapping[str, Tensor], factors: Mapping[str, Tensor]
    ) -> Tensor | None:
        values = {name: batch[name] for name in stage.inputs}
        received: dict[str, Tensor] = {}
        if stage.before is not None:
            received = self._arrived(stage.before, ActionKind.RECEIVE_FORWARD, stage.index, micro_batch)
            for crossing in stage.before.crossings if torch.is_grad_enabled() else ():
                received[crossing.name].requires_grad_(crossing.requires_grad)
        produced = stage.module({**values, **received}, factors)
        if stage.splits:  # torch's split backward detaches its roots in place: no view bears that, and nothing saved
            produced = {name: value.clone() if value.requires_grad else value for name, value in produced.items()}
        if stage.after is not None:
            both = {**received, **produced}
            leaving = {crossing.name: both[crossing.name].detach() for crossing in stage.after.crossings}
            self._leave(stage.after, ActionKind.SEND_FORWARD, stage.index, micro_batch, leaving)
        if torch.is_grad_enabled():
            self._in_flight[stage.index, micro_batch] = _InFlight(received, produced)
        return produced[stage.loss].detach() if stage.loss is not None else None

    def _backward(self, stage: LocalStage, action: Action) -> None:
        key = stage.index, action.micro_batch
        ends = self._ending[stage.index] == action
        if action.kind is WEIGHT:
            self._weight_backward(stage, self._in_flight.pop(key), ends=ends)
            return
        kept = self._in_flight[key]
        kept.gradients = self._gradients(stage, action.micro_batch, kept)
        roots = [name for name, value in kept.produced.items() if value.requires_grad]
        if action.kind is BACKWARD:
            del self._in_flight[key]
            stage.prepare_backward(is_last=ends)
            torch.autograd.backward([kept.produced[n] for n in roots], [kept.gradients[n] for n in roots])
            stage.collect(is_last=ends)
        else:
            stage.prepare_backward(is_last=False, defers=True)
            differentiable = [value for value in kept.received.values() if value.requires_grad]
            kept.pending = backward_input(
                [kept.produced[n] for n in roots], [kept.gradients[n] for n in roots], differentiable, stage.weights()
            )
        if stage.before is not None:
            self._leave(
                stage.before, ActionKind.SEND_BACKWARD, stage.index, action.micro_batch,
                self._input_gradients(stage.before, kept),
            )
        if kept.pending is not None:  # nothing but what W needs is kept
            kept.received, kept.produced, kept.gradients = {}, {}, {}

    def _weight_backward(self, stage: LocalStage, kept: _InFlight, *, ends: bool) -> None:
        assert kept.pending is not None
        backward_weight(stage.weights(), kept.pending)
        if ends or stage.zero >= 2:
            stage.finish_gradients(is_last=ends)
        else:
            stage.collect(is_last=False)

    def _gradients(self, stage: LocalStage, micro_batch: int, kept: _InFlight) -> dict[str, Tensor]:
        """The gradients of what the stage produced."""
        gradients: dict[str, Tensor] = {}
        if stage.after is not None:
            gradients = self._arrived(stage.after, ActionKind.RECEIVE_BACKWARD, stage.index, micro_batch)
        if stage.loss is not None:
            gradients[stage.loss] = torch.ones_like(kept.produced[stage.loss])
        return gradients

    def _input_gradients(self, before: Channel, kept: _InFlight) -> dict[str, Tensor]:
        found = {}
        for crossing in before.crossings:
            if crossing.requires_grad:
                received = kept.received[crossing.name]
                passed = kept.gradients.get(crossing.name)  # the tensor also went on to the next stage
                parts = [part for part in (received.grad, passed) if part is not None]
                found[crossing.name] = sum(parts[1:], parts[0]) if parts else torch.zeros_like(received)
        return found

    # -- what passes between stages

    def _arrived(self, channel: Channel, kind: ActionKind, stage: int, micro_batch: int) -> dict[str, Tensor]:
        if channel.is_local:
            sent, neighbour = (
                (ActionKind.SEND_FORWARD, stage - 1) if kind is ActionKind.RECEIVE_FORWARD
                else (ActionKind.SEND_BACKWARD, stage + 1)
            )
            return self._leaving.pop((sent, neighbour, micro_batch))
        waits = WAIT_FORWARD if kind is ActionKind.RECEIVE_FORWARD else WAIT_BACKWARD
        with self._recorded(waits, stage, micro_batch):
            return self._arriving.pop((kind, stage, micro_batch)).wait()

    def _leave(
        self, channel: Channel, kind: ActionKind, stage: int, micro_batch: int, values: dict[str, Tensor]
    ) -> None:
        if channel.is_local and kind is ActionKind.SEND_FORWARD:  # a leaf of the next stage's own
            values = {name: value.detach() for name, value in values.items()}
        self._leaving[kind, stage, micro_batch] = values

    def _receive(self, action: Action, channel: Channel | None, *, gradients: bool) -> None:
        """Post the receives of one micro-batch; the computation that needs it waits for them."""
        assert channel is not None
        values: dict[str, Tensor] = {}
        works: list[tuple[dist.Work, Tensor, Tensor | None, Piece]] = []
        group = channel.gradients if gradients else channel.activations
        for crossing in channel.crossings:
            if gradients and not crossing.requires_grad:
                continue
            dtype = getattr(torch, crossing.dtype)
            pieces = crossing.gradients if gradients else crossing.activations
            is_whole = len(pieces) == 1 and pieces[0].shape == crossing.shape
            made = torch.empty if is_whole or (not any(piece.adds for piece in pieces) and pieces) else torch.zeros
            values[crossing.name] = made(crossing.shape, dtype=dtype, device=self.device)
            for piece in pieces:
                whole = values[crossing.name]
                received = whole if is_whole else torch.empty(piece.shape, dtype=dtype, device=self.device)
                work = dist.irecv(received, piece.peer, group=group)
                assert work is not None
                works.append((work, received, None if is_whole else whole, piece))
        self._arriving[action.kind, action.stage, action.micro_batch] = _Arriving(values, works)

    def _send(self, action: Action, channel: Channel | None, *, gradients: bool) -> None:
        assert channel is not None
        values = self._leaving.pop((action.kind, action.stage, action.micro_batch))
        group = channel.gradients if gradients else channel.activations
        self._sending = [(work, value) for work, value in self._sending if not work.is_completed()]
        for crossing in channel.crossings:
            for piece in crossing.gradients if gradients else crossing.activations:
                part = values[crossing.name][piece.part].contiguous()
                work = dist.isend(part, piece.peer, group=group)
                assert work is not None
                self._sending.append((work, part))
