"""A plan's arithmetic checked on this machine: local gloo processes against one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autopar.cluster.local import total_memory_bytes
from autopar.errors import InputError
from autopar.graph.model_graph import DTYPE_BYTES
from autopar.graph.source import capture_source, load_source
from autopar.plan.plan import Plan
from autopar.plan.verify import verify_plan
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import TOLERANCE, ParityReport, compare

MAX_PROCESSES = 16
COPIES = 4  # the weights, their gradients, the gathered full gradients, and as much again for activations


DROPS_NOTHING = 1e-30  # a probability: what is kept is drawn with 1 - 1e-30, which is 1 in every dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RealModel:
    """A picklable factory of the model that `spec` names, with real weights and its dropout switched off.

    Random numbers differ between one process and several, so that a model with dropout can only be compared without.
    """

    spec: str
    seq_len: int | None
    dtype: str
    attention: str = "sdpa"
    rows: int = 2  # of the example batch, where the model does not bring its own

    def __call__(self) -> tuple[nn.Module, Any, Any]:
        source = load_source(
            self.spec, seq_len=self.seq_len, dtype=self.dtype, attention=self.attention, rows=self.rows
        )
        model, batch, loss_fn = source.build()
        switch_off_dropout(model)
        return model, batch, loss_fn


def switch_off_dropout(model: nn.Module) -> None:
    """Makes every dropout of the model drop nothing, in training mode too; its ops stay, as the plan has them.

    Where a probability is zero no op is captured, and the model would not be the plan's.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            module.p = DROPS_NOTHING
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                setattr(module, name, DROPS_NOTHING)


def check_locally(
    plan: Plan, model: str, *, dtype: str | None = None, steps: int = 1, seq_len: int | None = None,
    pool: LocalPool | None = None, trace: Path | None = None,
) -> ParityReport:
    """Losses and gradients of some steps under the plan, held against one process's.

    Where `trace` is given, a few more steps are recorded and their Chrome trace is written there.
    In `dtype`, or the plan's own; a plan that computes in two bytes is compared in float32, where an error shows.
    InputError where the plan is another model's, or has more devices than processes can be started here.
    """
    chosen = dtype or (plan.dtype if plan.dtype in ("float32", "float64") else "float32")
    if chosen not in TOLERANCE:
        raise InputError(f"dtype {chosen} cannot be compared; use one of {', '.join(TOLERANCE)}")
    if plan.num_devices > MAX_PROCESSES:
        raise InputError(
            f"the plan has {plan.num_devices} devices, and one local process runs for each, at most {MAX_PROCESSES}: "
            "verify a plan of the same shape on fewer devices"
        )
    length = seq_len or plan.seq_len
    factory = RealModel(  # every row another one, so that none can stand for another
        spec=model, seq_len=None if ".py:" in model else length, dtype=chosen, rows=max(2, plan.global_batch)
    )
    graph = capture_source(load_source(model, seq_len=factory.seq_len, dtype=chosen))
    verify_plan(plan, graph)
    _check_memory(graph.num_params * DTYPE_BYTES[chosen] * COPIES * (plan.num_devices + 1), graph.name)
    return compare(factory, replace(plan, dtype=chosen, param_dtype=chosen), dtype=chosen, steps=steps, pool=pool,
                   trace=trace)


def _check_memory(needed_bytes: float, name: str) -> None:
    installed = total_memory_bytes()
    if needed_bytes > installed:
        raise InputError(
            f"running {name} here takes about {needed_bytes / 2**30:.0f} GiB of memory, and this machine has "
            f"{installed / 2**30:.0f}: verify the same plan for a smaller model of the family"
        )
