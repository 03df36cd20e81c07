"""The captured graph, run op by op, gives the model's own loss and gradients."""

from __future__ import annotations

import copy

import graph_models as models
import pytest
import torch
from torch import nn

from autopar.graph.capture import capture
from autopar.graph.interpret import run
from autopar.runtime.parity import precision

CASES = {
    "llama": lambda: (*models.llama(), None),
    "llama_tied": lambda: (*models.llama(tie_word_embeddings=True), None),
    "llama_eager": lambda: (*models.llama(attn_implementation="eager"), None),
    "gpt2": lambda: (*models.gpt2(), None),
    "bert": lambda: (*models.bert(), None),
    "resnet": lambda: (*models.resnet(), None),
    "vit": lambda: (*models.vit(), None),
    "mixtral": lambda: (*models.mixtral(), None),

    "gemma3": lambda: (*models.gemma3(), None),
    "t5": lambda: (*models.t5(), None),
    "bart": lambda: (*models.bart(), None),
    "mlp": lambda: (*models.mlp(), models.square_loss),
}


def to_double(batch):
    def one(value):
        return value.double() if value.is_floating_point() else value
    return {key: one(value) for key, value in batch.items()} if isinstance(batch, dict) else tuple(map(one, batch))


def loss_and_grads(model: nn.Module, batch, loss_fn) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    loss = loss_fn(output, batch) if loss_fn else output.loss
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("case", CASES)
def test_graph_equals_model(case: str) -> None:
    model, batch, loss_fn = CASES[case]()
    model, batch = model.double().train(), to_double(batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with precision("float64"):  # norms are one op in the graph, which rounds nothing to float32 as the model's own do
        captured = capture(model, batch, loss_fn=loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    reference = copy.deepcopy(model)
    with precision("float64"):
        wanted_loss, wanted = loss_and_grads(reference, batch, loss_fn)

    inputs = batch if isinstance(batch, dict) else {str(i): value for i, value in enumerate(batch)}
    loss = run(captured.graph, inputs=inputs, params=dict(model.named_parameters()), constants=captured.constants)
    loss.backward()
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-12)
    for name, grad in wanted.items():
        assert torch.allclose(model.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-12), name
    for name, value in reference.named_buffers():
        assert torch.allclose(dict(model.named_buffers())[name], value), name
