"""A dry run: the emitted program of every distinct rank on fake tensors, one training step, held against the plan.

Ranks of one stage that differ only in which rows they get run one program: one of them stands for all. What is checked:
that each program runs (shapes fit), that collectives have the same order, operation and size on all ranks of their
group, that receives find what was sent, that nothing waits for ever, and that no rank holds more than was predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from autopar.errors import AutoparError
from autopar.graph.capture import Captured, capture
from autopar.graph.fake import FakedModel
from autopar.graph.source import load_source
from autopar.plan.plan import Plan
from autopar.runtime import engine
from autopar.runtime.data_parallel import local_tensor
from autopar.runtime.fake_job import Call, Kind, Recorder, accelerator_kernels, fake_job, fake_mode
from autopar.runtime.fused_step import prefer_fused
from autopar.runtime.optimizers import OptimizerFactory
from autopar.runtime.watch import Watch
from autopar.simulate.schedules import Action
from autopar.simulate.timeline import Timeline

# A peak that is over the prediction by more than this fails: the share is the aim of the memory model (5%) and as much
# again for temporaries that differ between devices; the bytes are what a small model's odds and ends come to.
PEAK_TOLERANCE = 0.10
PEAK_SLACK_BYTES = 4 * 2**20
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """What one rank did in a step. Bytes by kind: `at_peak` when it held most, `most` at each kind's own maximum."""

    rank: int
    stands_for: tuple[int, ...]
    calls: tuple[Call, ...]
    peak_bytes: int
    at_peak: dict[str, int]
    most: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Bytes of one rank by kind, as the program holds them and as they were predicted."""

    rank: int
    stage: int
    num_ranks: int
    kind: str
    program_bytes: float
    predicted_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """`problems` has one line for each check that failed."""

    num_programs: int
    num_ranks: int
    num_collectives: int
    num_messages: int
    memory: tuple[MemoryRow, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": not self.problems}


def dry_run_of(
    spec: str, plan: Plan, timeline: Timeline, *, seq_len: int | None, dtype: str, attention: str,
    progress: Callable[[str], None] | None = None,
) -> DryRun:
    """The dry run of a plan for the model that a text names, built without a weight; see `dry_run`."""
    source = load_source(spec, seq_len=seq_len, dtype=dtype, attention=attention)
    with fake_mode() as mode:
        model, batch, loss_fn = source.build()
    FakedModel(model, mode)  # transformers' are made on the meta device
    captured = capture(model, batch, loss_fn=loss_fn, tag_rows=True, name=source.name)
    return dry_run(model, captured, plan, timeline, progress=progress)


class _DryTrainer(engine.Trainer):
    """A trainer that asks no other rank: what one would send, a seed or word of its plan, has no value here."""

    def _seed(self) -> None:
        pass

    def _meet(self) -> Watch:
        return Watch(alone=True)


def dry_run(
    model: nn.Module, captured: Captured, plan: Plan, timeline: Timeline, *,
    progress: Callable[[str], None] | None = None,
) -> DryRun:
    """One step of the plan on fake tensors, rank by rank. `model` holds fake parameters; `timeline` is the prediction.

    The programs run uncompiled, also where the plan is compiled: `timeline` must be of the uncompiled plan then.

    The process must be in no process group.
    """
    notes = []
    if plan.compile:
        plan = replace(plan, compile=False)
        notes.append("the programs ran uncompiled, and are held against what the plan would hold so: torch.compile "
                     "makes none on fake tensors")
    runs: list[RankRun] = []
    problems: list[str] = []
    groups = distinct_ranks(plan)
    on_cpu = {
        rank for group in timeline.groups for rank in group.ranks if any(name.startswith("CPU") for name in group.types)
    }
    for i, ranks in enumerate(groups):
        if progress is not None:
            progress(f"program {i + 1} of {len(groups)}, rank {ranks[0]}")
        try:
            runs.append(run_rank(model, captured, plan, ranks, on_accelerator=ranks[0] not in on_cpu))
        except AutoparError:
            raise
        except Exception as error:  # whatever a program raises is what a dry run is there to find
            text = " ".join(str(error).split())
            problems.append(f"rank {ranks[0]}: its program fails: {type(error).__name__}: {text[:200]}")
    if not problems:
        problems += communication_problems({run.rank: run.calls for run in runs})
    rows = [row for run in runs for row in memory_rows(run, timeline)]
    problems += memory_problems(rows)
    calls = [call for run in runs for call in run.calls]
    return DryRun(
        num_programs=len(groups), num_ranks=plan.num_devices, memory=tuple(rows), problems=tuple(problems),
        num_collectives=sum(call.peer is None for call in calls),
        num_messages=sum(call.op == "send" for call in calls), notes=tuple(notes),
    )


def distinct_ranks(plan: Plan) -> list[tuple[int, ...]]:
    """The ranks in sets that run one program, the one that stands for it first.

    Only data ranks fold, and only where all stages are laid out alike: else a rank has other partners than the next.
    """
    layouts = {(stage.mesh, plan.rows_of(stage)) for stage in plan.stages}
    found: dict[tuple[int, int, int], list[int]] = {}
    for index, stage in enumerate(plan.stages):
        if stage.virtual:
            continue
        rows, inner = plan.rows_of(stage), stage.mesh.cp * stage.mesh.tp
        for lane, rank in enumerate(stage.devices):
            data, place = divmod(lane, inner)
            key = (index, rows[data], place) if len(layouts) == 1 else (index, lane, 0)
            found.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def run_rank(
    model: nn.Module, captured: Captured, plan: Plan, ranks: Sequence[int], *, on_accelerator: bool = True
) -> RankRun:
    """One step of the program of `ranks[0]`; `on_accelerator`: its devices have kernels that a CPU has not."""
    graph, recorder = captured.graph, Recorder()

    def observe(action: Action) -> None:
        recorder.during = str(action)

    kernels = accelerator_kernels() if on_accelerator else nullcontext()
    with fake_job(ranks[0], plan.num_devices), fake_mode(), recorder, kernels:
        optimizer = _optimizer(plan.optimizer, on_accelerator=on_accelerator)
        trainer = _DryTrainer(model, plan, captured, optimizer, same_weights=False)
        for parameter in trainer.named_parameters().values():
            recorder.label(local_tensor(parameter), Kind.PARAMETER)
        batch = {
            info.name: torch.zeros(
                (plan.global_batch, *info.shape[1:]) if info.shape and info.shape[0] == graph.rows else info.shape,
                dtype=getattr(torch, info.dtype),
            ) for info in graph.inputs
        }
        recorder.calls.clear()
        recorder.forget_peak()
        trainer.forward_backward(batch, observe)
        recorder.during = "the optimizer's step"
        trainer.optimizer_step()
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    recorder.label(local_tensor(value), Kind.OPTIMIZER)
        # The state is there from the first step on, so that a second step has the peak of a long run.
        first = tuple(recorder.calls)
        recorder.forget_peak()
        trainer.forward_backward(batch)
        trainer.optimizer_step()
        return RankRun(
            rank=ranks[0], stands_for=tuple(ranks), calls=first, peak_bytes=recorder.peak_bytes,
            at_peak={str(kind): recorder.at_peak[kind] for kind in Kind},
            most={str(kind): recorder.most[kind] for kind in Kind},
        )


def _optimizer(name: str, *, on_accelerator: bool) -> OptimizerFactory:
    """The plan's optimizer; it steps as the trainer has it step on the rank's devices, also in its temporaries."""
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "adam": lambda params: torch.optim.Adam(params, lr=1e-3),
        "sgd": lambda params: torch.optim.SGD(params, lr=1e-3),
        "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    }

    def made(params: Any) -> torch.optim.Optimizer:
        optimizer = kinds[name](params)
        if on_accelerator:
            prefer_fused(optimizer)
        return optimizer

    return made


def communication_problems(calls: dict[int, Sequence[Call]]) -> list[str]:
    """What is wrong with the communication of these ranks, which stand for all: the first thing that cannot go on.

    A collective goes on when all ranks that are here and in its group have come to it, a receive when its message was
    sent; a send does not wait.
    """
    position = dict.fromkeys(calls, 0)
    sent: dict[tuple[int, int, str], deque[Call]] = {}

    def here(rank: int) -> Call | None:
        return calls[rank][position[rank]] if position[rank] < len(calls[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in calls:
            while (call := here(rank)) is not None:
                if call.op == "send":
                    assert call.peer is not None
                    sent.setdefault((rank, call.peer, call.group), deque()).append(call)
                elif call.op == "recv":
                    assert call.peer is not None
                    box = sent.get((call.peer, rank, call.group))
                    if call.peer in calls and not box:
                        break
                    if box and (message := box.popleft()).size_bytes != call.size_bytes:
                        return [f"rank {rank} expects a {call} and gets {message.size_bytes} bytes"]
                else:
                    members = [other for other in call.ranks if other in calls]
                    others = [(other, here(other)) for other in members]
                    if any(found is None or found.group != call.group for _, found in others):
                        break
                    for other, found in others:
                        if found is not None and (found.op, found.size_bytes) != (call.op, call.size_bytes):
                            return [f"rank {rank} comes to {call}, and rank {other} to {found}"]
                    for other in members:
                        if other != rank:
                            position[other] += 1
                position[rank] += 1
                moved = True
    stuck = [f"rank {rank} waits at {call}" for rank in calls if (call := here(rank)) is not None]
    if stuck:
        return [f"deadlock: {'; '.join(stuck[:4])}"]
    lost = [(source, target, box[0]) for (source, target, _), box in sent.items() if box and target in calls]
    return [f"rank {target} never receives the {call} of rank {source}" for source, target, call in lost[:1]]


def memory_rows(run: RankRun, timeline: Timeline) -> Iterable[MemoryRow]:
    """A rank's memory by kind against the prediction, its peak last."""
    group = next(group for group in timeline.groups if run.rank in group.ranks)
    memory = group.memory
    predicted = {
        Kind.PARAMETER: memory.parameters, Kind.OPTIMIZER: memory.optimizer, Kind.ACTIVATION: memory.activations,
        Kind.OTHER: memory.gradients + memory.buffers,
    }
    parts = [(str(kind), run.at_peak[str(kind)], size) for kind, size in predicted.items()]
    for kind, found, wanted in [*parts, ("peak", run.peak_bytes, memory.total)]:
        yield MemoryRow(
            rank=run.rank, stage=group.stage, num_ranks=len(run.stands_for), kind=kind, program_bytes=found,
            predicted_bytes=wanted,
        )


def memory_problems(rows: Sequence[MemoryRow]) -> list[str]:
    """The ranks that hold clearly more than was predicted for them."""
    return [
        f"rank {row.rank} holds {row.program_bytes / MIB:.1f} MiB at its peak, and {row.predicted_bytes / MIB:.1f} "
        "were predicted" for row in rows
        if row.kind == "peak" and row.program_bytes > row.predicted_bytes * (1 + PEAK_TOLERANCE) + PEAK_SLACK_BYTES
    ]
