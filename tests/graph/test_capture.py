"""Blocks and classes, shared ops, names, tagged rows, and that the model is left alone."""

from __future__ import annotations

import graph_models as models
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from autopar.errors import CaptureError
from autopar.graph.capture import capture
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.interpret import run
from autopar.graph.model_graph import ModelGraph


def classes_of(graph: ModelGraph) -> list[str]:
    return [block.cls for block in graph.blocks]


def test_llama_chain() -> None:
    graph = capture(*models.llama()).graph
    assert [block.name for block in graph.blocks] == [
        "prologue", "model.layers.0", "model.layers.1", "model.layers.2", "epilogue"]
    assert classes_of(graph).count("LlamaDecoderLayer") == 3
    assert graph.loss == graph.blocks[-1].outputs[0]
    assert graph.notes == ("LlamaRMSNorm: run as PyTorch's own op (equal but for rounding)",)
    cls = graph.block_class["LlamaDecoderLayer"]
    attention = next(op for op in cls.ops if op.target.startswith("aten.scaled_dot_product_attention"))
    assert attention.args[3] is None  # no mask is materialized
    assert attention.args[5] is True
    assert attention.module == "self_attn"
    assert attention.source.startswith("modeling_llama.py:")
    assert graph.boundary(2) == graph.blocks[1].outputs
    assert set(graph.param) == set(dict(models.llama()[0].named_parameters()))
    # cos and sin are computed once, for all layers
    assert len(graph.shared.outputs) == 2
    assert set(graph.shared.outputs) <= set(graph.blocks[1].inputs)


def test_class_tensors_are_complete() -> None:
    for model, batch in (models.llama(), models.gpt2(), models.bert(), models.resnet(), models.mixtral()):
        graph = capture(model, batch).graph
        for cls in graph.classes:
            known: set[str] = {*cls.inputs, *cls.params, *cls.buffers}
            for op in cls.ops:
                assert set(op.operands) <= known
                known |= {name for name in op.outputs if name}
                assert set(op.saved) <= known
            assert set(cls.outputs) <= known
            assert set(cls.tensor) == known
        available = {info.name for info in graph.inputs}
        for block in (graph.shared, *graph.blocks):
            cls = graph.block_class[block.cls]
            assert set(block.inputs) <= available
            assert [len(names) for names in (block.inputs, block.params, block.buffers, block.outputs)] == [
                len(names) for names in (cls.inputs, cls.params, cls.buffers, cls.outputs)]
            for fqn, local in zip(block.params, cls.params, strict=True):
                assert graph.param[fqn].shape == cls.tensor[local].shape
            available |= set(block.outputs)


def test_tied_weights_have_one_name() -> None:
    graph = capture(*models.gpt2()).graph
    assert graph.aliases == (("lm_head.weight", "transformer.wte.weight"),)
    assert "transformer.wte.weight" in graph.blocks[0].params
    assert "transformer.wte.weight" in graph.blocks[-1].params


def test_eager_mask_is_shared() -> None:
    graph = capture(*models.llama(attn_implementation="eager")).graph
    sizes = [graph.block_class["shared"].tensor[name].shape for name in graph.block_class["shared"].outputs]
    assert (3, 1, 12, 12) in sizes


def test_given_attention_mask_is_used() -> None:
    model, batch = models.llama()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    batch["attention_mask"] = mask
    captured = capture(model, batch)
    loss = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_packed_positions_are_used() -> None:
    model, batch = models.llama()
    model.config.use_cache = False
    batch["position_ids"] = torch.cat([torch.arange(7), torch.arange(5)]).repeat(3, 1)
    captured = capture(model, batch)
    loss = run(captured.graph, inputs=batch, params=dict(model.named_parameters()), constants=captured.constants)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_tagged_rows_scale_to_any_batch() -> None:
    model, batch = models.llama()
    tagged = capture(model, batch, tag_rows=True).graph
    plain = capture(model, batch).graph
    assert tagged.rows >= 1009
    assert tagged.rows_are_tagged
    for cls in tagged.classes:
        other = plain.block_class[cls.name]
        assert [op.name for op in cls.ops] == [op.name for op in other.ops]
        for info in cls.tensors:
            assert tagged.bytes_at(info, 3) == other.tensor[info.name].size_bytes, info.name
        for op, same in zip(cls.ops, other.ops, strict=True):
            if op.flops:
                assert op.flops / tagged.rows * 3 == pytest.approx(same.flops)


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert, models.resnet, models.vit, models.mixtral,
                                  models.t5, models.gemma3])
