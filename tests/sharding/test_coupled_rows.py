"""Rows that depend on one another keep a batch whole; plain PyTorch on the halves of a batch is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.api import _captured
from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError
from autopar.graph.capture import capture
from autopar.runtime.engine import Trainer
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.planner import PlanRequest, find_plan
from autopar.sharding.coupled_rows import coupled_rows, needs_whole_batch

ROWS, LENGTH, WIDTH = 8, 6, 4
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layers(nn.Module):
    """A layer; a function of hidden states (rows, length, width), ids (rows, length), neighbours (rows,); a layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), function
        self.table = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def forward(self, x: Tensor, ids: Tensor, near: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) + self.table[ids]
        return self.last(self.function(hidden, ids, near)).square().mean()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64),
        "ids": torch.randint(0, LENGTH, (ROWS, LENGTH)), "near": torch.randint(0, ROWS // 2, (ROWS,)),
    }


def numbers(like: Tensor) -> Tensor:
    return torch.arange(like.shape[0])


def by_first_of_flat(h: Tensor, ids: Tensor, near: Tensor) -> Tensor:
    return h.flatten(0, 1)[ids + numbers(h)[:, None] * LENGTH]


def added_in_flat(h: Tensor, ids: Tensor, near: Tensor) -> Tensor:
    flat = h.flatten(0, 1)
    return torch.zeros_like(flat).index_add(0, (ids + numbers(h)[:, None] * LENGTH).flatten(), flat).view_as(h)


def written(h: Tensor, ids: Tensor, near: Tensor) -> Tensor:
    mask = torch.zeros(h.shape[0], LENGTH, dtype=torch.bool)
    mask[numbers(h), ids[:, 0]] = True
    return h.masked_fill(mask[..., None], 0.5)


def in_windows(h: Tensor, ids: Tensor, near: Tensor) -> Tensor:
    return (h.view(-1, 2, 3, WIDTH).transpose(1, 2).flatten(0, 1) * 2).view(-1, LENGTH, WIDTH)


APART: dict[str, Function] = {
    "last_token": lambda h, ids, near: h[numbers(h), ids[:, 0]],
    "gathered": lambda h, ids, near: h.gather(1, ids[..., None].expand_as(h)),
    "flat_look_up": by_first_of_flat, "flat_sum": added_in_flat, "written": written, "windows": in_windows,
    "sequence_first": lambda h, ids, near: h.transpose(0, 1).cumsum(0).transpose(0, 1),
    "softmax": lambda h, ids, near: h.softmax(1) + h.roll(1, 1) + h.flip(1),
    "both_halves": lambda h, ids, near: torch.cat([h, 2 * h]).tanh().chunk(2)[1],
    "attention": lambda h, ids, near: F.scaled_dot_product_attention(h, h, h),
    "row_mean": lambda h, ids, near: h - h.mean((1, 2), keepdim=True),
    "own_size": lambda h, ids, near: h / h.shape[1],
    "a_token_for_all": lambda h, ids, near: torch.cat([h.new_ones(1, 1, WIDTH).expand(h.shape[0], -1, -1), h], 1),
}
COUPLED: dict[str, Function] = {
    "roll": lambda h, ids, near: h + h.roll(1, 0),
    "flip": lambda h, ids, near: h * h.flip(0),
    "flat_roll": lambda h, ids, near: h + h.flatten(0, 1).roll(1, 0).view_as(h),
    "neighbours": lambda h, ids, near: h * h[near],
    "selected": lambda h, ids, near: h * h.index_select(0, near),
    "added": lambda h, ids, near: torch.zeros_like(h).index_add(0, near, h),
    "gathered": lambda h, ids, near: h * h.gather(0, near[:, None, None].expand_as(h)),
    "embedding": lambda h, ids, near: h[:, 0] * F.embedding(near, h[:, 0]),
    "softmax": lambda h, ids, near: h.softmax(0) * h.shape[0],
    "running_sum": lambda h, ids, near: h.cumsum(0),
    "sort": lambda h, ids, near: h.sort(0).values * h,
    "attention": lambda h, ids, near: h * F.scaled_dot_product_attention(*[h.transpose(0, 1)] * 3).transpose(0, 1),
    "products": lambda h, ids, near: (h[:, 0] @ h[:, 0].T).softmax(-1) @ h[:, 0],
    "convolution": lambda h, ids, near: h[:, 0] * F.conv1d(h[:, 0].T[:, None], h.new_ones(1, 1, 3), padding=1)[:, 0].T,
    "centred": lambda h, ids, near: h - h.mean(0),
    "centred_without_gradient": lambda h, ids, near: h - h.detach().mean(0),
    "largest": lambda h, ids, near: h / h.detach().abs().max(),
    "shares": lambda h, ids, near: h * (h.detach().exp() / h.detach().exp().sum()),
    "first": lambda h, ids, near: h - h[0],
    "positions": lambda h, ids, near: h * (1 + numbers(h)[:, None, None]),
    "half_of_the_positions": lambda h, ids, near: torch.where((numbers(h) > 3)[:, None, None], h, -h),
    "grid": lambda h, ids, near: h * torch.linspace(0, 1, h.shape[0], dtype=h.dtype)[:, None, None],
    "unit": lambda h, ids, near: h[:, 0] + torch.eye(h.shape[0], WIDTH, dtype=h.dtype),
    "number_of_rows": lambda h, ids, near: h / h.shape[0],
}


