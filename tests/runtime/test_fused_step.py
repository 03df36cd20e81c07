"""The fused step is taken where nobody said otherwise, and steps as the plain one does."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime.fused_step import place_step_counts, prefer_fused


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_it_steps_alike(kind: type[torch.optim.Optimizer]) -> None:
    first = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    second = torch.nn.Parameter(first.detach().clone())
    plain, fused = kind([first], lr=1e-2), kind([second], lr=1e-2)
    assert prefer_fused(fused)
    for _ in range(3):
        for param, optimizer in ((first, plain), (second, fused)):
            param.grad = (3 * param.detach()).sin()
            optimizer.step()
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_what_was_chosen_stays() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    assert not prefer_fused(torch.optim.AdamW([param], foreach=True))
    assert not prefer_fused(torch.optim.AdamW([param], fused=False))
    assert not prefer_fused(torch.optim.SGD([param], lr=1.0))


@pytest.mark.parametrize("fused", [True, False])
def test_step_counts_lie_where_the_optimizer_looks_for_them(fused: bool) -> None:
    param = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([param])
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[param]["step"] = torch.tensor(3.0)
    place_step_counts(optimizer, param)
    assert optimizer.state[param]["step"].device.type == ("meta" if fused else "cpu")
