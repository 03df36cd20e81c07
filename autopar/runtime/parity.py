"""A plan's numbers against one process's: the loss and every gradient of every parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.graph.capture import Captured, capture
from autopar.graph.loss_terms import Term, loss_terms
from autopar.graph.model_call import Batch, each_tensor, model_output
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.plan.text import recompute_text
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-1}  # a sum of bfloat16 rounds at every term

TRACED_STEPS = 3

ModelFactory = Callable[[], tuple[nn.Module, Batch, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """Relative errors against one process; of a tensor: max|a - b| / max|b|.

    `gradient_errors` is by parameter and holds the worst of all steps; `losses` and `expected_losses` are by step.
    """

    plan_summary: str
    dtype: str
    losses: tuple[float, ...]
    expected_losses: tuple[float, ...]
    loss_error: float
    gradient_errors: tuple[tuple[str, float], ...]
    tolerance: float
    notes: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest gradient error."""
        return max(self.gradient_errors, key=lambda item: item[1])

    @property
    def passed(self) -> bool:
        return self.loss_error <= self.tolerance and self.worst[1] <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        name, error = self.worst
        return {
            "passed": self.passed, "plan": self.plan_summary, "dtype": self.dtype, "tolerance": self.tolerance,
            "losses": list(self.losses), "expected_losses": list(self.expected_losses), "loss_error": self.loss_error,
            "num_gradients": len(self.gradient_errors), "worst_gradient": name, "worst_gradient_error": error,
            "notes": list(self.notes),
        }


_ROUNDINGS = 8  # of the largest gradient: what sums in another order may leave where terms cancel


def relative_error(found: Tensor, expected: Tensor, *, least_scale: float = 0.0) -> float:
    """max|a - b| / max(max|b|, least_scale); the plain difference where both are zero.

    Infinity for another shape or a NaN.

    `least_scale` is where b itself is only rounding: attention's key bias has a gradient of zero, computed as noise.
    """
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    scale = max(expected.double().abs().max().item() if expected.numel() else 0.0, least_scale)
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def summary(plan: Plan) -> str:
    """The plan in one line: "pp 2 x dp 1x2 (zero 3) x tp 2, 4 micro-batches of 1, 1f1b, recompute full"."""
    sequence = " with sequence parallelism" if plan.sequence_parallel else ""
    shapes = []
    for stage in plan.stages:
        mesh, rows = stage.mesh, f" rows {'+'.join(map(str, stage.rows))}" if stage.rows else ""
        shapes.append(
            f"dp {mesh.dp_replicate}x{mesh.dp_shard} (zero {stage.zero}) x tp {mesh.tp}"
            f"{f' x cp {mesh.cp}' if mesh.cp > 1 else ''}{rows}"
        )
    return (
        f"pp {plan.num_stages} x {' | '.join(dict.fromkeys(shapes))}{sequence}, "
        f"{plan.num_micro_batches} micro-batches of {plan.micro_batch}, {plan.schedule}, recompute "
        + " | ".join(dict.fromkeys(recompute_text(stage) for stage in plan.stages))
    )


