"""The special programs against the whole op in one process."""

from __future__ import annotations

import pytest
import torch
from test_runtime_collectives import world_axis
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autopar.runtime import lowerings
from autopar.runtime.collectives import Axis, all_gather, all_reduce, take_shard
from autopar.runtime.local import LocalPool
from autopar.runtime.lowerings import special_program

pytestmark = pytest.mark.processes
aten = torch.ops.aten


def embedding_errors(num_rows: int) -> list[float]:
    """Of the value and of the gradient, with padding on each side of the split; an uneven table ends in zeros."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_rows, 5, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, num_rows, (3, 7), generator=generator)
    upstream = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    errors = []
    for padding in (-1, 1, num_rows - 1):
        whole = weight.clone().requires_grad_()
        aten.embedding.default(whole, ids, padding).backward(upstream)
        local = take_shard(axis, weight, 0, 1, num_rows).requires_grad_()
        program = special_program("vocab_parallel_embedding", aten.embedding.default, axis)
        out = program(local, ids, padding)
        out.backward(upstream)
        assert local.grad is not None and whole.grad is not None
        errors.append((all_reduce(axis, out.detach()) - weight[ids]).abs().max().item())
        errors.append((local.grad - take_shard(axis, whole.grad, 0, 1, num_rows)).abs().max().item())
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


def cross_entropy_errors(num_classes: int) -> list[float]:
    """Of value and gradient for each reduction, with ignored targets and large logits; then with three dims.

    Logits of an uneven number of classes are padded with zeros, which are far above those of the classes.
    """
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for shape in ((9, num_classes), (3, num_classes, 4)):
        logits = torch.randn(shape, dtype=torch.float64, generator=generator) * 30
        logits += 1000 if num_classes % axis.size == 0 else -1000
        target = torch.randint(0, num_classes, (shape[0], *shape[2:]), generator=generator)
        target.view(-1)[::4] = -7
        for reduction in (1, 2):
            whole = logits.clone().requires_grad_()
            expected = aten.cross_entropy_loss.default(whole, target, None, reduction, -7)
            expected.backward()
            local = take_shard(axis, logits, 1, 1, num_classes).requires_grad_()
            program = special_program(
                "vocab_parallel_cross_entropy", aten.cross_entropy_loss.default, axis,
                num_classes=num_classes if num_classes % axis.size else 0,
            )
            loss = program(local, target, None, reduction, -7)
            loss.backward()
            assert local.grad is not None and whole.grad is not None
            errors.append(abs(loss.item() - expected.item()))
            errors.append((local.grad - take_shard(axis, whole.grad, 1, 1, num_classes)).abs().max().item())
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


def causal_context_errors(length: int) -> list[float]:
    """Of this rank's part of the output and of the gradients of its queries and of all keys and values."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    op = aten.scaled_dot_product_attention.default
    program = special_program("causal_context", op, axis)
    errors = []
    for heads, keywords in ((2, {}), (6, {"enable_gqa": True, "scale": 0.4})):
        query, key, value, upstream = (
            torch.randn(3, number, length, 4, dtype=torch.float64, generator=generator)
            for number in (heads, 2, 2, heads)
        )
        whole = [x.clone().requires_grad_() for x in (query, key, value)]
        expected = op(*whole, None, 0.0, True, **keywords)
        expected.backward(upstream)
        own = [x.chunk(axis.size, dim=2)[axis.rank] for x in (query, upstream, expected.detach(), whole[0].grad)]
        leaves = [x.clone().requires_grad_() for x in (own[0], key, value)]
        found = program(*leaves, None, 0.0, True, **keywords)
        found.backward(own[1])
        errors += [(found - own[2]).abs().max().item(), (leaves[0].grad - own[3]).abs().max().item()]
        errors += [
            (all_reduce(axis, part.grad) - one.grad).abs().max().item()
            for part, one in zip(leaves[1:], whole[1:], strict=True)
        ]
    return errors


@pytest.mark.parametrize(("size", "length"), [(2, 8), (3, 9), (4, 12), (4, 4)])
def test_causal_attention_of_a_part_of_the_queries(pool: LocalPool, size: int, length: int) -> None:
    for errors in pool.run(causal_context_errors, length, num_ranks=size):
        assert len(errors) == 8
        assert max(errors) < 1e-12


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_rank_attends_to_equally_many_keys(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []

    def count(query: Tensor, start: int, *_: object) -> Tensor:
        pairs[-1] += sum(range(start + 1, start + query.shape[-2] + 1))
        return query

    monkeypatch.setattr(lowerings, "attend_from", count)
    monkeypatch.setattr(lowerings, "exchange_mirrored", lambda axis, x: x)
    query, keys = torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6 * size, 2)
    for rank in range(size):
        pairs.append(0)
        axis = Axis(group_name="", size=size, rank=rank)
        special_program("causal_context", aten.scaled_dot_product_attention.default, axis)(query, keys, keys)
    assert len(set(pairs)) == 1
    assert sum(pairs) == sum(range(1, 6 * size + 1))


def causal_dropout() -> tuple[list[Tensor], bool]:
    """Which weights this rank keeps in the second half of its rows, and whether the same draw keeps the same."""
    axis = world_axis()
    length = 8 * axis.size
    program = special_program("causal_context", aten.scaled_dot_product_attention.default, axis)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        query, key = torch.ones(1, 1, 8, 4), torch.ones(1, 1, length, 4)
        drawn.append(program(query, key, torch.eye(length)[None, None], None, 0.5, True)[0, 0] > 0)
    own = drawn[0][:, axis.rank * 8 : (axis.rank + 1) * 8]
    lower = torch.ones(8, 8).tril().bool()
    return [own[:4][lower[:4]], own[4:][lower[4:]]], torch.equal(*drawn)


def test_causal_attention_drops_other_weights_on_each_rank(pool: LocalPool) -> None:
    first, second = pool.run(causal_dropout, num_ranks=2)
    assert first[1] and second[1]
    for one, other in zip(first[0], second[0], strict=True):
        assert 0 < int(one.sum()) < one.numel()
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("num_rows", "size"), [(12, 2), (11, 2), (5, 4)])
def test_embedding_with_a_split_vocabulary(pool: LocalPool, num_rows: int, size: int) -> None:
    for errors in pool.run(embedding_errors, num_rows, num_ranks=size):
        assert max(errors) < 1e-12


def test_bags_with_a_split_vocabulary(pool: LocalPool) -> None:
    for errors in pool.run(embedding_bag_errors, num_ranks=2):
        assert max(errors) < 1e-12


@pytest.mark.parametrize(("num_classes", "size"), [(12, 2), (11, 2), (5, 4)])  # 5 on 4: the last has padding alone
def test_cross_entropy_with_a_split_vocabulary(pool: LocalPool, num_classes: int, size: int) -> None:
    for errors in pool.run(cross_entropy_errors, num_classes, num_ranks=size):
        assert max(errors) < 1e-10


def test_random_ops_on_shards(pool: LocalPool) -> None:
    assert pool.run(random_streams, num_ranks=2) == [(True, True, True)] * 2


def test_bias_on_the_first_rank(pool: LocalPool) -> None:
    for errors in pool.run(first_rank_bias_errors, num_ranks=2):
        assert max(errors) < 1e-12
