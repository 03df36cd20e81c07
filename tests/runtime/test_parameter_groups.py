"""An optimizer whose groups are made by looking at each parameter, on ranks that have none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import autopar
from autopar.runtime.local import run_local

ROWS = 8  # do not divide over 3 ranks: three stages, the last of which has the loss alone


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def _decayed(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.AdamW([
        {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.0},
    ], lr=1e-2)


def _losses() -> tuple[list[float], int]:
    torch.manual_seed(0)
    model = _Residual().double()
    batch = (torch.randn(ROWS, 16, dtype=torch.float64),)
    trainer = autopar.parallelize(model, batch, _decayed)
    return [trainer.step(batch).item() for _ in range(3)], len(trainer.named_parameters())


def test_a_rank_without_parameters() -> None:
    alone, _ = _losses()
    ranks = run_local(_losses, 3)
    assert min(count for _, count in ranks) == 0
    for losses, _ in ranks:
        torch.testing.assert_close(losses, alone, rtol=1e-12, atol=0)