def compare(
    factory: ModelFactory, plan: Plan, *, dtype: str | None = None, steps: int = 1, seed: int = 0,
    pool: LocalPool | None = None, timeout_s: float = 600.0, captured: Captured | None = None,
    trace: Path | None = None,
) -> ParityReport:
    """Run a plan on local processes and in one process with the same weights and batches.

    `factory` is importable and returns (model, example batch of any number of rows, loss function or None), all real;
    its random weights follow `seed`. Both sides run plain SGD steps between gradients, so that errors don't hide
    behind an optimizer's normalization. Where ops mix rows, and the numbers are not those of the whole batch, they are
    held against those of its parts; where the model itself casts to 16 bits, and they are not equal otherwise, by the
    tolerance of these. `captured` is what `capture_for` gave for the factory and dtype; without it
    the model is captured here, once for all ranks. Where `trace` is given, some more steps are recorded and written
    there.
    """
    chosen = plan.dtype if dtype is None else dtype
    captured = captured or capture_for(factory, chosen, seed=seed)
    task = (distributed_numbers, factory, plan, chosen, steps, seed, captured, trace)
    if pool is None:
        with LocalPool(plan.num_devices) as own:
            results = own.run(*task, timeout_s=timeout_s)
    else:
        results = pool.run(*task, num_ranks=plan.num_devices, timeout_s=timeout_s)
    whole = reference_numbers(factory, plan, chosen, steps, seed)
    found = report(plan, chosen, results, whole)
    if found.passed:
        return found
    parts = parts_apart(captured, plan)
    references = [whole, reference_numbers(factory, plan, chosen, steps, seed, parts=parts)] if parts else [whole]
    others = (
        report(plan, chosen, results, expected, coarsest=coarsest)
        for coarsest in dict.fromkeys((chosen, coarsest_dtype(captured.graph, chosen))) for expected in references
    )
    return next((other for other in others if other.passed), found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Losses and gradients of some steps."""

    losses: tuple[float, ...]
    gradients: tuple[dict[str, Tensor], ...]
    notes: tuple[str, ...] = ()


def coarsest_dtype(graph: ModelGraph, dtype: str) -> str:
    """The key of TOLERANCE for a model that runs in `dtype`: "bfloat16" where its own casts (autocast) go that low.

    What carries no gradient, as a bias that attention adds, is the same on all ranks.
    """
    halves = any(
        info.requires_grad and info.dtype in ("bfloat16", "float16") for cls in graph.classes for info in cls.tensors
    )
    return "bfloat16" if halves else dtype


def report(
    plan: Plan, dtype: str, results: list[Numbers], expected: Numbers, *, coarsest: str | None = None,
) -> ParityReport:
    """What the ranks found, held against one process; by the tolerance of `coarsest`, or else of `dtype`."""
    first = results[0]
    coarsest = coarsest or dtype
    notes = (*first.notes, *expected.notes)
    if coarsest != dtype:
        notes = (*notes, f"the model casts to 16 bits by itself, so that {TOLERANCE[coarsest]:.0e} is allowed")
    worst: dict[str, float] = {}
    for found, right in zip(first.gradients, expected.gradients, strict=True):
        largest = max((gradient.abs().max().item() for gradient in right.values() if gradient.numel()), default=0.0)
        noise = _ROUNDINGS * torch.finfo(getattr(torch, coarsest)).eps * largest  # an error that this makes is no error
        for name in sorted({*found, *right}):
            missing = name not in found or name not in right
            error = (
                float("inf") if missing
                else relative_error(found[name], right[name], least_scale=noise / TOLERANCE[coarsest])
            )
            worst[name] = max(worst.get(name, 0.0), error)
    loss_error = max(
        relative_error(torch.tensor(loss, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
        for numbers in results for loss, right in zip(numbers.losses, expected.losses, strict=True)
    )
    return ParityReport(
        plan_summary=summary(plan), dtype=dtype, losses=first.losses, expected_losses=expected.losses,
        loss_error=loss_error, gradient_errors=tuple(worst.items()), tolerance=TOLERANCE[coarsest],
        notes=notes,
    )


def make_model(factory: ModelFactory, dtype: str, seed: int) -> tuple[nn.Module, Batch, Any]:
    """The factory's model with its weights of a seed, its batch and its loss function, in a dtype."""
    torch.manual_seed(seed)
    model, batch, loss_fn = factory()
    wanted = getattr(torch, dtype)
    for param in model.parameters():
        param.data = param.data.to(wanted)
    if wanted is torch.float64:  # a plain module takes no float32 input then, and buffers would round what they meet
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(wanted)
        batch = each_tensor(batch, lambda value: value.to(wanted) if value.is_floating_point() else value)
    return model, batch, loss_fn


def _part(batch: Batch, first: int, last: int, rows: int) -> Batch:
    """Rows `first` up to `last` of a batch of `rows`."""
    return each_tensor(batch, lambda value: value[first:last] if value.dim() and len(value) == rows else value)


class _Widened(TorchFunctionMode):
    """Whatever a model casts to float32 becomes float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty_strided:  # how torch copies a tensor's metadata while it traces
            return func(*args, **(kwargs or {}))
        func = Tensor.double if func is Tensor.float else func

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*(widen(arg) for arg in args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The context to run a model in so that float64 means float64 throughout.

    Models cast norms and logits to float32 by themselves, which would drown a float64 comparison in rounding.
    """
    return _Widened() if dtype == "float64" else contextlib.nullcontext()


def capture_for(factory: ModelFactory, dtype: str, *, seed: int = 0) -> Captured:
    """The factory's model captured in a dtype, as a plan for it needs it."""
    return _capture(*make_model(factory, dtype, seed), dtype)


def _capture(model: nn.Module, example: Batch, loss_fn: Any, dtype: str) -> Captured:
    with precision(dtype):
        return capture(model, example, loss_fn=loss_fn, tag_rows=True)


def make_batch(example: Batch, rows: int, step: int) -> Batch:
    """A global batch of `rows` rows made of the example's rows, other ones at each step."""
    values = example.values() if isinstance(example, Mapping) else example
    size = max(value.shape[0] for value in values if isinstance(value, Tensor) and value.dim())
    index = (torch.arange(rows) + step) % size
    return each_tensor(example, lambda value: value[index] if value.dim() and value.shape[0] == size else value)


def distributed_numbers(
    factory: ModelFactory, plan: Plan, dtype: str, steps: int, seed: int, captured: Captured | None = None,
    trace: Path | None = None,
) -> Numbers:
    """This rank's view of the plan's numbers: gradients on rank 0 alone. Runs under a process group."""
    model, example, loss_fn = make_model(factory, dtype, seed)
    captured = captured or _capture(model, example, loss_fn, dtype)
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.SGD(params, lr=0.1))
    losses, gradients = [], []
    for step in range(steps):
        losses.append(trainer.forward_backward(make_batch(example, plan.global_batch, step)).item())
        gradients.append(trainer.full_gradients())
        trainer.optimizer_step()
    if trace is not None:
        with trainer.trace(trace):
            for step in range(TRACED_STEPS):
                trainer.step(make_batch(example, plan.global_batch, step))
    trainer.close()
    return Numbers(losses=tuple(losses), gradients=tuple(gradients), notes=trainer.notes)


