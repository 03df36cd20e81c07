"""The Trainer: one rank's part of a plan, as a training step."""

from __future__ import annotations

import atexit
import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import InputError, NotFiniteError, PlanMismatchError
from autopar.gloo import one_worker_thread
from autopar.graph.autocast import as_captured
from autopar.graph.capture import Captured
from autopar.graph.model_graph import ModelGraph
from autopar.graph.rows import at_rows
from autopar.plan.actions import Action, ActionKind, ActionLists, check_actions, with_communication
from autopar.plan.file import plan_to_json
from autopar.plan.plan import Plan
from autopar.plan.verify import verify_plan
from autopar.runtime import checkpoint
from autopar.runtime.batch import BatchReader
from autopar.runtime.clipping import clip_gradients
from autopar.runtime.compute_copies import ComputeCopies
from autopar.runtime.data_parallel import local_tensor, shard_stage
from autopar.runtime.executor import Channel, Executor, LocalStage
from autopar.runtime.first_parameters import FirstParameters, from_first
from autopar.runtime.fused_step import prefer_fused
from autopar.runtime.groups import check_runnable, make_groups, needs_data_mesh, place_of
from autopar.runtime.layout import parameter_layout
from autopar.runtime.loss import Term, loss_terms
from autopar.runtime.metrics import StepLog
from autopar.runtime.optimizer_offload import OffloadedState
from autopar.runtime.optimizers import OptimizerFactory, made_optimizer, needs_whole
from autopar.runtime.recording import OPTIMIZER, REDUCE, Recorder, write_trace
from autopar.runtime.regions import crossings
from autopar.runtime.replicas import Replicas
from autopar.runtime.stage import StageBuilder
from autopar.runtime.step_checks import StepChecks
from autopar.runtime.target_counts import row_counter
from autopar.runtime.tied import Copy, sum_in_place, sum_tied, ties_of
from autopar.runtime.watch import Watch
from autopar.runtime.weights import WeightFiles
from autopar.runtime.whole_steps import WholeSteps
from autopar.sharding.coupled_rows import coupled_rows
from autopar.sharding.rewrites import rewritten
from autopar.sharding.state import RP
from autopar.simulate.schedules import plan_actions
from autopar.simulate.splitting import as_run, unsplit_reason

log = logging.getLogger(__name__)

Batch = Mapping[str, Any] | Sequence[Any]  # tensors, and the plain values that the model was captured with


