"""Splits of positions and of batch statistics on real processes, against the whole op in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_runtime_collectives import world_axis
from torch import Tensor

from autopar.graph.model_graph import Op, Ref, TensorInfo
from autopar.runtime.collectives import Axis, all_gather, all_reduce
from autopar.runtime.local import LocalPool
from autopar.runtime.lower import resolve_target
from autopar.runtime.lowerings import special_program
from autopar.sharding.local_args import local_op
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules import strategies
from autopar.sharding.rules.windows import Halo, halo_of

pytestmark = pytest.mark.processes
aten = torch.ops.aten

# (target, shape of the weight if there is one, what follows, which dim of positions is cut); inputs are (2, 4, 12, 6).
CASES: list[tuple[str, tuple[int, ...] | None, tuple[Any, ...], str]] = [
    ("conv2d.default", (4, 4, 3, 3), (None, [1, 1], [1, 1]), "x0"),
    ("conv2d.default", (4, 4, 3, 3), (None, [1, 1], [1, 1]), "x1"),
    ("conv2d.default", (4, 4, 3, 3), (None, [2, 2], [1, 1]), "x0"),  # borrows before alone
    ("conv2d.default", (4, 4, 5, 5), (None, [1, 1], [4, 4], [2, 2]), "x0"),
    ("conv_transpose2d.input", (4, 2, 3, 3), (None, [2, 2], [1, 1], [1, 1]), "x0"),  # borrows after alone
    ("max_pool2d.default", None, ([3, 3], [2, 2], [1, 1]), "x0"),
    ("avg_pool2d.default", None, ([3, 3], [1, 1], [1, 1]), "x0"),
    ("upsample_bilinear2d.vec", None, ([24, 12], False, None), "x0"),
    ("upsample_bicubic2d.vec", None, (None, False, [2.0, 2.0]), "x0"),
]


def _info(name: str, value: Tensor) -> TensorInfo:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorInfo(name=name, shape=tuple(value.shape), dtype=dtype, requires_grad=True)


def _error(axis: Axis, local: Tensor | None, whole: Tensor | None, dim: int) -> float:
    assert local is not None and whole is not None
    return (local - whole.chunk(axis.size, dim)[axis.rank]).abs().max().item()


def halo_errors() -> list[float]:
    """Of the value, of the input's gradient and of the weight's, for each case."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for target, weight_shape, rest, factor in CASES:
        x = torch.randn(2, 4, 12, 6, dtype=torch.float64, generator=generator).requires_grad_()
        shapes = [weight_shape] if weight_shape else []
        weights = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
        program = resolve_target(f"aten.{target}")
        whole = program(x, *weights, *rest)
        upstream = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
        whole.backward(upstream)

        tensors = {"x": _info("x", x), "y": _info("y", whole)}
        tensors.update((("w", _info("w", weights[0])),) if weights else ())
        arguments = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in rest)
        refs = (Ref("x"), *(Ref("w") for _ in weights))
        op = Op(name="op", target=f"aten.{target}", args=(*refs, *arguments), outputs=("y",))
        strategy = next(s for s in strategies(op, tensors, axis.size) if s.factor == factor)
        assert strategy.lowering == Lowering.SPATIAL_HALO
        dim = strategy.inputs[0].dim
        part = x.detach().chunk(axis.size, dim)[axis.rank].clone().requires_grad_()
        own = [w.detach().clone().requires_grad_() for w in weights]
        halo = halo_of(op, strategy, tensors, axis.size)
        local = local_op(op, strategy, tensors, axis.size)
        run = special_program(strategy.lowering, resolve_target(local.target), axis, halo=halo)
        following = [list(arg) if isinstance(arg, tuple) else arg for arg in local.args[1 + len(own) :]]
        named = {key: list(arg) if isinstance(arg, tuple) else arg for key, arg in local.kwargs}
        out = run(part, *own, *following, **named)
        out.backward(upstream.chunk(axis.size, dim)[axis.rank])
        errors.append(_error(axis, out.detach(), whole.detach(), dim))
        errors.append(_error(axis, part.grad, x.grad, dim))
        for mine, expected in zip(own, weights, strict=True):
            assert mine.grad is not None and expected.grad is not None
            errors.append((all_reduce(axis, mine.grad) - expected.grad).abs().max().item())
    return errors