def test_ops_do_not_depend_on_the_batch_size(make) -> None:
    """A run captures at its own micro-batch, often one row; names must be those of the plan's capture."""
    model, batch = make()
    tagged = capture(model, batch, tag_rows=True).graph
    for rows in (1, 2):
        graph = capture(model, {key: value[:rows] for key, value in batch.items()}).graph
        assert [(cls.name, [op.name for op in cls.ops]) for cls in graph.classes] == [
            (cls.name, [op.name for op in cls.ops]) for cls in tagged.classes]
        assert graph.blocks == tagged.blocks
        assert model_fingerprint(graph) == model_fingerprint(tagged)


def test_inside_another_fake_mode() -> None:
    with FakeTensorMode():
        inside = capture(*models.llama()).graph
    assert inside == capture(*models.llama()).graph


def test_model_is_left_alone() -> None:
    model, batch = models.llama()
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    config = dict(vars(model.config))
    capture(model, batch, tag_rows=True)
    with pytest.raises(Exception, match=r".*"):
        capture(model, {"input_ids": batch["input_ids"], "nonsense": batch["labels"]})
    for name, value in model.state_dict(keep_vars=True).items():
        assert (id(value), True) == (state[name][0], torch.equal(value, state[name][1]))
    assert attributes == {name: dict(vars(module)) for name, module in model.named_modules()}
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    assert config == dict(vars(model.config))
    from transformers import masking_utils
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masking_utils.sdpa_mask


def test_meta_model() -> None:
    real = capture(*models.llama()).graph
    model, batch = models.llama()
    assert capture(model.to("meta"), batch).graph == real


def test_compute_dtype() -> None:
    model, batch = models.llama()
    plain, half = capture(model, batch).graph, capture(model, batch, dtype="bfloat16").graph
    assert [op.name for cls in plain.classes for op in cls.ops] == [op.name for cls in half.classes for op in cls.ops]
    cls = half.block_class["LlamaDecoderLayer"]
    assert cls.tensor["linear"].dtype == "bfloat16"
    assert half.block_class[half.shared.cls].tensor["cos"].dtype == "float32"  # the rotary angles stay in float32
    assert next(model.parameters()).dtype == torch.float32


class Layer(nn.Module):
    def __init__(self, index: int, scale: float):
        super().__init__()
        self.index, self.scale = index, scale
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * self.scale


class Stack(nn.Module):
    def __init__(self, scales: list[float]):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer(index, scale) for index, scale in enumerate(scales))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def equal_to_eager(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> ModelGraph:
    captured = capture(model, batch)
    inputs = {str(index): value for index, value in enumerate(batch)}
    torch.manual_seed(5)
    loss = run(captured.graph, inputs=inputs, params=dict(model.named_parameters()), constants=captured.constants)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(5)
    wanted = model(*batch)
    wanted.backward()
    assert torch.allclose(loss, wanted)
    for name, param in model.named_parameters():
        assert (grads[name] is None) == (param.grad is None), name
        assert param.grad is None or torch.allclose(grads[name], param.grad, atol=1e-6), name
    return captured.graph


def test_unread_attributes_do_not_part_blocks_but_read_ones_do() -> None:
    x = (torch.randn(3, 8),)
    assert len(set(classes_of(equal_to_eager(Stack([1.0] * 4), x)))) == 3
    graph = equal_to_eager(Stack([1.0, 0.5, 1.0, 0.5]), x)
    layers = [block.cls for block in graph.blocks if block.name.startswith("layers")]
    assert layers == ["Layer", "Layer.1", "Layer", "Layer.1"]
    assert any("built alike" in note for note in graph.notes)


class Twice(nn.Module):
    """Calls its layers twice, once without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, 1.0) for index in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for layer in self.layers:
                x = layer(x)
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def test_a_block_called_twice() -> None:
    graph = equal_to_eager(Twice(), (torch.randn(3, 8),))
    names = [block.name for block in graph.blocks if block.params]
    assert names == ["layers.0", "layers.1", "layers.0@2", "layers.1@2"]
    assert graph.blocks[0].params == graph.blocks[2].params
    first = graph.block_class[graph.blocks[0].cls]
    assert not any(first.tensor[name].requires_grad for name in first.outputs)


class Telling(nn.Module):
    """Returns a scale for the next layer to use and weights that nobody reads, from a parameter of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unread = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = (self.unread(x) + shift).softmax(-1)
        return x + self.linear(x) * scale, scale.sigmoid(), weights


class Handing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Telling() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        scale, shift = x.mean(), x.sum()
        for layer in self.layers:
            x, scale, _ = layer(x, scale, shift)
        return x.square().mean()


def test_outputs_that_no_block_reads_are_left_out_with_what_only_they_need() -> None:
    graph = equal_to_eager(Handing(), (torch.randn(3, 8),))
    layers = [block for block in graph.blocks if block.name.startswith("layers")]
    assert [len(block.outputs) for block in layers] == [2, 2, 2], "the last block's scale is an output of its class"
    (cls,) = {block.cls for block in layers}
    kept = graph.block_class[cls]
    assert kept.params == ("linear.weight", "linear.bias")
    assert layers[0].params == ("layers.0.linear.weight", "layers.0.linear.bias")
    assert len(kept.inputs) == len(layers[0].inputs) == 2
    assert not [op for op in kept.ops if "softmax" in op.target]
    assert {"layers.0.unread.weight", "layers.0.unread.bias"} <= {info.name for info in graph.params}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu_(self.a(x)) * 2
        y += 1
        y[:, 2] = 0.5
        y[:, 4:6] *= 3.0
        z = self.b(y).masked_fill_(x > 0, 0.0)
        with torch.no_grad():
            weight = z.softmax(-1)
        return (z * weight).sum() + torch.tensor([1.0, 2.0]).sum()


def test_in_place_ops_no_grad_and_constants() -> None:
    graph = equal_to_eager(InPlace(), (torch.randn(3, 8),))
    assert not any(op.target.split(".")[1].endswith("_") for cls in graph.classes for op in cls.ops)
    assert any(info.name.startswith("_constants.") for info in graph.buffers)


def test_dropout_stays_in_its_block_and_counts_its_mask() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.0)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.mean()

    graph = equal_to_eager(Noisy(), (torch.randn(4, 8),))
    ops = [op for cls in graph.classes for op in cls.ops if op.target == "aten.dropout.default"]
    assert {op.saved_extra_bytes for op in ops} == {32}
    assert len(ops) == len({cls.name for cls in graph.classes if cls.params})


