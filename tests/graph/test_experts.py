"""The experts op: what transformers' modules compute, whatever their layout, and the text of their gates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import graph_models as models
import pytest
import torch
from torch import Tensor, nn

from autopar.errors import CaptureError
from autopar.graph.capture import capture
from autopar.graph.experts import EXPERTS_OP, gate_layout, gate_program, gate_text
from autopar.graph.file import graph_from_json, graph_to_json
from autopar.graph.interpret import run
from autopar.runtime.parity import precision

transformers = models.transformers
_SIZES = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=97, max_position_embeddings=64, use_cache=False)


def _build(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().train()
    for name, param in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(param, std=0.3)  # far enough from zero that a clamp and a bias show
    return model


CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_SIZES, head_dim=8, layers_block_type=["moe", "moe"], n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_has_one_op_with_the_module_s_numbers(name: str) -> None:
    model, batch = _build(CONFIGS[name]()), models.token_batch(97)
    with precision("float64"):
        captured = capture(model, batch)
        expected = model(**batch).loss
    assert model.config._experts_implementation == "eager"
    found = [op for cls in captured.graph.classes for op in cls.ops if op.target == EXPERTS_OP]
    assert len(found) == 1, "two equal layers have one class with one op"
    targets = {op.target for cls in captured.graph.classes for op in cls.ops}
    assert not targets & {"aten.sort.default", "aten.histc.default", "transformers.grouped_mm_fallback.default"}
    loss = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    params = [model.get_parameter(name) for name in names]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True)
    for name, (found_grad, grad) in zip(names, pairs, strict=True):
        torch.testing.assert_close(found_grad, grad, rtol=1e-9, atol=1e-13, msg=name)


def test_its_cost_counts_the_chosen_experts_alone() -> None:
    graph = capture(*models.mixtral(num_local_experts=8, num_experts_per_tok=3)).graph
    (op,) = [op for cls in graph.classes for op in cls.ops if op.target == EXPERTS_OP]
    tokens = 3 * 12
    assert op.flops == 2 * tokens * 3 * 3 * 32 * 48
    assert op.backward_flops == 2 * op.flops
    assert op.saved_extra_bytes == tokens * 3 * 2 * 48 * 4


def test_layers_whose_gates_differ_are_told_apart() -> None:
    model = _build(CONFIGS["gpt_oss"]())
    model.model.layers[1].mlp.experts.limit = 0.5
    batch = models.token_batch(97)
    captured = capture(model, batch)
    assert len([op for cls in captured.graph.classes for op in cls.ops if op.target == EXPERTS_OP]) == 2
    loss = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


@pytest.mark.parametrize("config", [
    lambda **settings: transformers.MixtralConfig(**_SIZES, num_local_experts=4, **settings),
    lambda **settings: transformers.Qwen3MoeConfig(
        **_SIZES, head_dim=8, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, **settings),
], ids=["mixtral", "qwen3_moe"])
def test_the_loss_that_balances_routers_is_the_module_s(config: Callable[..., Any]) -> None:
    model, batch = _build(config(output_router_logits=True, router_aux_loss_coef=0.5)), models.token_batch(97)
    with precision("float64"):
        captured = capture(model, batch)
        output = model(**batch)
    assert output.aux_loss.item() > 0.1
    layers = [block for block in captured.graph.blocks if "layers" in block.name]
    assert len({block.cls for block in layers}) == 1, "two equal layers have one class"
    assert len(captured.graph.block_class[layers[0].cls].outputs) == 2, "hidden states, and logits of its router"
    loss = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-7)  # its sums are in float32
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    params = [model.get_parameter(name) for name in names]
    pairs = zip(torch.autograd.grad(loss, params), torch.autograd.grad(output.loss, params), strict=True)
    for name, (found_grad, grad) in zip(names, pairs, strict=True):
        torch.testing.assert_close(found_grad, grad, rtol=1e-6, atol=1e-9, msg=name)


def test_the_router_s_loss_is_refused_where_its_logits_leave_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
    with pytest.raises(CaptureError, match="set output_router_logits=False"):
        capture(*models.mixtral(output_router_logits=True))


def test_a_graph_with_experts_is_written_and_read() -> None:
    graph = capture(*models.mixtral()).graph
    assert graph_from_json(graph_to_json(graph)) == graph


@pytest.mark.parametrize(("gate", "width", "layout"), [
    (lambda x: torch.relu(x) ** 2, 6, "single"),
    (lambda x: nn.functional.gelu(x[:, :3], approximate="tanh") * x[:, 3:], 6, ""),  # a literal size
    (lambda x: x.chunk(2, -1)[0].tanh() * x.chunk(2, -1)[1], 8, "halves"),
    (lambda x: x[..., 1::2] / (1 + x[..., ::2].abs()), 8, "pairs"),
    (lambda x: x.softmax(-1), 6, ""),
    (lambda x: x.view(-1, 3, 2).amax(1), 6, ""),
])
def test_the_text_of_a_gate_is_its_function(gate: Any, width: int, layout: str) -> None:
    text = gate_text(gate, width, torch.float64)
    assert text is not None
    rows = torch.randn(5, width, dtype=torch.float64)
    assert torch.equal(gate_program(text)(rows), gate(rows))
    assert gate_layout(text, width) == layout


def test_the_op_keeps_torch_s_rules_for_ops_and_compiles_whole() -> None:
    def gate(rows: Tensor) -> Tensor:
        return torch.relu(rows[..., ::2]) * rows[..., 1::2]

    text = gate_text(gate, 8, torch.float64)
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (6, 2), (4, 8, 3), (4, 3, 4), (4, 8), (4, 3))
    hidden, weights, *held = [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    ]
    index = torch.randint(-1, 5, (6, 2), generator=generator)
    given = (hidden, index, weights, *held, False, text)
    torch.library.opcheck(torch.ops.autopar.experts.default, given)

    def doubled(*args: Any) -> Tensor:
        result: Tensor = torch.ops.autopar.experts(2 * args[0], *args[1:])[0].sin()
        return result

    leaves = [hidden, weights, *held]
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(run_(*given).sum(), leaves) for run_ in (compiled, doubled))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.scale


@pytest.mark.parametrize("gate", [
    _Scaled(), nn.Dropout(0.5), lambda x: x - x.mean(0), lambda x: x if x.sum() > 0 else -x,
], ids=["parameters", "random", "across rows", "branches"])
def test_a_gate_that_is_no_fixed_list_of_ops_has_no_text(gate: Any) -> None:
    assert gate_text(gate, 6, torch.float64) is None
