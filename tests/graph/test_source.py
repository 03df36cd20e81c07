"""Presets, config files and factories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.graph.fake import new_fake_mode, shapes_alone
from autopar.graph.source import capture_source, load_source, preset_names

PARAMS = {  # millions of parameters, from the models' cards and papers
    "gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558, "gpt3-175b": 174_604, "llama-3.1-8b": 8030,
    "llama-3.1-70b": 70_554, "llama-3.1-405b": 405_853, "mixtral-8x7b": 46_703, "bert-large": 335, "vit-l": 304,
}


@pytest.mark.parametrize("name", PARAMS)
def test_presets_have_their_published_sizes(name: str) -> None:
    assert set(PARAMS) == set(preset_names())
    with new_fake_mode():
        module, batch, loss_fn = load_source(name, seq_len=None if name in ("vit-l",) else 64).build()
    assert loss_fn is None
    assert sum(param.numel() for param in module.parameters()) / 1e6 == pytest.approx(PARAMS[name], abs=1)
    assert all(value.shape[0] == 2 for value in batch.values())


def test_405b_layers_fold() -> None:
    graph = capture_source(load_source("llama-3.1-405b", seq_len=8192))
    assert len(graph.blocks) == 128
    assert len(graph.classes) == 4
    layer = graph.block_class["LlamaDecoderLayer"]
    tokens = graph.rows * 8192
    weights = sum(layer.tensor[name].numel for name in layer.params if len(layer.tensor[name].shape) == 2)
    attention = 4 * tokens * 8192 * 16384 / 2
    assert sum(op.flops for op in layer.ops) == pytest.approx(2 * tokens * weights + attention)


def test_config_file_and_folder(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source = load_source(str(folder))
    assert source.name == "tiny"
    graph = capture_source(source)
    assert graph.inputs[0].shape == (graph.rows, 64)
    assert capture_source(load_source(str(folder / "config.json"))) == graph
    module, batch, _ = load_source(str(folder), seq_len=8, dtype="float64").build()
    assert {param.dtype for param in module.parameters()} == {torch.float64}
    assert module.training
    assert module(**batch).loss.item() > 0


_SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_TEXT: dict[str, Any] = dict(vocab_size=96, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BOTH: dict[str, Any] = _TEXT | dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=1)
KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "roberta": (_SMALL | _TEXT, dict(input_ids=(15,), labels=(15,))),
    "deberta-v2": (_SMALL | _TEXT, dict(input_ids=(16,), labels=(16,))),
    "bart": (_BOTH, dict(input_ids=(16,), decoder_input_ids=(16,), labels=(16,))),
    "whisper": (_BOTH | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=12),
                dict(input_features=(8, 32), labels=(12,))),
    # The rate of each layer is read from a tensor while the model is built.
    "convnext": (dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, drop_path_rate=0.1),
                 dict(pixel_values=(3, 32, 32), labels=())),
    "clip": (dict(text_config=_SMALL | _TEXT, vision_config=_SMALL | dict(image_size=16, patch_size=4)),
             dict(input_ids=(16,), pixel_values=(3, 16, 16))),
    "wav2vec2": (_SMALL | dict(conv_dim=[16, 16], conv_stride=[80, 4], conv_kernel=[80, 4], num_conv_pos_embeddings=8,
                               num_conv_pos_embedding_groups=4, layerdrop=0.0, mask_time_prob=0.0),
                 dict(input_values=(160_000,), labels=())),
}


@pytest.mark.parametrize("kind", KINDS)
def test_configs_of_every_kind_get_a_batch(kind: str, tmp_path: Path) -> None:
    values, shapes = KINDS[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **values}))
    graph = capture_source(load_source(str(path)))
    assert {info.name: info.shape for info in graph.inputs} == {
        name: (graph.rows, *shape) for name, shape in shapes.items()}


def test_factory(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text("WIDTH = 8\n")
    path = tmp_path / "my_model.py"
    path.write_text(
        "import torch\nfrom sizes import WIDTH\nfrom torch import nn\n\n\n"
        "def make():\n"
        "    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))\n"
        "    nn.init.trunc_normal_(model[0].weight)\n"
        "    return model, (torch.randn(4, WIDTH),), lambda output, batch: output.mean()\n")
    source = load_source(f"{path}:make")
    assert len(capture_source(source).blocks) == 3
    module, batch, loss_fn = source.build()
    assert isinstance(module, nn.Sequential)
    assert loss_fn(module(*batch), batch).item() != 0


@pytest.mark.parametrize("values", [
    {"model_type": "swin", "embed_dim": 16, "depths": [1], "num_heads": [2], "image_size": 16, "window_size": 2},
    {"model_type": "wav2vec2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
     "intermediate_size": 32, "conv_dim": [16] * 7, "mask_time_prob": 0.0, "layerdrop": 0.0,
     "architectures": ["Wav2Vec2ForSequenceClassification"]},
])
def test_images_and_sounds_have_the_models_dtype(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    graph = capture_source(load_source(str(path), dtype="bfloat16"))
    assert {info.dtype for info in graph.inputs} == {"bfloat16", "int64"}


TIED = """
import torch

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = torch.nn.Embedding(32, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(16))

    def forward(self, ids, labels):
        x = self.head(self.rnn(self.embedding(ids) * self.scale))
        return torch.nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())

