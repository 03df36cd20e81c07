"""Which optimizers step a shard of a parameter as they would step the whole, and which need it whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from autopar.errors import InputError
from autopar.plan.plan import Plan
from autopar.runtime.layout import Layout
from autopar.runtime.whole_steps import WHOLE
from autopar.sharding.state import Kind

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Each element's step follows from that element's gradient and state alone, whatever `foreach` and `fused` say.
ELEMENTWISE = frozenset((
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD",
))


def made_optimizer(
    factory: OptimizerFactory, params: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a rank's parameters, which may be none, or none of those that the factory picks.

    torch makes no optimizer of nothing: it is then made with parameters that are taken out again.
    """
    spare = [nn.Parameter(torch.zeros((1,) * rank, device=device)) for rank in (1, 2)]
    try:
        optimizer = factory(params or spare)
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        optimizer = factory([*params, *spare])
    for group in optimizer.param_groups:
        group["params"] = [param for param in group["params"] if all(param is not other for other in spare)]
    return optimizer


def sharded_because(plan: Plan, layout: Layout) -> str:
    """What of the plan leaves some rank a part of a parameter; "" where every parameter is whole where it is used."""
    for index, stage in enumerate(plan.stages):
        if stage.zero > 0 and stage.mesh.dp_shard * stage.mesh.cp > 1:
            return f"stage {index} shards its states (zero {stage.zero})"
        if any(param.state.kind is Kind.SHARDED for param in layout.of_stage(index)):
            return f"stage {index} splits parameters over its tensor axis"
        if any(param.by_experts for param in layout.of_stage(index)):
            return f"stage {index} parts its experts over its data ranks"
    return ""


def needs_whole(optimizer: torch.optim.Optimizer, plan: Plan, layout: Layout) -> bool:
    """Whether the optimizer looks at whole parameters and ranks hold parts of some.

    InputError for an optimizer that cannot step under the plan; a warning for one of which that is not known.
    """
    kind = type(optimizer)
    name = kind.__name__
    from_torch = kind.__module__.startswith("torch.optim")
    if from_torch and name == "LBFGS":
        raise InputError("LBFGS evaluates the loss anew within its step, which a trainer does not offer: use AdamW")
    why = sharded_because(plan, layout)
    if not why or (from_torch and name in ELEMENTWISE):
        return False
    if name in WHOLE and (from_torch or kind.__module__ == "transformers.optimization"):
        if any(stage.offload_optimizer for stage in plan.stages):
            raise InputError(
                f"the plan keeps the optimizer's state in host memory, and {name} looks at whole parameters, and "
                f"{why}: plan without offload, or use AdamW"
            )
        log.info("%s looks at whole parameters, and %s: each is gathered for its step", name, why)
        return True
    if from_torch:
        raise InputError(
            f"{name} is not known to step each parameter by itself, and {why}: use AdamW or SGD, or a plan of whole "
            "replicas and pipeline stages"
        )
    log.warning("%s is not known to step each element by itself, and %s: it steps each shard as a whole", name, why)
    return False
