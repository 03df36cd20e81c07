"""Products by group: in one kernel and one by one, with groups that have no rows."""

from __future__ import annotations

import pytest
import torch

from autopar.graph import grouped

SPANS = {
    "all": ((0, 0, 3), (1, 3, 4), (2, 4, 10)),
    "some": ((0, 0, 3), (2, 3, 10)),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", SPANS)
def test_one_kernel_gives_what_a_product_a_group_gives(
    groups: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped._grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    torch.manual_seed(0)
    spans = SPANS[groups]
    weight = torch.randn(3, 16, 8) if not transposed else torch.randn(3, 8, 16).transpose(1, 2)
    rows, grads = torch.randn(10, 16), torch.randn(10, 8)
    narrow = [x.to(torch.bfloat16) for x in (rows, weight, grads)]
    assert grouped._in_one_kernel(narrow[0], 8)
    assert not grouped._in_one_kernel(rows, 8)
    found = grouped.grouped_product(narrow[0], narrow[1], spans)
    grad = grouped.grouped_weight_gradient(narrow[0], narrow[2], narrow[1], spans)
    assert grad.stride() == narrow[1].stride()
    wide = [x.float() for x in narrow]
    torch.testing.assert_close(found.float(), grouped.grouped_product(wide[0], wide[1], spans), rtol=1e-2, atol=1e-2)
    wanted = grouped.grouped_weight_gradient(wide[0], wide[2], wide[1], spans)
    torch.testing.assert_close(grad.float(), wanted, rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(grouped, "_grouped_mm", None)
    again = grouped.grouped_product(narrow[0], narrow[1], spans)
    torch.testing.assert_close(found, again, rtol=1e-2, atol=1e-2)


def test_a_product_is_each_row_with_its_group_s_matrix() -> None:
    rows, weight = torch.arange(6.0).view(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2), 3 * torch.eye(2)])
    out = grouped.grouped_product(rows, weight, ((0, 0, 1), (2, 1, 3)))
    assert out.tolist() == [[0, 1], [6, 9], [12, 15]]
    grad = grouped.grouped_weight_gradient(rows, torch.ones(3, 2), weight, ((0, 0, 1), (2, 1, 3)))
    assert grad.tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, 0]], [[6, 6], [8, 8]]]
