"""Attention round a ring of ranks, and the pieces that it is put together from, against attention in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import runtime_models
import torch
from test_attention_splits import QUERIES, is_layer_class, split_plan
from test_parity import captured_of, graph_of
from test_runtime_collectives import world_axis
from torch.utils.checkpoint import checkpoint

from autopar.plan.plan import Recompute
from autopar.runtime import attention_blocks
from autopar.runtime.attention_blocks import attend, attend_backward
from autopar.runtime.collectives import all_gather
from autopar.runtime.local import LocalPool
from autopar.runtime.lowerings import special_program
from autopar.runtime.parity import compare
from autopar.runtime.ring_attention import pairs
from autopar.sharding.lowering import Lowering

aten = torch.ops.aten
T = torch.Tensor
SDPA = aten.scaled_dot_product_attention.default


def ring_errors(
    shapes: tuple[tuple[int, ...], ...], is_causal: bool, recomputed: bool = False, compiled: bool = False
) -> list[float]:
    """Of the output and of the gradients of queries, keys and values, put together from all ranks' parts."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    keywords: dict[str, Any] = {"scale": 0.4, "enable_gqa": shapes[0][-3] != shapes[1][-3]}
    whole = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = SDPA(*whole, None, 0.0, is_causal, **keywords)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected.backward(upstream)
    own = [x.chunk(axis.size, dim=-2)[axis.rank].clone().requires_grad_() for x in (query, key, value)]
    program = special_program("ring_attention", SDPA, axis)

    def run(*given: T) -> T:
        result: T = program(*given, None, 0.0, is_causal, **keywords)
        return result

    used = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    out = checkpoint(used, *own, use_reentrant=False) if recomputed else used(*own)
    out.backward(upstream.chunk(axis.size, dim=-2)[axis.rank])
    errors = []
    for part, reference in zip(
        (out.detach(), *(x.grad for x in own)), (expected.detach(), *(x.grad for x in whole)), strict=True
    ):
        assert part is not None and reference is not None
        together = all_gather(axis, part, part.dim() - 2, 1)
        errors.append(((together - reference).abs().max() / reference.abs().max()).item())
    return errors


def all_ring_errors(cases: list[tuple[tuple[int, ...], ...]], is_causal: bool) -> list[list[float]]:
    return [ring_errors(shapes, is_causal) for shapes in cases]


def shapes_of(length: int, keys: int, heads: int, width: int = 8) -> tuple[tuple[int, ...], ...]:
    return (3, heads, length, 8), (3, 2, keys, 8), (3, 2, keys, width)


@pytest.mark.processes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring(pool: LocalPool, size: int, is_causal: bool) -> None:
    rows = [size * 4, size * 3, size]  # parts of even and odd length, and of a single row
    cases = [shapes_of(length, length, heads, width) for length in rows for heads, width in ((2, 8), (6, 8), (6, 5))]
    if not is_causal:
        cases.append(shapes_of(4 * size, 2 * size, 6))  # other keys than queries
    for errors in pool.run(all_ring_errors, cases, is_causal, num_ranks=size):
        assert len(errors) == len(cases) and max(map(max, errors)) < 1e-13, errors


@pytest.mark.processes
@pytest.mark.parametrize("is_causal", [False, True])
def test_recomputed_and_compiled(pool: LocalPool, is_causal: bool) -> None:
    for options in ((True, False), (False, True), (True, True)):
        for errors in pool.run(ring_errors, shapes_of(8, 8, 6), is_causal, *options, num_ranks=2):
            assert max(errors) < 1e-13, options


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("size", "rows"), [(2, 4), (3, 5), (4, 1), (5, 2)])
def test_every_query_meets_its_keys_once(size: int, rows: int, is_causal: bool) -> None:
    half = rows // 2
    place = torch.arange(size * rows).view(size, rows)
    if is_causal:
        place = torch.cat((place[:, :half], place.flip(0)[:, half:]), dim=1)
    met = torch.zeros(size * rows, size * rows, dtype=torch.int64)
    for rank in range(size):
        for other in range(size):
            for queries, keys, is_same in pairs(size, rank, other, rows, rows, is_causal):
                q, k = place[rank, queries], place[other, keys]
                part = torch.ones(len(q), len(k), dtype=torch.int64)
                assert not is_same or torch.equal(q, k)
                met[q[:, None], k] += part.tril() if is_same else part
    expected = torch.ones_like(met)
    assert torch.equal(met, expected.tril() if is_causal else expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_under_a_causal_mask_every_step_is_the_same_work_on_every_rank(size: int) -> None:
    def work(rank: int, step: int) -> float:
        found = pairs(size, rank, (rank - step) % size, 4, 4, True)
        return sum(0.5 if is_same else 1.0 for _, _, is_same in found)

    assert {work(rank, step) for rank in range(size) for step in range(size)} == {2.0}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
def test_the_written_out_scores_are_the_kernel_s(
    monkeypatch: pytest.MonkeyPatch, heads: int, is_causal: bool
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, number, 6, 8, dtype=torch.float64) for number in (heads, 2, 2))
    grad = torch.randn_like(query)

    def run() -> list[T]:
        out, log_sum = attend(query, key, value, is_causal, 0.3)
        return [out, log_sum, *attend_backward(grad, query, key, value, out, log_sum, is_causal, 0.3)]

    kernel = run()
    monkeypatch.setattr(attention_blocks, "_is_cpu_flash", lambda *_: False)
    for found, expected in zip(run(), kernel, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_kernel_of_gpus_takes_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors: the arguments, and the shapes of results and gradients."""
    monkeypatch.setattr(attention_blocks, "can_use_flash", lambda *_: True)
    query, key, value = (
        torch.empty(2, heads, 16, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2, 2)
    )
    out, log_sum = attend(query, key, value, True, 0.1)
    assert (out.shape, log_sum.shape) == (query.shape, query.shape[:-1])
    grads = attend_backward(out, query, key, value, out, log_sum, True, 0.1)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "kind"),
    [("llama", Recompute.NONE), ("gpt2", Recompute.NONE), ("llama", Recompute.SELECTIVE), ("llama", Recompute.FULL)],
)
def test_models_whose_attention_goes_round(pool: LocalPool, model: str, kind: Recompute) -> None:
    plan, graph = split_plan(model, QUERIES, ring=True), graph_of(model, "float64")
    choice = next(choice for choice in plan.shardings if is_layer_class(graph, choice.cls))
    assert Lowering.RING_ATTENTION in {strategy.lowering for _, strategy in choice.ops}
    stages = tuple(replace(stage, recompute=kind) for stage in plan.stages)
    report = compare(
        getattr(runtime_models, model), replace(plan, stages=stages), steps=2, pool=pool,
        captured=captured_of(model, "float64"),
    )
    assert report.passed, f"loss {report.loss_error:.1e}, {report.worst}"
