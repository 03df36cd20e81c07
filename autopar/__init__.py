"""autopar plans, checks and runs the parallel training of PyTorch models.

    trainer = autopar.parallelize(model, example_batch, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4))
    plan = autopar.plan(model, example_batch, cluster="2x8xH100", global_batch=1024)
    autopar.simulate(plan)

Names are imported when they are first used, so that `import autopar` is quick.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import PlannedModel as PlannedModel
    from autopar.api import parallelize as parallelize
    from autopar.api import plan as plan
    from autopar.api import simulate as simulate
    from autopar.cluster.cluster import Cluster as Cluster
    from autopar.cluster.parse import parse_cluster as parse_cluster
    from autopar.errors import AutoparError as AutoparError
    from autopar.errors import CaptureError as CaptureError
    from autopar.errors import InfeasibleError as InfeasibleError
    from autopar.errors import InputError as InputError
    from autopar.errors import NotFiniteError as NotFiniteError
    from autopar.errors import PlanMismatchError as PlanMismatchError
    from autopar.graph.empty_parameters import empty_parameters as empty_parameters
    from autopar.hugging_face import parallelize_trainer as parallelize_trainer
    from autopar.plan.file import load_plan as load_plan
    from autopar.plan.plan import Plan as Plan
    from autopar.runtime.engine import Trainer as Trainer
    from autopar.sharding.rules import register_rule as register_rule
    from autopar.simulate.timeline import Timeline as Timeline
else:
    from autopar import plan, simulate

_HOMES = {
    "AutoparError": "autopar.errors",
    "CaptureError": "autopar.errors",
    "Cluster": "autopar.cluster.cluster",
    "InfeasibleError": "autopar.errors",
    "InputError": "autopar.errors",
    "NotFiniteError": "autopar.errors",
    "Plan": "autopar.plan.plan",
    "PlanMismatchError": "autopar.errors",
    "PlannedModel": "autopar.api",
    "Timeline": "autopar.simulate.timeline",
    "Trainer": "autopar.runtime.engine",
    "empty_parameters": "autopar.graph.empty_parameters",
    "load_plan": "autopar.plan.file",
    "parallelize": "autopar.api",
    "parallelize_trainer": "autopar.hugging_face",
    "parse_cluster": "autopar.cluster.parse",
    "register_rule": "autopar.sharding.rules",
}

__all__ = [*_HOMES, "plan", "simulate"]


class _Verb(ModuleType):
    """A room whose name is also a verb: `autopar.plan` holds autopar/plan and can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("autopar.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


if not TYPE_CHECKING:
    for _room in (plan, simulate):
        _room.__class__ = _Verb


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
