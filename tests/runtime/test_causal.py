"""Attention from a row on, against rows of the whole."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime import causal
from autopar.runtime.causal import attend_from

aten = torch.ops.aten


@pytest.mark.parametrize(("start", "rows"), [(0, 3), (0, 12), (3, 4), (11, 1), (8, 4)])
@pytest.mark.parametrize("heads", [2, 6])
def test_rows_of_the_whole(start: int, rows: int, heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, number, 12, 4, dtype=torch.float64) for number in (heads, 2, 2))
    whole = [x.clone().requires_grad_() for x in (query, key, value)]
    part = slice(start, start + rows)
    expected = aten.scaled_dot_product_attention.default(*whole, None, 0.0, True, scale=0.3, enable_gqa=True)
    upstream = torch.randn_like(expected[..., part, :])
    expected[..., part, :].backward(upstream)
    own = [query[..., part, :].clone().requires_grad_(), *(x.clone().requires_grad_() for x in (key, value))]
    found = attend_from(own[0], start, own[1], own[2], scale=0.3, enable_gqa=True)
    found.backward(upstream)
    torch.testing.assert_close(found, expected[..., part, :], rtol=1e-12, atol=1e-12)
    for leaf, reference in zip(own, (whole[0].grad[..., part, :], whole[1].grad, whole[2].grad), strict=True):
        torch.testing.assert_close(leaf.grad, reference, rtol=1e-12, atol=1e-12)


def test_the_flash_kernel_takes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors: its arguments, the shapes of the result and of the gradients, and no mask beside them."""
    monkeypatch.setattr(causal, "can_use_flash", lambda *_: True)
    made: list[tuple[int, ...]] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **given: made.append(shape) or ones(*shape, **given))
    query, key, value = (
        torch.empty(2, heads, rows, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads, rows in ((8, 16), (2, 64), (2, 64))
    )
    out = attend_from(query, 32, key, value, scale=0.1, enable_gqa=True)
    assert out.shape == (2, 8, 16, 64)
    assert "Flash" in str(out.grad_fn)
    out.sum().backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)
    assert not made


def test_the_mask_serves_where_flash_cannot_run() -> None:
    query = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    assert not causal.can_use_flash(query, query, query, 0.0, False)
