"""Comparisons with one process: no dropout, no row twice, and parts of the batch where ops tell them from the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from local_machines import slow_cluster
from torch import Tensor, nn

from autopar.graph.capture import capture
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.source import capture_source, load_source
from autopar.local_check import RealModel, check_locally, switch_off_dropout
from autopar.runtime.parity import PARTS_NOTE
from autopar.search.degrees import Degrees, plan_from_degrees


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.attn_dropout, self.idle = nn.Linear(8, 8), nn.Dropout(0.3), 0.5, nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.idle(self.drop(self.linear(x)))
        return nn.functional.dropout(hidden, self.attn_dropout, self.training).sum()


def test_what_drops_nothing_is_still_the_model_that_was_planned() -> None:
    model, batch = Dropping(), {"x": torch.ones(4, 8)}
    planned = model_fingerprint(capture(model, batch).graph)
    switch_off_dropout(model)
    assert model.training
    assert model_fingerprint(capture(model, batch).graph) == planned
    assert torch.equal(model(**batch), model.eval()(**batch))


_LAYERS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}
_MODELS: dict[str, dict[str, Any]] = {
    "batch_norm": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": 8,
        "depths": [1, 1], "hidden_sizes": [8, 16], "layer_type": "basic", "num_labels": 5, "image_size": 32,
    },
    "router_loss": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
        "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5, **_LAYERS,
    },
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, **_LAYERS},
}


def test_no_row_of_a_batch_is_there_twice(tmp_path: Path) -> None:
    for name, config in _MODELS.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config))
        _, batch, _ = RealModel(
            spec=str(file), seq_len=16 if name != "batch_norm" else None, dtype="float32", rows=6)()
        inputs = batch["pixel_values" if name == "batch_norm" else "input_ids"]
        assert len(inputs.flatten(1).unique(dim=0)) == 6


@pytest.mark.processes
@pytest.mark.parametrize("name", list(_MODELS))
def test_what_mixes_rows_is_held_against_the_same_parts(tmp_path: Path, name: str) -> None:
    """Two micro-batches on each of two data ranks: ops that mix rows see one of four parts."""
    file, length = tmp_path / f"{name}.json", None if name == "batch_norm" else 16
    file.write_text(json.dumps(_MODELS[name]))
    graph = capture_source(load_source(str(file), seq_len=length))
    plan = plan_from_degrees(graph, slow_cluster(2), Degrees(
        global_batch=12, micro_batch=3, dp_replicate=2, dtype="float32", param_dtype="float32", optimizer="sgd",
    ))
    report = check_locally(plan, str(file), dtype="float64", seq_len=length)
    assert report.passed, (report.loss_error, report.worst)
    assert (PARTS_NOTE in report.notes) == (name != "llama")
