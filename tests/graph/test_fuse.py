"""Chains of elementwise ops become kernels: the same numbers, less kept."""

from __future__ import annotations

from collections import Counter

import graph_models as models
import pytest
import torch
from test_saved_bytes import kept_bytes, predicted_bytes
from torch import Tensor, nn

from autopar.graph import kernels
from autopar.graph.capture import capture
from autopar.graph.interpret import run
from autopar.graph.kernels import ACTIVATIONS, MEAN, SUM

gated, cross_entropy = torch.ops.autopar.gated.default, torch.ops.autopar.cross_entropy.default


def targets(graph) -> Counter[str]:
    return Counter(op.target.split(".")[1] for cls in graph.classes for op in cls.ops)


def plain(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    functions = {"silu": nn.functional.silu, "relu": nn.functional.relu, "gelu": nn.functional.gelu,
                 "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}
    return functions[activation](gate) * up


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_product_and_its_gradients(activation: str) -> None:
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(gated(gate, up, activation), plain(gate, up, activation), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, activation), (gate, up))
    kept = kept_bytes(lambda: gated(gate, up, activation), [])
    assert kept == 2 * 5 * 7 * 8  # gate and up, not the activation


@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_cross_entropy_and_its_gradient(reduction: int) -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    other = logits.detach().clone().requires_grad_()
    target = torch.tensor([0, 10, -7, 3, 3, -7])
    found = cross_entropy(logits, target, None, reduction, -7, 0.0)
    expected = torch.ops.aten.cross_entropy_loss.default(other, target, None, reduction, -7)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-12, atol=1e-15)


def test_cross_entropy_of_narrow_logits_is_float32_and_keeps_one_tensor() -> None:
    logits = torch.randn(6, 1000, dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(6)
    loss = cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.float(), target))
    kept = kept_bytes(lambda: cross_entropy(logits, target), [])
    assert kept == pytest.approx(4 * 6 * 1000, rel=0.05)


def test_the_gradient_of_logits_is_made_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_NUMEL", 2 * 11)
    test_cross_entropy_and_its_gradient(MEAN)


def test_known_chains_become_kernels() -> None:
    for make, expected in ((models.llama, {"rms_norm": 3, "gated": 1, "cross_entropy": 1}),
                           (models.gpt2, {"gelu": 1, "cross_entropy": 1})):
        model, batch = make()
        model.config.use_cache = False
        found = targets(capture(model, batch, fuse=True).graph)
        assert {name: found[name] for name in expected} == expected
        assert not {"rsqrt", "tanh", "silu", "pow", "cross_entropy_loss"} & set(found)


def test_less_is_kept_in_low_precision() -> None:
    """Llama's layer: a SwiGLU without its activation. Its norms are one op in any capture."""
    model, batch = models.llama()
    model.config.use_cache = False
    fused = capture(model, batch, dtype="bfloat16", fuse=True).graph
    loose = capture(model, batch, dtype="bfloat16").graph
    cls = {"LlamaDecoderLayer"}
    layers = sum(block.cls in cls for block in fused.blocks)
    tokens, config = batch["input_ids"].numel(), model.config
    saving = predicted_bytes(loose, cls) - predicted_bytes(fused, cls)
    assert saving == layers * tokens * 2 * config.intermediate_size


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_the_loss_is_the_models_own(make) -> None:
    model, batch = make()
    model.config.use_cache = False
    captured = capture(model, batch, fuse=True)
    found = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-6, atol=0)


class Net(nn.Module):
    """One layer of a chain that looks like a known one."""

    def __init__(self, chain) -> None:
        super().__init__()
        self.linear, self.weight, self.chain = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(self, self.linear(x)).sum()


def written_out_norm(net: Net, x: Tensor) -> Tensor:
    wide = x.float()
    return net.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def written_out_gelu(net: Net, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3))))


@pytest.mark.parametrize(("chain", "kernel"), [(written_out_norm, "rms_norm"), (written_out_gelu, "gelu")])
def test_a_users_own_chain_becomes_the_kernel(chain, kernel: str) -> None:
    model, batch = Net(chain), (torch.randn(4, 8),)
    captured = capture(model, batch, fuse=True)
    assert targets(captured.graph)[kernel] == 1
    assert not {"tanh", "rsqrt"} & set(targets(captured.graph))
    params = dict(model.named_parameters())
    found = run(captured.graph, inputs={"0": batch[0]}, params=params, constants=captured.constants)
    expected = model(*batch)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(torch.autograd.grad(found, list(params.values()), allow_unused=True),
                           torch.autograd.grad(expected, list(params.values()), allow_unused=True), strict=True):
        torch.testing.assert_close(ours, plain)


def norm_of_something_else(net: Net, x: Tensor) -> Tensor:
    return net.weight * (x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-6))


def norm_over_rows(net: Net, x: Tensor) -> Tensor:
    return net.weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))


def norm_that_is_read_inside(net: Net, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.weight * (x * scale) + scale


def another_gelu(net: Net, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3))))


def an_activation_that_is_read_twice(net: Net, x: Tensor) -> Tensor:
    active = nn.functional.silu(x)
    return active * x + active


def a_gate_of_another_shape(net: Net, x: Tensor) -> Tensor:
    return nn.functional.silu(x[:, :1]) * x


@pytest.mark.parametrize("chain", [norm_of_something_else, norm_over_rows, norm_that_is_read_inside, another_gelu,
                                   an_activation_that_is_read_twice, a_gate_of_another_shape])
def test_what_is_not_the_chain_stays_as_it_is(chain) -> None:
    model, batch = Net(chain), (torch.randn(4, 8),)
    assert capture(model, batch, fuse=True).graph.classes == capture(model, batch).graph.classes
