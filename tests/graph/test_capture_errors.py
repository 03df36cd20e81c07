"""What cannot be captured is named: the module, the line, what to do; one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autopar.errors import CaptureError, InputError
from autopar.graph.capture import capture
from autopar.graph.interpret import run
from autopar.graph.source import capture_source, load_source, preset_names


class Branching(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.index == 2 and x.sum() > 0:  # BRANCH
            x = x + 1
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branching(index) for index in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_branch_on_a_value_inside_a_block() -> None:
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# BRANCH" in text)
    text = message_of(capture, Model(), (torch.randn(3, 8),))
    assert text.startswith(f"layers.2 (test_capture_errors.py:{line}): the code branches on a tensor's value")


def test_shape_that_depends_on_a_value() -> None:
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y[y > 0].mean()

    text = message_of(capture, Picking(), (torch.randn(3, 8),))
    assert text.startswith("Picking (test_capture_errors.py:")


def test_item() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y.mean() * y.max().item()

    assert "tensor's value" in message_of(capture, Reading(), (torch.randn(3, 8),))


def test_no_loss() -> None:
    text = message_of(capture, nn.Linear(8, 8), (torch.randn(3, 8),))
    assert "no scalar loss" in text and "lambda" not in text

    class Pair(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.mean()

    assert message_of(capture, Pair(8, 8), (torch.randn(3, 8),)).endswith("as lambda output, batch: output[1]")


@pytest.mark.parametrize(("model", "word"), [
    (torch.compile(nn.Linear(8, 8), backend="eager"), "_orig_mod"),
    (nn.DataParallel(nn.Linear(8, 8)), "model.module"),
    (nn.Sequential(nn.LazyLinear(8)), "call it once"),
    (lambda x: x, "no torch.nn.Module"),
])
def test_what_is_no_plain_model(model: nn.Module, word: str) -> None:
    assert word in message_of(capture, model, (torch.randn(3, 8),))


@pytest.mark.parametrize(("loss_fn", "word"), [
    (nn.MSELoss(), "MSELoss()(output"), (nn.functional.l1_loss, "l1_loss(output"),
])
def test_a_loss_function_that_wants_a_target(loss_fn: Callable[..., torch.Tensor], word: str) -> None:
    assert word in message_of(capture, nn.Linear(8, 8), (torch.randn(3, 8),), loss_fn=loss_fn)


class Deaf(nn.Module):
    """Its loss reaches no parameter that trains."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 8) if kind != "bare" else nn.Identity()
        self.requires_grad_(kind != "frozen")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).mean()
        return y.detach() if self.kind == "detached" else y


@pytest.mark.parametrize("kind", ["bare", "frozen", "detached"])
def test_nothing_to_train(kind: str) -> None:
    assert message_of(capture, Deaf(kind), (torch.randn(3, 8),)).startswith("Deaf: the loss has no gradient")


def test_module_is_named_whatever_its_methods_call_it() -> None:
    class Inner(nn.Module):
        def forward(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
            return x if x.sum() > 0 else -x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gate = nn.Linear(8, 8), Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(self.linear(x)).mean()

    assert message_of(capture, Outer(), (torch.randn(3, 8),)).startswith("gate (test_capture_errors.py:")


def test_torch_logs_nothing_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    class Mismatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).mean()

    message_of(capture, Mismatched(), (torch.randn(3, 8),))
    assert not caplog.records


def test_users_own_error_is_shown_with_its_place() -> None:
    text = message_of(capture, Model(), (torch.randn(3, 9),))
    assert "layers.0" in text
    assert "test_capture_errors.py:" in text


def test_unsafe_in_place_write() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            z = y.view(-1)
            y.add_(1)
            return z.sum() + y.sum()

    assert "in-place write" in message_of(capture, Overwriting(), (torch.randn(3, 8),))


def test_write_into_the_batch() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return self.linear(x).sum()

    assert "writes into the input" in message_of(capture, Overwriting(), (torch.randn(3, 8),))


