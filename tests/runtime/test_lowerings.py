"""The special programs against the whole op in one process."""

from __future__ import annotations

import pytest
import torch
from test_runtime_collectives import world_axis
from torch.utils.checkpoint import checkpoint

from autopar.runtime.collectives import Axis, all_gather, all_reduce
from autopar.runtime.local import LocalPool
from autopar.runtime.lowerings import special_program

pytestmark = pytest.mark.processes
aten = torch.ops.aten


def embedding_errors() -> list[float]:
    """Of the value and of the gradient, with padding on each side of the split."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, 12, (3, 7), generator=generator)
    upstream = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    errors = []
    for padding in (-1, 1, 11):
        whole = weight.clone().requires_grad_()
        aten.embedding.default(whole, ids, padding).backward(upstream)
        local = weight.chunk(axis.size)[axis.rank].clone().requires_grad_()
        program = special_program("vocab_parallel_embedding", aten.embedding.default, axis)
        out = program(local, ids, padding)
        out.backward(upstream)
        assert local.grad is not None and whole.grad is not None
        errors.append((all_reduce(axis, out.detach()) - weight[ids]).abs().max().item())
        errors.append((local.grad - whole.grad.chunk(axis.size)[axis.rank]).abs().max().item())
    return errors


def embedding_bag_errors() -> list[float]:
    """Of the bags, of the table's gradient and of the weights', with and without weights of the samples."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    ids, starts = torch.randint(0, 12, (9,), generator=generator), torch.tensor([0, 2, 2, 6])
    weights = torch.randn(9, dtype=torch.float64, generator=generator)
    upstream = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    program = special_program("vocab_parallel_embedding_bag", aten.embedding_bag.default, axis)
    errors = []
    for weighted in (False, True):
        whole, expected_weights = table.clone().requires_grad_(), weights.clone().requires_grad_()
        expected = aten.embedding_bag.default(
            whole, ids, starts, False, 0, False, expected_weights if weighted else None
        )[0]
        expected.backward(upstream)
        local = table.chunk(axis.size)[axis.rank].clone().requires_grad_()
        own = weights.clone().requires_grad_()
        out = program(local, ids, starts, False, 0, False, own if weighted else None)[0]
        out.backward(upstream)
        assert local.grad is not None and whole.grad is not None
        errors.append((all_reduce(axis, out.detach()) - expected.detach()).abs().max().item())
        errors.append((local.grad - whole.grad.chunk(axis.size)[axis.rank]).abs().max().item())
        if weighted:
            assert own.grad is not None and expected_weights.grad is not None
            errors.append((all_reduce(axis, own.grad) - expected_weights.grad).abs().max().item())
    return errors


def cross_entropy_errors() -> list[float]:
    """Of value and gradient for each reduction, with ignored targets and large logits; then with three dims."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for shape in ((9, 12), (3, 12, 4)):
        logits = torch.randn(shape, dtype=torch.float64, generator=generator) * 30 + 1000
        target = torch.randint(0, 12, (shape[0], *shape[2:]), generator=generator)
        target.view(-1)[::4] = -7
        for reduction in (1, 2):
            whole = logits.clone().requires_grad_()
            expected = aten.cross_entropy_loss.default(whole, target, None, reduction, -7)
            expected.backward()
            local = logits.chunk(axis.size, dim=1)[axis.rank].clone().requires_grad_()
            program = special_program("vocab_parallel_cross_entropy", aten.cross_entropy_loss.default, axis)
            loss = program(local, target, None, reduction, -7)
            loss.backward()
            assert local.grad is not None and whole.grad is not None
            errors.append(abs(loss.item() - expected.item()))
            errors.append((local.grad - whole.grad.chunk(axis.size, dim=1)[axis.rank]).abs().max().item())
    return errors


def random_streams() -> tuple[bool, bool, bool]:
    """Ranks draw different masks; the global stream stays equal; recomputation repeats the mask."""
    axis = world_axis()
    torch.manual_seed(3)
    program = special_program("axis_random", aten.dropout.default, axis)
    ones = torch.ones(64, requires_grad=True)
    masks = all_gather(axis, program(ones.detach(), 0.5, True), 0, 1).view(axis.size, -1)
    streams = all_gather(axis, torch.rand(1), 0, 1)
    out = checkpoint(lambda x: program(x, 0.5, True) * x, ones, use_reentrant=False)
    out.sum().backward()
    assert ones.grad is not None
    repeats = torch.equal(ones.grad, 2 * out.detach())
    return not torch.equal(masks[0], masks[1]), bool((streams == streams[0]).all()), repeats


def first_rank_bias_errors() -> list[float]:
    """linear and addmm with a split sum: the bias counts once."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    part, columns = x.chunk(axis.size, dim=1)[axis.rank], weight.chunk(axis.size, dim=1)[axis.rank]
    expected = torch.nn.functional.linear(x, weight, bias)
    linear = special_program("bias_on_first_rank", aten.linear.default, axis, bias_position=2)
    addmm = special_program("bias_on_first_rank", aten.addmm.default, axis, bias_position=0)
    found = (linear(part, columns, bias), linear(part, columns, bias=bias), addmm(bias, part, columns.t()))
    return [(all_reduce(axis, one) - expected).abs().max().item() for one in found]


