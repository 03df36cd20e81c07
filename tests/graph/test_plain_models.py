"""Models as torch's tutorials write them: their captured graphs have the model's own loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.graph.capture import capture
from autopar.graph.interpret import run


def _check(model: nn.Module, batch: tuple[Tensor, ...], loss_fn: Callable[[Any, Any], Tensor], *taken: Tensor) -> None:
    captured = capture(model, batch, loss_fn=loss_fn)
    params = dict(model.named_parameters())
    inputs = {str(index): value for index, value in enumerate(batch)}
    found = run(captured.graph, inputs=inputs, params=params, constants=captured.constants)
    assert found.dim() == 0
    expected = loss_fn(model(*taken), batch).reshape(())
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, list(params.values())),
                          torch.autograd.grad(expected, list(params.values())), strict=True):
        torch.testing.assert_close(one, other)


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask))


def test_a_transformer_of_torch_with_a_causal_mask() -> None:
    tokens = torch.randint(0, 20, (3, 4, 6))
    _check(_Translator(), tuple(tokens), lambda out, batch: F.cross_entropy(out.flatten(0, 1), batch[2].flatten()),
           tokens[0], tokens[1])


def test_labels_that_the_model_does_not_take_come_last_in_a_tuple() -> None:
    x, y = torch.randn(2, 4, 8)
    _check(nn.Linear(8, 8), (x, y), lambda out, batch: F.mse_loss(out, batch[1]), x)


def test_a_loss_of_one_element() -> None:
    x, y = torch.randn(2, 4, 8)
    _check(nn.Linear(8, 8), (x, y), lambda out, batch: F.mse_loss(out, batch[1])[None], x)