def test_plain_module_without_containers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3))).square().sum()

    graph = equal_to_eager(Net(), (torch.randn(3, 3, 6, 6),))
    assert [block.name for block in graph.blocks] == ["conv", "norm", "glue.2", "head", "epilogue"]


def test_flops() -> None:
    graph = capture(*models.llama()).graph
    cls = graph.block_class["LlamaDecoderLayer"]
    tokens, hidden, inner, kv = 3 * 12, 32, 48, 16
    linear = 2 * tokens * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    attention = 2 * 2 * 3 * 4 * 12 * 12 * 8 / 2
    assert sum(op.flops for op in cls.ops) == linear + attention
    assert sum(op.backward_flops for op in cls.ops) == 2 * linear + 2.5 * attention


def test_what_only_the_loss_function_reads_is_not_given_to_the_model() -> None:
    model = nn.Linear(4, 3)
    batch = {"input": torch.randn(5, 4), "labels": torch.arange(5) % 3}

    def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(output, batch["labels"])

    graph = capture(model, batch, loss_fn=loss).graph
    assert [info.name for info in graph.inputs] == ["input", "labels"]
    with pytest.raises(CaptureError, match="unexpected keyword argument 'labels'"):
        capture(model, batch)


def test_first_layer_needs_no_input_gradient() -> None:
    model, batch = models.mlp()
    graph = capture(model, batch, loss_fn=models.square_loss).graph
    first, second = (graph.block_class[graph.blocks[index].cls] for index in (0, 2))
    assert first.ops[0].backward_flops == first.ops[0].flops
    assert second.ops[0].backward_flops == 2 * second.ops[0].flops


@pytest.mark.parametrize("layer", [
    nn.Conv1d(8, 12, 3, groups=4, stride=2), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 2),
    nn.ConvTranspose1d(8, 12, 3, groups=4, stride=2),
], ids=repr)
def test_flops_of_convolutions(layer: nn.Module) -> None:
    """Each weight meets one number for each row and position, forward and for either gradient."""
    x = torch.randn(3, 8, *(9 for _ in range(layer.weight.dim() - 2)))
    positions = (x if "Transpose" in repr(layer) else layer(x)).shape[2:].numel()
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.PReLU(), layer))
    graph = capture(model, (x,), loss_fn=models.square_loss).graph
    found = [op for cls in graph.classes for op in cls.ops if "conv" in op.target]
    assert [op.flops for op in found] == [2 * 3 * positions * layer.weight.numel()]
    assert [op.backward_flops for op in found] == [2 * op.flops for op in found]


def test_blocks_that_take_a_parameter_or_a_buffer_of_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * scale + mask

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(8))
            self.register_buffer("mask", torch.randn(8))
            self.layers = nn.ModuleList(Scaled() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, self.scale, self.mask)
            return x.square().sum()

    graph = equal_to_eager(Net(), (torch.randn(3, 8),))
    passed = {name for block in graph.blocks for name in block.inputs}
    assert passed.isdisjoint({"scale", "mask"})
    assert len({block.cls for block in graph.blocks if block.name in ("layers.1", "layers.2")}) == 1