def causal_context_errors(size: int) -> list[float]:
    """Of the output and of the three gradients, for the parts of the queries one after another: nothing is sent."""
    generator = torch.Generator().manual_seed(0)
    op = aten.scaled_dot_product_attention.default
    errors = []
    for heads, keywords in ((2, {}), (6, {"enable_gqa": True, "scale": 0.4})):
        query, key, value, upstream = (
            torch.randn(3, number, 12, 4, dtype=torch.float64, generator=generator) for number in (heads, 2, 2, heads)
        )
        whole = [x.clone().requires_grad_() for x in (query, key, value)]
        expected = op(*whole, None, 0.0, True, **keywords)
        expected.backward(upstream)
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        outputs = []
        for rank, part in enumerate(leaves[0].chunk(size, dim=2)):
            axis = Axis(group_name="", size=size, rank=rank)
            outputs.append(special_program("causal_context", op, axis)(part, *leaves[1:], None, 0.0, True, **keywords))
        found = torch.cat(outputs, dim=2)
        found.backward(upstream)
        errors.append((found - expected).abs().max().item())
        errors += [(a.grad - b.grad).abs().max().item() for a, b in zip(leaves, whole, strict=True)]
    return errors


@pytest.mark.parametrize("size", [1, 2, 3])
def test_causal_attention_of_a_part_of_the_queries(size: int) -> None:
    assert max(causal_context_errors(size)) < 1e-12


def test_causal_attention_drops_other_weights_on_each_rank() -> None:
    query = torch.ones(1, 1, 8, 4)
    value = torch.eye(16)[None, None]
    op = aten.scaled_dot_product_attention.default
    drawn = []
    for rank in (0, 1, 1):
        torch.manual_seed(0)
        program = special_program("causal_context", op, Axis(group_name="", size=2, rank=rank))
        drawn.append(program(query, torch.ones(1, 1, 16, 4), value, None, 0.5, True)[0, 0])
    assert torch.equal(drawn[1], drawn[2])
    lower = torch.ones(8, 8).tril().bool()
    kept = [part[lower] > 0 for part in (drawn[0][:, :8], drawn[1][:, 8:])]
    assert all(0 < int(part.sum()) < part.numel() for part in kept)
    assert not torch.equal(*kept)


def test_embedding_with_a_split_vocabulary(pool: LocalPool) -> None:
    for errors in pool.run(embedding_errors, num_ranks=2):
        assert max(errors) < 1e-12


def test_bags_with_a_split_vocabulary(pool: LocalPool) -> None:
    for errors in pool.run(embedding_bag_errors, num_ranks=2):
        assert max(errors) < 1e-12


def test_cross_entropy_with_a_split_vocabulary(pool: LocalPool) -> None:
    for errors in pool.run(cross_entropy_errors, num_ranks=2):
        assert max(errors) < 1e-10


def test_random_ops_on_shards(pool: LocalPool) -> None:
    assert pool.run(random_streams, num_ranks=2) == [(True, True, True)] * 2


def test_bias_on_the_first_rank(pool: LocalPool) -> None:
    for errors in pool.run(first_rank_bias_errors, num_ranks=2):
        assert max(errors) < 1e-12