def halves_give_the_whole(model: nn.Module) -> bool:
    whole = batch()
    parts = [model(**{name: value[rows] for name, value in whole.items()}) for rows in (slice(4), slice(4, 8))]
    return bool(torch.isclose(model(**whole), (parts[0] + parts[1]) / 2, rtol=1e-10))


def model_of(function: Function) -> nn.Module:
    torch.manual_seed(0)
    return Layers(function).double()


@pytest.mark.parametrize("name", APART)
def test_rows_apart(name: str) -> None:
    model = model_of(APART[name])
    assert halves_give_the_whole(model)
    assert not needs_whole_batch(capture(model, batch(), tag_rows=True).graph)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_rows(name: str) -> None:
    model = model_of(COUPLED[name])
    assert not halves_give_the_whole(model)
    found = coupled_rows(capture(model, batch(), tag_rows=True).graph)
    assert "test_coupled_rows.py" in found and "depend on one another" in found and "\n" not in found


class Counted(nn.Module):
    """Keeps a running mean over all rows, as observations in reinforcement learning are normalized."""

    def __init__(self, *, momentum: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.layer, self.momentum = nn.Linear(WIDTH, WIDTH), momentum

    def forward(self, x: Tensor, ids: Tensor, near: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor)
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1) if self.momentum else self.mean.add_(1)
        return self.layer(x - self.mean).square().mean()


def test_a_buffer_that_collects_rows() -> None:
    assert "aten.mean" in coupled_rows(capture(Counted(momentum=True).double(), batch(), tag_rows=True).graph)
    assert not coupled_rows(capture(Counted(momentum=False).double(), batch(), tag_rows=True).graph)


def test_no_plan_parts_them_and_a_given_one_is_refused() -> None:
    model = model_of(COUPLED["roll"])
    captured = _captured(model, batch(), None, "float64")
    cluster = parse_cluster("2xH100-80GB")
    request: dict[str, Any] = dict(global_batch=ROWS, dtype="float64", param_dtype="float64")
    plan = find_plan(captured.graph, cluster, PlanRequest(**request))
    assert plan.num_micro_batches == 1 and plan.stages[0].mesh.dp == 1
    assert [note for note in plan.notes if "aten.roll" in note]
    with pytest.raises(InputError, match=r"mesh dp=2 .*: aten\.roll\.default at .* depend on one another"):
        find_plan(captured.graph, cluster, PlanRequest(**request, mesh=(("dp", 2),)))
    parted = plan_from_degrees(captured.graph, parse_cluster("1xH100-80GB"), Degrees(**request, micro_batch=4))
    with pytest.raises(InputError, match=r"computes the batch in 2 parts, and aten\.roll\.default"):
        Trainer(model, parted, captured, torch.optim.SGD)
