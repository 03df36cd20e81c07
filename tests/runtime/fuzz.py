"""Random plans of six families, run on local processes and held against one process."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from unittest.mock import patch

import torch
from fuzz_models import FAMILIES
from random_plans import Drawn, draw
from torch import nn

from autopar.graph.capture import Captured
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import Numbers, ParityReport, capture_for, make_batch, make_model, precision, report

STEPS = 3
WORLDS = (2, 3, 4, 5, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A random plan: everything of it follows from these values."""

    family: str
    world: int
    dtype: str
    optimizer: str
    seed: int

    def __str__(self) -> str:
        return f"{self.family} on {self.world}, {self.dtype}, {self.optimizer}, seed {self.seed}"


def case(seed: int, families: tuple[str, ...] = tuple(FAMILIES), worlds: tuple[int, ...] = WORLDS) -> Case:
    """The case of a number: families in turn, one in six in float32."""
    chance = random.Random(f"case {seed}")
    return Case(
        family=families[seed % len(families)], world=chance.choice(worlds),
        dtype="float32" if seed // len(families) % 6 == 5 else "float64", optimizer=chance.choice(["sgd", "adamw"]),
        seed=seed,
    )


@cache
def captured_of(family: str, dtype: str) -> Captured:
    return capture_for(FAMILIES[family], dtype)


def drawn(of: Case) -> Drawn:
    return draw(captured_of(of.family, of.dtype).graph, of.world, of.dtype, random.Random(f"plan {of.seed}"))


def make_optimizer(name: str, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With an epsilon above the rounding of gradients that are zero but for rounding."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=3e-3, eps=1e-4)
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def rank_numbers(of: Case, plan: Plan, captured: Captured) -> Numbers:
    """Losses, gradients, and at the end the parameters, as this rank has them (tensors on rank 0 alone).

    What a plan compiles is compiled without the compiler's own kernels, which round otherwise.
    """
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        numbers = _rank_numbers(of, plan, captured)
    torch.compiler.reset()
    return numbers


def _rank_numbers(of: Case, plan: Plan, captured: Captured) -> Numbers:
    model, example, _ = make_model(FAMILIES[of.family], of.dtype, 0)
    names = [name for name, _ in model.named_parameters()]
    trainer = Trainer(model, plan, captured, lambda params: make_optimizer(of.optimizer, params))
    losses, gradients = [], []
    for step in range(STEPS):
        losses.append(trainer.forward_backward(make_batch(example, plan.global_batch, step)).item())
        gradients.append(trainer.full_gradients())
        trainer.optimizer_step()
    state = trainer.full_state_dict()
    trainer.close()
    end = {name: state[name] for name in names if name in state}
    return Numbers(losses=tuple(losses), gradients=(*gradients, end), notes=trainer.notes)


@cache
def one_process(family: str, dtype: str, optimizer: str, global_batch: int) -> Numbers:
    """The same of one process that runs the plain model."""
    model, example, _ = make_model(FAMILIES[family], dtype, 0)
    stepping = make_optimizer(optimizer, model.parameters())
    losses, gradients = [], []
    for step in range(STEPS):
        with precision(dtype):
            loss = model(**make_batch(example, global_batch, step)).loss
        stepping.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
        stepping.step()
    end = {name: param.detach().clone() for name, param in model.named_parameters()}
    return Numbers(losses=tuple(losses), gradients=(*gradients, end))


def check(
    of: Case, found: Drawn, pool: LocalPool, *, compiled: bool = False, timeout_s: float = 600.0
) -> ParityReport:
    """The plan's numbers against one process's; `compiled`: the plan compiles its blocks."""
    captured, plan = captured_of(of.family, of.dtype), replace(found.plan, compile=compiled)
    results = pool.run(rank_numbers, of, plan, captured, num_ranks=of.world, timeout_s=timeout_s)
    expected = one_process(of.family, of.dtype, of.optimizer, plan.global_batch)
    return report(plan, of.dtype, results, expected)