class Counting(nn.Module):
    """Counts its calls in a buffer; what it multiplies with follows `reads`."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(8, 8), reads
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).sum() * (self.calls if self.reads else 1)


def test_a_buffer_written_and_read_in_different_blocks() -> None:
    text = message_of(capture, Counting(reads=True), (torch.randn(3, 8),))
    assert "buffer calls is written" in text
    assert "test_capture_errors.py:" in text


def test_a_buffer_that_is_only_written_is_kept() -> None:
    model = Counting(reads=False)
    captured = capture(model, (torch.randn(3, 8),))
    params = dict(model.named_parameters())
    run(captured.graph, inputs={"0": torch.randn(3, 8)}, params=params, constants=captured.constants)
    assert captured.constants["calls"] == 2


@pytest.mark.parametrize("batch", [(), {}, (torch.zeros(0, 8),), [torch.zeros(())], {"x": object()}, "x"])
def test_bad_batches(batch) -> None:
    message_of(capture, Model(), batch)


def test_unknown_model_gets_near_names() -> None:
    assert "llama-3.1-8b" in message_of(load_source, "lama-3.1-8b")
    assert "presets:" in message_of(load_source, "zzzzzzzzz")


def test_missing_files_and_functions(tmp_path: Path) -> None:
    assert "no file" in message_of(load_source, str(tmp_path / "no.py:make"))
    path = tmp_path / "model.py"
    path.write_text("def make_model():\n    return 3\n")
    assert "make_model" in message_of(load_source, f"{path}:make")
    assert "must return" in message_of(load_source(f"{path}:make_model").build)
    assert "name the factory" in message_of(load_source, str(path))
    path.write_text("def make_model(:\n")
    assert "SyntaxError" in message_of(load_source, f"{path}:make_model")
    path.write_text("raise SystemExit(3)\n")
    assert "SystemExit: 3" in message_of(load_source, f"{path}:make_model")
    path.write_text("def make_model():\n    exit()\n")
    assert "SystemExit" in message_of(load_source(f"{path}:make_model").build)
    path.write_text("def make_model():\n    return {}['x']\n")
    assert "KeyError" in message_of(load_source(f"{path}:make_model").build)


def test_bad_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    assert "not a readable JSON" in message_of(load_source, str(tmp_path))
    path.write_text("{}")
    assert "model_type" in message_of(load_source, str(path))
    path.write_text('{"model_type": "no_such_model"}')
    assert "does not know the model_type" in message_of(load_source(str(path)).build)
    path.write_text("[" * 100_000)
    assert "not a readable JSON" in message_of(load_source, str(path))
    assert "name a Hugging Face config.json" in message_of(load_source, str(tmp_path / "other.json"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in message_of(load_source, str(tmp_path / "empty"))


@pytest.mark.parametrize("wrong", [
    {"hidden_size": "big"}, {"hidden_size": -4}, {"num_attention_heads": 7}, {"num_attention_heads": 0},
    {"vocab_size": None}, {"hidden_act": "zilu"}, {"rope_scaling": {"rope_type": "zzz"}},
    {"model_type": "swin", "image_size": "big"},
])
def test_configs_that_transformers_refuses(wrong: dict[str, object], tmp_path: Path) -> None:
    values = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64, **wrong}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    text = message_of(capture_source, load_source(str(path)))
    assert text.startswith(f"{path}: transformers ")


def test_bad_options() -> None:
    assert "positions" in message_of(capture_source, load_source("gpt2", seq_len=4096))
    assert "float3" in message_of(load_source, "gpt2", dtype="float3")
    assert "attention" in message_of(load_source, "gpt2", attention="flash")
    message_of(load_source, "gpt2", seq_len=0)


def test_capture_errors_are_input_errors() -> None:
    assert issubclass(CaptureError, InputError)
    assert "llama-3.1-405b" in preset_names()


class Drawing(nn.Module):
    """Multiplies by a number that is not drawn by torch, or by numbers of Python's, one for each row."""

    def __init__(self, draw: Callable[[torch.Tensor], object]):
        super().__init__()
        self.linear, self.draw = nn.Linear(8, 8), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.draw(x)).mean()


@pytest.mark.parametrize(("draw", "word"), [
    (lambda x: random.random(), "draws numbers with random,"),
    (lambda x: np.random.rand(), "draws numbers with numpy.random,"),
])
def test_random_numbers_outside_torch_are_refused(draw: Callable[[torch.Tensor], object], word: str) -> None:
    with pytest.raises(CaptureError, match=word):
        capture(Drawing(draw), (torch.randn(3, 8),))


def test_own_random_generators_and_torch_are_no_draws() -> None:
    capture(Drawing(lambda x: random.Random(0).random() * torch.rand(())), (torch.randn(3, 8),))


def test_a_constant_with_the_batchs_rows_is_refused_where_rows_may_change() -> None:
    def of_rows(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[float(i)] for i in range(x.shape[0])])

    with pytest.raises(CaptureError, match=r"test_capture_errors.*with a row for each of the batch's"):
        capture(Drawing(of_rows), (torch.randn(3, 8),), tag_rows=True)
    captured = capture(Drawing(of_rows), (torch.randn(3, 8),))
    assert [tuple(value.shape) for value in captured.constants.values()] == [(3, 1)]
