"""Experts on several ranks, by the programs that run there, against the whole op in one process."""

from __future__ import annotations

import pytest
import torch
from test_runtime_collectives import world_axis

from autopar.graph.experts import gate_text
from autopar.runtime.collectives import all_reduce
from autopar.runtime.local import LocalPool
from autopar.runtime.lowerings import special_program

pytestmark = pytest.mark.processes
experts = torch.ops.autopar.experts.default


def _clamped(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows[..., ::2].clamp(max=1.0), rows[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(gate)


def expert_errors(lowering: str, chosen: str) -> list[float]:
    """Of this rank's output and gradients; with tokens that choose evenly, one expert alone, or none at times."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    t, k, e, d, f = 12, 2, 6, 5, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = [draw(t, d), draw(t, k), draw(e, d, 2 * f), draw(e, f, d), draw(e, 2 * f), draw(e, d)]
    index = torch.randint(0, e, (t, k), generator=generator)
    if chosen == "one":
        index.fill_(e - 1)
    if chosen == "none at times":
        index[::3, 0], index[1::3, 1] = e, -1
    upstream = draw(t, d)
    gate = gate_text(_clamped, 2 * f, torch.float64)
    hidden, weights, *held = [x.clone().requires_grad_() for x in tensors]
    whole = experts(hidden, index, weights, *held, True, gate)[0]
    wanted = torch.autograd.grad(whole, [hidden, weights, *held], upstream)

    def part(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(axis.size)[axis.rank]

    few_tokens = lowering == "expert_exchange"
    mine = [part(x) if i > 1 or few_tokens else x for i, x in enumerate(tensors)]
    hidden, weights, *held = [x.clone().requires_grad_() for x in mine]
    program = special_program(lowering, experts, axis)
    own_index = part(index) if few_tokens else index
    out = program(hidden, own_index, weights, *held, True, gate)[0]
    found = torch.autograd.grad(out, [hidden, weights, *held], part(upstream) if few_tokens else upstream)
    if few_tokens:
        pairs = [(out, part(whole)), *zip(found, map(part, wanted), strict=True)]
    else:
        summed = [all_reduce(axis, x.detach()) for x in (out, *found[:2])]
        pairs = [*zip(summed, (whole, *wanted[:2]), strict=True), *zip(found[2:], map(part, wanted[2:]), strict=True)]
    return [(a.detach() - b.detach()).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("chosen", ["evenly", "one", "none at times"])
@pytest.mark.parametrize("lowering", ["expert_exchange", "own_experts"])
def test_experts_on_several_ranks_equal_the_whole(pool: LocalPool, lowering: str, chosen: str, size: int) -> None:
    for errors in pool.run(expert_errors, lowering, chosen, num_ranks=size):
        assert len(errors) == 7
        assert max(errors) < 1e-12