def batch_norm_errors() -> list[float]:
    """Of values, gradients and running statistics: parts of the batch, of the positions and of the channels."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    errors = []
    cases = ((0, Lowering.SYNC_BATCH_NORM), (2, Lowering.SYNC_BATCH_NORM), (1, Lowering.CHANNEL_STATISTICS))
    for dim, lowering in cases:
        x = (torch.randn(6, 6, 12, 3, dtype=torch.float64, generator=generator) + 1000).requires_grad_()
        affine = [torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
        running = [torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)]
        updated = [value.clone() for value in running]
        rest = (True, 0.1, 1e-5, False)
        whole = aten.batch_norm.default(x, *affine, *updated, *rest)
        upstream = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
        whole.backward(upstream)

        part = x.detach().chunk(axis.size, dim)[axis.rank].clone().requires_grad_()
        own = [value.detach().clone() for value in affine]
        if dim == 1:
            own = [value.chunk(axis.size)[axis.rank].clone() for value in own]
        for value in own:
            value.requires_grad_()
        program = special_program(lowering, aten.batch_norm.default, axis)
        out = program(part, *own, *running, *rest)
        out.backward(upstream.chunk(axis.size, dim)[axis.rank])
        errors += [_error(axis, out.detach(), whole.detach(), dim), _error(axis, part.grad, x.grad, dim)]
        for mine, expected in zip(own, affine, strict=True):
            assert mine.grad is not None and expected.grad is not None
            found = all_gather(axis, mine.grad, 0, 1) if dim == 1 else all_reduce(axis, mine.grad)
            errors.append((found - expected.grad).abs().max().item())
        errors += [(mine - right).abs().max().item() for mine, right in zip(running, updated, strict=True)]
    return errors


def compiled_error() -> float:
    """A convolution of parts and its batch norm as torch.compile traces them, in one graph, against eager."""
    axis = world_axis()
    torch._dynamo.reset()
    sample = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(axis.rank))
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(9))
    info = {"x": ((2, 4, 6 * axis.size, 6)), "w": (4, 4, 3, 3), "y": (2, 4, 6 * axis.size, 6)}
    tensors = {n: TensorInfo(name=n, shape=s, dtype="float32", requires_grad=True) for n, s in info.items()}
    args = (Ref("x"), Ref("w"), None, (1, 1), (1, 1))
    op = Op(name="op", target="aten.conv2d.default", args=args, outputs=("y",))
    strategy = next(s for s in strategies(op, tensors, axis.size) if s.factor == "x0")
    halo = halo_of(op, strategy, tensors, axis.size)
    conv = special_program(Lowering.SPATIAL_HALO, aten.conv2d.default, axis, halo=halo)
    norm = special_program(Lowering.SYNC_BATCH_NORM, aten.batch_norm.default, axis)

    def block(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = norm(conv(x, w, None, [1, 1], [0, 1]), None, None, None, None, True, 0.1, 1e-5, False)
        return out.relu()

    grads = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        x, w = sample.clone().requires_grad_(), weight.clone().requires_grad_()
        out = run(x, w)
        out.square().sum().backward()
        assert x.grad is not None and w.grad is not None
        grads.append((out.detach(), x.grad, w.grad))
    return max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))


def half_precision_errors() -> list[float]:
    """Of value and gradient of a convolution of parts in bfloat16 and of its batch norm, against float32."""
    axis = world_axis()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 12, 6, generator=generator).bfloat16()
    weight = torch.randn(4, 4, 3, 3, generator=generator).bfloat16()
    scale = torch.rand(4, generator=generator).bfloat16()
    whole = x.float().requires_grad_()
    made = aten.conv2d.default(whole, weight.float(), None, [1, 1], [1, 1])
    expected = aten.batch_norm.default(made, scale.float(), None, None, None, True, 0.1, 1e-5, False)
    expected.square().mean(dim=(0, 1)).sum().backward()
    halo = Halo(dim=2, before=1, after=1, fill="zero", skip=0, keep=12 // axis.size)
    conv = special_program(Lowering.SPATIAL_HALO, aten.conv2d.default, axis, halo=halo)
    norm = special_program(Lowering.SYNC_BATCH_NORM, aten.batch_norm.default, axis)
    part = x.chunk(axis.size, 2)[axis.rank].clone().requires_grad_()
    out = norm(conv(part, weight, None, [1, 1], [0, 1]), scale, None, None, None, True, 0.1, 1e-5, False)
    assert out.dtype is torch.bfloat16
    out.float().square().mean(dim=(0, 1)).sum().backward()
    assert part.grad is not None and part.grad.dtype is torch.bfloat16
    return [_error(axis, out.detach(), expected.detach(), 2), _error(axis, part.grad, whole.grad, 2)]


def test_half_precision_on_two_ranks(pool: LocalPool) -> None:
    for errors in pool.run(half_precision_errors, num_ranks=2):
        assert max(errors) < 4e-2, errors


@pytest.mark.parametrize("size", [2, 3])
def test_positions_on_several_ranks(pool: LocalPool, size: int) -> None:
    for errors in pool.run(halo_errors, num_ranks=size):
        assert max(errors) < 1e-11


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norms_on_several_ranks(pool: LocalPool, size: int) -> None:
    for errors in pool.run(batch_norm_errors, num_ranks=size):
        assert max(errors) < 1e-9


def test_the_exchange_is_traced_in_one_graph(pool: LocalPool) -> None:
    assert max(pool.run(compiled_error, num_ranks=2)) < 1e-4
