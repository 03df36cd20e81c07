"""Dropout is switched off for a comparison without changing the model that was planned."""

import torch
from torch import Tensor, nn

from autopar.graph.capture import capture
from autopar.graph.fingerprint import model_fingerprint
from autopar.local_check import switch_off_dropout


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.attn_dropout, self.idle = nn.Linear(8, 8), nn.Dropout(0.3), 0.5, nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.idle(self.drop(self.linear(x)))
        return nn.functional.dropout(hidden, self.attn_dropout, self.training).sum()


def test_what_drops_nothing_is_still_the_model_that_was_planned() -> None:
    model, batch = Dropping(), {"x": torch.ones(4, 8)}
    planned = model_fingerprint(capture(model, batch).graph)
    switch_off_dropout(model)
    assert model.training
    assert model_fingerprint(capture(model, batch).graph) == planned
    assert torch.equal(model(**batch), model.eval()(**batch))