PARTS_NOTE = "one process computed the same parts of the batch, one after another, and took the mean of their losses"


def parts_apart(captured: Captured, plan: Plan) -> tuple[tuple[int, int], ...]:
    """The parts of a global batch, as first and last row, where the model's ops tell them from the whole.

    They do where ops mix rows, as batch normalization and the loss that balances routers do. Empty where they do not,
    or where the whole loss is no mean over the rows; and where stages have other parts, so that no one process can
    compute those.
    """
    rows = plan.rows_of(plan.stages[-1])
    num_parts = plan.num_micro_batches * len(rows)
    if num_parts == 1 or any(plan.rows_of(stage) != rows for stage in plan.stages):
        return ()
    terms = loss_terms(captured.graph, num_parts=num_parts)
    if not terms.notes or any(term is Term.SUM for _, term in terms.terms):
        return ()
    ends = list(accumulate(rows * plan.num_micro_batches))
    return tuple(zip([0, *ends], ends, strict=False))


def reference_numbers(
    factory: ModelFactory, plan: Plan, dtype: str, steps: int, seed: int, *, parts: Sequence[tuple[int, int]] = (),
) -> Numbers:
    """One process's losses and gradients for the same global batches, in these parts or each as a whole.

    Of several parts the losses count by their rows.
    """
    model, example, loss_fn = make_model(factory, dtype, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], []
    for step in range(steps):
        whole = make_batch(example, plan.global_batch, step)
        optimizer.zero_grad(set_to_none=True)
        losses.append(0.0)
        for first, last in parts or ((0, plan.global_batch),):
            batch = _part(whole, first, last, plan.global_batch)
            with precision(dtype):
                output = model_output(model, batch, has_loss_fn=loss_fn is not None)
                loss = loss_fn(output, batch) if loss_fn is not None else getattr(output, "loss", output)
            share = (last - first) / plan.global_batch
            (loss * share).backward()
            losses[-1] += loss.item() * share
        gradients.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return Numbers(losses=tuple(losses), gradients=tuple(gradients), notes=(PARTS_NOTE,) if parts else ())
