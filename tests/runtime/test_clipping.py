"""Clipping by the global norm: the norm and the clipped gradients are one process's."""

from __future__ import annotations

import pytest
import runtime_models
import torch
from staged_plans import Layout, staged_plan
from test_parity import captured_of, graph_of, plan_of
from torch import Tensor

from autopar.plan.plan import Mesh, Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, precision, relative_error

pytestmark = pytest.mark.processes
MAX_NORM = 0.05


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    module: torch.nn.Module = getattr(runtime_models, name)()[0].double()
    return module


def clipped(name: str, plan: Plan) -> tuple[float, float, dict[str, Tensor]]:
    factory = getattr(runtime_models, name)
    trainer = Trainer(model_of(name), plan, captured_of(name, "float64"), lambda p: torch.optim.SGD(p, lr=0.1))
    with precision("float64"):
        trainer.forward_backward(make_batch(factory()[1], 8, 0))
    norm = trainer.clip_gradients(MAX_NORM).item()
    return norm, trainer.clip_gradients(1e9).item(), trainer.full_gradients()


@pytest.mark.parametrize("name", ["fsdp2xtp2", "hsdp2x2", "unlike"])
def test_the_norm_is_one_processs(pool: LocalPool, name: str) -> None:
    """GPT-2's embedding is tied: its gradient counts once, in unlike parts on two stages too."""
    graph = graph_of("gpt2", "float64")
    unlike = [Layout(blocks=2, mesh=Mesh(tp=2)), Layout(blocks=2, mesh=Mesh(dp_shard=2), zero=2)]
    plan = staged_plan(graph, unlike) if name == "unlike" else plan_of("gpt2", name, "float64")
    norm, after, gradients = pool.run(clipped, "gpt2", plan, num_ranks=plan.num_devices)[0]
    module = model_of("gpt2")
    with precision("float64"):
        module(**make_batch(runtime_models.gpt2()[1], 8, 0)).loss.backward()
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM).item(), rel=1e-9)
    assert after == pytest.approx(MAX_NORM, rel=1e-4)
    expected = {key: param.grad for key, param in module.named_parameters() if param.grad is not None}
    assert gradients.keys() == expected.keys()
    assert max(relative_error(gradients[key], value, least_scale=1e-9) for key, value in expected.items()) < 1e-8
