"""The loss that balances a mixture's experts: whole batches as in one process, parts of a batch each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import runtime_models
import torch
from local_machines import slow_cluster
from test_parity import captured_of
from torch import Tensor

from autopar.plan.plan import Plan, Recompute
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare, make_model, precision
from autopar.search.degrees import Degrees, plan_from_degrees

pytestmark = pytest.mark.processes
ROWS = 8


def plan_of(micro_batch: int, **degrees: Any) -> Plan:
    size = 1
    for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp"):
        size *= degrees.get(axis, 1)
    return plan_from_degrees(captured_of("balanced_mixture", "float64").graph, slow_cluster(size), Degrees(
        global_batch=ROWS, micro_batch=micro_batch, dtype="float64", param_dtype="float64", optimizer="sgd", **degrees,
    ))


@pytest.mark.parametrize("degrees", [
    {"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"pp": 2, "recompute": Recompute.FULL}, {"pp": 2, "tp": 2},
], ids=["tensor", "context", "pipeline_recomputed", "pipeline_of_tensor"])
def test_a_whole_batch_has_the_numbers_of_one_process(pool: LocalPool, degrees: dict[str, Any]) -> None:
    captured = captured_of("balanced_mixture", "float64")
    report = compare(
        runtime_models.balanced_mixture, plan_of(ROWS, **degrees), steps=2, pool=pool, captured=captured
    )
    assert report.passed, (report.loss_error, report.worst)
    assert len(report.gradient_errors) == len(captured.graph.params)


def train(plan: Plan) -> tuple[Tensor, dict[str, Tensor], tuple[str, ...]]:
    """The loss of a batch and all gradients; what the trainer notes."""
    model, batch, _ = make_model(runtime_models.balanced_mixture, "float64", 0)
    captured = captured_of("balanced_mixture", "float64")
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.SGD(params, lr=0.1))
    found = trainer.forward_backward(batch).detach(), trainer.full_gradients(), trainer.notes
    trainer.close()
    return found


def by_parts(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over parts of the balancing loss, beside the cross-entropy of the whole."""
    model, batch, _ = make_model(runtime_models.balanced_mixture, "float64", 0)
    valid = batch["labels"][:, 1:].ne(-100)
    loss = torch.zeros((), dtype=torch.float64)
    for first in range(0, ROWS, rows):
        with precision("float64"):
            output = model(**{name: tensor[first : first + rows] for name, tensor in batch.items()})
        entropy = output.loss - output.aux_loss
        share = valid[first : first + rows].sum().item() / valid.sum().item()
        loss = loss + entropy * share + output.aux_loss * (rows / ROWS)
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize(("degrees", "micro_batch", "rows"), [
    ({"tp": 2}, 2, 2), ({"dp_shard": 2, "zero": 3}, 4, 4), ({"pp": 2, "dp_replicate": 2}, 2, 2),
], ids=["micro_batches", "fsdp", "pipeline_of_replicas"])
def test_each_part_of_a_batch_is_balanced_by_itself(
    pool: LocalPool, degrees: dict[str, Any], micro_batch: int, rows: int
) -> None:
    plan = plan_of(micro_batch, **degrees)
    loss, gradients, notes = pool.run(train, plan, num_ranks=plan.num_devices)[0]
    expected, wanted = by_parts(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    assert any("weighs the loss by a histogram" in note for note in notes)
