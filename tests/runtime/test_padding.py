"""A vocabulary that the tensor axis does not divide: padded rows stay zeros, and everything is one process's."""

from __future__ import annotations

import pytest
import runtime_models
import torch
from test_checkpoint import make_trainer
from test_parity import plan_of
from torch import Tensor

from autopar.plan.plan import Plan
from autopar.runtime.checkpoint import own_parameters
from autopar.runtime.data_parallel import local_tensor
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch, precision
from autopar.sharding.state import Kind

pytestmark = pytest.mark.processes
STEPS, RATE = 3, 1e-2


def train_padded(plan: Plan) -> tuple[list[str], list[float], dict[str, Tensor]]:
    """What of the padding is not zero, the norm of all gradients in each step, and the parameters at the end."""
    trainer = make_trainer("gpt2_uneven", plan, seed=0, learning_rate=RATE)
    axis = trainer.groups.tensor_axis
    assert axis is not None
    example, wrong, norms = runtime_models.causal_batch(), [], []
    for step in range(STEPS):
        with precision("float64"):
            trainer.step(make_batch(example, 8, step))
        squares = torch.zeros((), dtype=torch.float64)
        for _, param, value in own_parameters(trainer):
            assert value.grad is not None
            whole = param.state.kind is not Kind.SHARDED
            squares += value.grad.square().sum() / (axis.size if whole else 1)
            if param.state.length:
                local = local_tensor(value.detach())
                first = max(0, min(param.state.length - axis.rank * local.shape[0], local.shape[0]))
                held = {"parameter": local, "gradient": value.grad, **trainer.optimizer.state[value]}
                wrong += [f"{param.name} {key}" for key, kept in held.items() if kept.dim() and kept[first:].any()]
                wrong += [] if local.shape[0] == -(-param.state.length // axis.size) else [f"{local.shape}"]
        torch.distributed.all_reduce(squares)
        norms.append(squares.sqrt().item())
    return wrong, norms, trainer.full_state_dict()


def train_alone() -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, example, _ = runtime_models.gpt2_uneven()
    model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, foreach=False)
    norms = []
    for step in range(STEPS):
        with precision("float64"):
            loss = model(**make_batch(example, 8, step)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        optimizer.step()
    return norms, model.state_dict()


@pytest.mark.parametrize("name", ["tp2", "tp4"])
def test_padding_stays_zero_and_is_seen_nowhere(pool: LocalPool, name: str) -> None:
    plan = plan_of("gpt2_uneven", name, "float64")
    lengths = {state.length for choice in plan.shardings for state in choice.params}
    assert lengths == {0, runtime_models.VOCABULARY + 1}
    results = pool.run(train_padded, plan, num_ranks=plan.num_devices)
    norms, parameters = train_alone()
    for wrong, found, _ in results:
        assert wrong == []
        assert found == pytest.approx(norms, rel=1e-9)
    saved = results[0][2]
    assert saved.keys() == parameters.keys()
    for key, value in parameters.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-7, atol=1e-9)