class Trainer:
    """Trains a model under a plan. Every rank makes one, with the same model and plan, and calls the same methods.

    `step(batch)` takes the global batch and returns the global loss; `plan` is the plan; `module` holds this rank's
    parameters under the model's own names (the modules of its stages); `save` and `load` keep the whole state.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, captured: Captured, optimizer: OptimizerFactory, *,
        device: torch.device | str = "cpu", timeout_s: float = 1800.0, same_weights: bool = True,
        weights: str | Path | None = None, stop_on_nan: bool = False, log_every: int = 0,
        peak_flops: float | None = None,
    ) -> None:
        """Compile the plan for this rank.

        `captured` is the model with tagged rows, or at `plan.micro_batch` rows. `same_weights` sends rank 0's
        parameters to all ranks first; `weights` are safetensors files to read them from instead, and the model may
        have none. `stop_on_nan`: a step whose loss is not finite raises NotFiniteError on every rank, before the
        optimizer steps. `log_every`: rank 0 logs metrics every so many steps, MFU against `peak_flops` a second of
        all devices.
        The global random generator is seeded: alike on the ranks of a tensor axis, differently elsewhere.
        """
        self.plan, self.device = plan, torch.device(device)
        timeout = timedelta(seconds=timeout_s)
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_runnable(plan, world)
        verify_plan(plan, captured.graph)
        if captured.own_gradients:
            raise InputError(f"{captured.graph.name}: a planned step would lose what the model does to gradients: "
                             f"{'; '.join(captured.own_gradients[:2])}")
        place = place_of(plan, dist.get_rank() if dist.is_initialized() else 0)
        self.rows = plan.rows_of(plan.stages[place.stages[0]])[place.data_rank]
        self.graph = graph = rewritten(at_rows(captured.graph, self.rows), plan.rewrites)
        self.tagged = tagged = rewritten(captured.graph, plan.rewrites)
        planned = plan_actions(plan)
        check_actions(planned, plan.num_stages, plan.num_micro_batches)
        lists = with_communication(as_run(graph, plan, planned), plan.num_stages)
        check_actions(lists, plan.num_stages, plan.num_micro_batches)
        self._owns_group = False
        if not dist.is_initialized() and any(needs_data_mesh(stage) for stage in plan.stages):
            self._open_lone_group(timeout)
        self.layout = parameter_layout(graph, plan, (name for name, _ in model.named_modules()))
        self.ties = ties_of(self.layout, plan)
        with one_worker_thread():
            self.groups = make_groups(plan, self.ties.by_lane, self.ties.whole, self.device, timeout)
        num_parts = plan.num_micro_batches * plan.stages[-1].mesh.dp
        self.terms = loss_terms(graph, tagged, num_parts=num_parts)
        if num_parts > 1 and (problem := coupled_rows(captured.graph)):
            raise InputError(f"{captured.graph.name}: the plan computes the batch in {num_parts} parts, and {problem}")
        self.notes = tuple(dict.fromkeys(
            (*plan.notes, *graph.notes, *self.layout.notes, *self.terms.notes, *self._unsplit(planned))
        ))
        self.batch, self.own_evaluation = BatchReader(captured.graph, plan), captured.own_evaluation
        self.autocast = captured.autocast
        self.watch = self._meet()
        self._seed()
        persistent = frozenset(model.state_dict(keep_vars=True))
        files = WeightFiles(weights) if weights is not None else None
        sent = same_weights and world > 1
        first = FirstParameters(
            graph=graph, plan=plan, layout=self.layout, groups=self.groups, device=self.device,
        )
        params = first.unwritten(model) if files else first.of_model(model, sent=sent)
        constants = {
            name: from_first(value, self.device) if sent and name in persistent else value.detach().to(self.device)
            for name, value in captured.constants.items()
        }
        builder = StageBuilder(
            graph, tagged, plan, self.layout, self.terms, self.groups.axes, self.device,
            self.groups.expert_axis,
        )
        splitting = {a.stage for actions in lists for a in actions if a.kind is ActionKind.INPUT_BACKWARD}
        self.stages = tuple(
            self._local_stage(index, builder, params[index], constants, persistent, splits=index in splitting)
            for index in place.stages
        )
        del params
        if files is not None:
            first.read(files, checkpoint.own_parameters(self), (stage.module for stage in self.stages))
        known = {name for param in self.layout.params for name in param.names} | {info.name for info in graph.buffers}
        self.extra_state = {
            name: value.detach().clone() for name, value in model.state_dict().items() if name not in known
        }
        self.modules = {stage.index: stage.module for stage in self.stages}
        tied = any(len(param.stages) > 1 for param in self.layout.params)
        self._leaves_partial = tied or self.groups.tensor is not None
        mine = [action for actions in lists for action in actions if action.stage in self.modules]
        self.executor = Executor(self.stages, mine, self.device)
        counts_here = bool(self.terms.counted) and any(stage.loss for stage in self.stages)
        self._count = row_counter(self.terms, graph, builder.run_ops, constants) if counts_here else None
        self.optimizer = made_optimizer(optimizer, list(self.named_parameters().values()), self.device)
        if self.device.type == "cuda":  # as the memory of a plan is counted
            prefer_fused(self.optimizer)
        own = {id(param) for param in self.named_parameters().values()}
        if unknown := [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in own]:
            raise InputError(f"the optimizer holds {len(unknown)} tensors that are not the parameters it was given")
        self.whole_steps = None
        if needs_whole(self.optimizer, plan, self.layout):
            parts = [(param, value) for _, param, value in checkpoint.own_parameters(self)]
            self.whole_steps = WholeSteps(self.optimizer, parts, self.groups)
        self.stop_on_nan, self.num_steps = stop_on_nan, 0
        self.metrics = StepLog(captured.graph, plan, self.device, every=log_every, peak_flops=peak_flops)
        units = self._offloaded_units()
        self.offloaded_state = OffloadedState(self.optimizer, units) if units else None
        self.checks = StepChecks(
            self.named_parameters(), self.optimizer, steps_itself=bool(self.whole_steps or self.offloaded_state)
        )

    # -- what users call

    @property
    def module(self) -> nn.Module:
        """This rank's parameters under the model's own names: the stage's module, or a list of them."""
        modules = list(self.modules.values())
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    def step(self, batch: Batch, observe: Callable[[Action], None] | None = None) -> Tensor:
        """Train on the global batch (the same on every rank) and return its loss, equal on every rank."""
        total, summing = self._backward(batch, observe)
        if self.stop_on_nan:
            self._loss(total, summing)
        self.optimizer_step()  # a rank that is done with its gradients need not wait here for the others'
        loss = self._loss(total, summing)
        self.metrics.after(self.num_steps, loss)
        return loss

    def optimizer_step(self) -> None:
        """Step the optimizer with the gradients that are there."""
        self.num_steps += 1
        with self._recorded(OPTIMIZER), self.checks.own_step():
            if self.whole_steps is not None:
                self.whole_steps.step()
            elif self.offloaded_state is not None:
                self.offloaded_state.step()
            else:
                self.optimizer.step()

    def forward_backward(self, batch: Batch, observe: Callable[[Action], None] | None = None) -> Tensor:
        """The loss of the global batch; gradients, reduced over all ranks, are left in the parameters.

        They take the place of those before: a step's rows are one batch, which the plan cuts into micro-batches.
        """
        return self._loss(*self._backward(batch, observe))

    def _backward(
        self, batch: Batch, observe: Callable[[Action], None] | None
    ) -> tuple[Tensor, dist.Work | None]:
        """Computes all gradients, and begins to sum the loss over ranks."""
        if self.executor.recorder is not None:
            self.executor.recorder.begin_step()
        self.checks.before_backward()
        self.optimizer.zero_grad(set_to_none=True)
        place = self.groups.place
        self.watch.step = self.num_steps + 1
        with as_captured(self.autocast), self.watch.names_failures():
            if self.watch.size > 1:
                self.checks.same_batch(batch, "step")
            rows = self.batch.micro_batches(batch, self.plan.stages[place.stages[0]], place.data_rank, self.device)
            total = self.executor.run(rows, self._factors(rows), observe)
            with self._recorded(REDUCE):
                self._reduce_gradients()
            self.checks.after_backward()
            return self._sum_loss(total)

    def _loss(self, total: Tensor, summing: dist.Work | None) -> Tensor:
        """The loss of a training step, whose sum has begun."""
        with self.watch.names_failures():
            loss = self._global_loss(total, summing)
        if self.stop_on_nan and not torch.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss.item()} in step {self.num_steps + 1}; the optimizer has not stepped with it: go on "
                "from a checkpoint with a lower learning rate, or clip gradients"
            )
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of a global batch as a model in evaluation has it, without gradients; equal on every rank.

        Nothing is dropped out, batch norms use their running statistics, and no state changes. InputError for a model
        whose own code computes otherwise in evaluation, by `if self.training`.
        """
        if self.own_evaluation:
            lines = ", ".join(self.own_evaluation[:2]) + (", ..." if len(self.own_evaluation) > 2 else "")
            raise InputError(
                f"{self.graph.name}: its own code computes otherwise in evaluation ({lines}), and the plan runs what "
                "it does in training: load trainer.full_state_dict() into the plain model and evaluate that"
            )
        place = self.groups.place
        devices = [self.device] if self.device.type == "cuda" else []
        recorder, self.executor.recorder = self.executor.recorder, None  # a trace is of training steps alone
        try:
            # What is random in training draws, and drops nothing.
            with as_captured(self.autocast), self.watch.names_failures(), torch.random.fork_rng(devices=devices):
                if self.watch.size > 1:
                    self.checks.same_batch(batch, "evaluate")
                rows = self.batch.micro_batches(batch, self.plan.stages[place.stages[0]], place.data_rank, self.device)
                return self._global_loss(*self._sum_loss(self.executor.evaluate(rows, self._factors(rows))))
        finally:
            self.executor.recorder = recorder

    def _sum_loss(self, total: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begins to sum over all ranks what each computed of the loss, once for each part of the batch."""
        place = self.groups.place
        if place.tensor_rank != 0 or place.context_rank != 0:
            total = torch.zeros_like(total)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return total, None
        return total, dist.all_reduce(total, async_op=True)

    def _global_loss(self, total: Tensor, summing: dist.Work | None) -> Tensor:
        if summing is not None:
            summing.wait()
        return total.to(getattr(torch, self.terms.cls.tensor[self._loss_name()].dtype))

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Record the steps inside the `with` block, on all ranks; at its end rank 0 writes a Chrome trace to `path`.

        `autopar viz PLAN --live PATH` lays it over the prediction. Each recorded step starts at a barrier.
        """
        recorder = self.executor.recorder = Recorder(self.device)
        try:
            yield
        finally:
            self.executor.recorder = None
        write_trace(recorder, self.plan, path, optimizer=type(self.optimizer).__name__)

    def _recorded(self, kind: str) -> AbstractContextManager[None]:
        recorder = self.executor.recorder
        return nullcontext() if recorder is None else recorder.span(kind, self.stages[0].index)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """The norm of all gradients of the model; they are scaled down to `max_norm` where it is larger.

        Between `forward_backward` and `optimizer_step`, on all ranks.
        """
        with self.watch.names_failures():
            return clip_gradients(self, max_norm)

    def save(self, directory: str | Path) -> None:
        """Write parameters, buffers and optimizer state as full tensors under the model's own names."""
        with self.watch.names_failures():
            checkpoint.save(self, Path(directory))

    def load(self, directory: str | Path) -> None:
        """Read what any plan of the same model saved."""
        with self.watch.names_failures():
            checkpoint.load(self, Path(directory))

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's whole state dict, on the CPU of rank 0; empty elsewhere. All ranks must call it."""
        return checkpoint.gather_to_first(checkpoint.full_parameters(self))

    def full_gradients(self) -> dict[str, Tensor]:
        """Every parameter's whole gradient by name, on the CPU of rank 0; empty elsewhere. All ranks must call it."""
        return checkpoint.gather_to_first(checkpoint.full_gradients(self))

    def close(self) -> None:
        """Destroy the process group if the trainer made it."""
        self.watch.close()
        self.checks.given = None
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_group = False

    # -- parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, tied ones once, under the first of their names; stages in order."""
        found: dict[str, nn.Parameter] = {}
        for stage in self.stages:
            own = dict(stage.module.named_parameters(remove_duplicate=False))
            for param in self.layout.of_stage(stage.index):
                name = param.name if param.name not in found else f"{param.name}@{stage.index}"
                found[name] = own[param.name]
        return found

    def _offloaded_units(self) -> list[list[nn.Parameter]]:
        """The parameters whose optimizer state the plan keeps in host memory, by the blocks that they belong to."""
        units: dict[tuple[int, str], list[nn.Parameter]] = {}
        taken: set[int] = set()
        stepped = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        for stage, param, parameter in checkpoint.own_parameters(self):
            if not self.plan.stages[stage].offload_optimizer or id(parameter) in taken or id(parameter) not in stepped:
                continue
            taken.add(id(parameter))
            units.setdefault((stage, param.unit), []).append(parameter)
        return list(units.values())

    def _meet(self) -> Watch:
        """The watch over all ranks, once they have found that they run one plan."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            own = hashlib.sha256(plan_to_json(self.plan).encode()).hexdigest()
            found: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(found, own)
            if other := [rank for rank, text in enumerate(found) if text != found[0]]:
                raise PlanMismatchError(
                    f"rank {other[0]} has another plan than rank 0; give every rank the same plan, or its file"
                )
        return Watch()

    def _seed(self) -> None:
        seed = torch.tensor([torch.initial_seed() % 2**62], dtype=torch.int64, device=self.device)
        place = self.groups.place
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(seed, src=0)
            coordinate = place.data_rank * self.plan.num_stages + place.stages[0]
            torch.manual_seed(int(seed) + 1_000_003 * coordinate)

    # -- building

    def _open_lone_group(self, timeout: timedelta) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined] # torch does not list it as its own
        with one_worker_thread():
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        self._owns_group = True
        atexit.register(_close_if_alive, weakref.ref(self))

    def _local_stage(
        self, index: int, builder: StageBuilder, params: Mapping[str, nn.Parameter], constants: Mapping[str, Tensor],
        persistent: frozenset[str], *, splits: bool,
    ) -> LocalStage:
        plan, graph, stage = self.plan, self.graph, self.plan.stages[index]
        module = builder.stage(index, params, constants, persistent)
        if self.groups.data_mesh is not None:
            shard_stage(
                module, self.layout.units, self.groups.data_mesh, zero=stage.zero,
                dtype=getattr(torch, plan.dtype), param_dtype=getattr(torch, plan.param_dtype),
                expert_mesh=self.groups.expert_mesh,
            )
        replicas = copies = None
        if self.groups.replicas is not None:
            named = dict(module.named_parameters(remove_duplicate=False))
            own = {
                named[param.name]: self.groups.expert_replicas for param in self.layout.of_stage(index)
                if param.by_experts
            }
            replicas = Replicas(dict.fromkeys(module.parameters()), self.groups.replicas, own)
        if self.groups.data_mesh is None and plan.dtype != plan.param_dtype:
            blocks = module._autopar_blocks  # no name that a model may have
            copies = ComputeCopies(
                [block._autopar_own_parameters() for block in blocks], getattr(torch, plan.dtype),
                replicas.accumulated if replicas is not None else None,
            )
            for block, first in zip(blocks, copies.first_in, strict=True):
                block._autopar_compute_with(copies, first)
        if plan.compile and self.groups.data_mesh is None and self.groups.replicas is None:
            # FSDP2 works between blocks; sums over replicas begin while the backward goes on.
            module._autopar_compile_together()
        wanted = _batch_names(graph, plan, index)
        last = index == plan.num_stages - 1
        return LocalStage(
            index=index, module=module, zero=stage.zero, inputs=wanted,
            before=self._channel(index - 1) if index else None, after=None if last else self._channel(index),
            loss=graph.loss if graph.loss in module._autopar_leaving else None,
            splits=splits, replicas=replicas, copies=copies,
        )

    def _channel(self, boundary: int) -> Channel:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return Channel(
            crossings=crossings(self.tagged, self.plan, boundary, rank),
            activations=self.groups.forward.get(boundary), gradients=self.groups.backward.get(boundary),
        )

    def _unsplit(self, lists: ActionLists) -> list[str]:
        """What of the schedule's split backwards runs whole, and why."""
        stages = sorted({a.stage for actions in lists for a in actions if a.kind is ActionKind.INPUT_BACKWARD})
        reasons = {index: unsplit_reason(self.graph, self.plan, self.plan.stages[index]) for index in stages}
        return [f"the backward of stage {index} runs whole: {why}" for index, why in reasons.items() if why]

    # -- the loss and the gradients

    def _loss_name(self) -> str:
        return self.terms.cls.outputs[self.terms.block.outputs.index(self.graph.loss)]

    def _factors(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What each counted or shared term of the loss is multiplied with in this step."""
        share = self.rows / self.plan.global_batch
        dtype_of = {op.name: getattr(torch, self.terms.cls.tensor[op.outputs[0]].dtype) for op in self.terms.ops}
        factors = {
            name: torch.tensor(share, dtype=dtype_of[name], device=self.device)
            for name, term in self.terms.terms if term is Term.SHARE
        }
        if self._count is not None:
            counts = torch.stack([self._count(batch) for batch in rows]).sum(dim=0)
            if self.groups.data is not None:
                dist.all_reduce(counts, group=self.groups.data)
            for op, count in zip(self.terms.counted, counts, strict=True):
                factors[op.name] = (1.0 / count).to(dtype_of[op.name])
        return factors

    def _reduce_gradients(self) -> None:
        """Sum what the backward left partial: over the tensor axis, and over stages that share a parameter."""
        if not self._leaves_partial:
            return
        partial_grads: list[Tensor] = []
        copies: dict[str, list[Copy]] = {}
        for stage, param, parameter in checkpoint.own_parameters(self):
            summed_over_axis = self.groups.tensor is not None and param.state == RP
            is_tied = len(param.stages) > 1
            if not parameter.requires_grad or not (summed_over_axis or is_tied):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if summed_over_axis:
                partial_grads.append(local_tensor(parameter.grad))
            if is_tied:
                copies.setdefault(param.name, []).append(Copy(stage, param, parameter))
        if self.groups.tensor is not None:
            sum_in_place(partial_grads, self.groups.tensor)
        sum_tied(self.ties, copies, self.groups)


def _close_if_alive(reference: weakref.ref[Trainer]) -> None:
    trainer = reference()
    if trainer is not None:
        trainer.close()


def _batch_names(graph: ModelGraph, plan: Plan, index: int) -> tuple[str, ...]:
    """The batch tensors that a stage needs, for its blocks or for its masks and positions."""
    stage = plan.stages[index]
    needed = {name for block in graph.blocks[stage.first : stage.last] for name in block.inputs}
    if needed.intersection(graph.shared.outputs):
        needed.update(graph.shared.inputs)
    return tuple(info.name for info in graph.inputs if info.name in needed)