def build():
    model = Tied()
    model.rnn.weight.requires_grad_(False)
    ids = torch.randint(0, 32, (4, 8){on})
    return model{converted}, {{"ids": ids, "labels": ids{moved}}}
"""


@pytest.mark.parametrize(("converted", "dtype"), [
    (".to(torch.bfloat16)", "bfloat16"), (".float()", "float32"), (".double().half()", "float16"),
    (".to('cuda', dtype=torch.bfloat16)", "bfloat16"), (".cuda()", "float32"),
])
def test_a_factory_may_convert_its_model_and_name_a_gpu(converted: str, dtype: str, tmp_path: Path) -> None:
    on, moved = (", device='cuda:0'", ".to('cuda')") if "cuda" in converted else ("", "")
    path = tmp_path / "tied.py"
    path.write_text(TIED.format(converted=converted, on=on, moved=moved))
    source = load_source(f"{path}:build")
    graph = capture_source(source)
    assert {info.dtype for info in graph.params} == {dtype} and ("head.weight", "embedding.weight") in graph.aliases
    assert [info.name for info in graph.params if not info.requires_grad] == ["rnn.weight"]
    real, batch, _ = source.build()
    assert real.head.weight is real.embedding.weight and real.scale.dtype == getattr(torch, dtype)
    assert all(value.device == real.scale.device for value in batch.values())
    assert torch.cuda.is_available() or real.scale.device.type == "cpu"


READS_DATA = """
import collections, torch
{tied}
def build():
    tokens = torch.arange(400) % 32
    starts = torch.randint(len(tokens) - 9, (4,)).tolist()
    rows = torch.stack([tokens[start:start + 8] for start in starts]){moved}
    model = Tied().cuda() if {cuda} else Tied()
    return model.bfloat16(), {batch}
"""


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("batch", ["[rows, rows]", "collections.UserDict(ids=rows, labels=rows)"])
def test_a_factory_may_read_its_data(batch: str, cuda: bool, tmp_path: Path) -> None:
    """Its batch is made for real, its parameters are not; a loader's list will do, and a tokenizer's mapping."""
    path = tmp_path / "data.py"
    tied = TIED[TIED.index("class"):TIED.index("def build")].format(on="", converted="", moved="")
    path.write_text(READS_DATA.format(tied=tied, moved=".to('cuda')" if cuda else "", cuda=cuda, batch=batch))
    source = load_source(f"{path}:build")
    with new_fake_mode():
        model, example, _ = source.build()
    assert all(param.is_meta for param in model.parameters()) and model.head.weight is model.embedding.weight
    assert type(example) is (tuple if "[" in batch else dict)
    graph = capture_source(source)
    assert {info.dtype for info in graph.params} == {"bfloat16"} and len(graph.inputs) == 2


def test_initializers_set_the_tensors_that_have_values_and_leave_the_others_alone() -> None:
    before = dict(vars(nn.init))
    with new_fake_mode(), shapes_alone():
        given = torch.empty(2, 3)
        assert given.is_meta and nn.init.kaiming_uniform_(given, a=2.0) is given
        assert nn.init.ones_(torch.zeros(2, device="cpu")).tolist() == [1.0, 1.0]
        with torch.no_grad():
            assert nn.init.constant_(tensor=torch.zeros(1, device="cpu"), val=3.0).item() == 3.0
    assert vars(nn.init) == before
