"""Graphs survive their file; fingerprints see the model and not the batch."""

from __future__ import annotations

import graph_models as models
import pytest
import torch

from autopar.errors import InputError
from autopar.graph.capture import capture
from autopar.graph.file import graph_from_json, graph_to_json
from autopar.graph.fingerprint import model_fingerprint


def test_round_trip() -> None:
    model, batch = models.gpt2()
    graph = capture(model, {**batch, "return_dict": True}).graph
    assert graph.settings == (("return_dict", "True"),)
    assert graph_from_json(graph_to_json(graph)) == graph
    for model, batch in (models.gpt2(), models.resnet(), models.llama(attn_implementation="eager")):
        graph = capture(model, batch).graph
        assert graph_from_json(graph_to_json(graph)) == graph


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "autopar-model-graph", "version": 99}',
                                  '{"format": "autopar-model-graph", "version": 1, "name": "x"}'])
def test_foreign_files_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        graph_from_json(text, "some.json")
    assert "some.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_file_is_refused() -> None:
    text = graph_to_json(capture(*models.llama()).graph)
    with pytest.raises(InputError, match="cut off"):
        graph_from_json(text[: len(text) // 2])


def test_fingerprint() -> None:
    model, batch = models.llama()
    first = model_fingerprint(capture(model, batch).graph)
    assert first == model_fingerprint(capture(model, batch, tag_rows=True).graph)
    longer = {key: torch.cat([value, value], dim=1) for key, value in batch.items()}
    assert first == model_fingerprint(capture(model, longer).graph)
    assert first == model_fingerprint(capture(model.double(), batch).graph)
    for other in (models.llama(tie_word_embeddings=True), models.llama(num_hidden_layers=4), models.gpt2()):
        assert first != model_fingerprint(capture(*other).graph)
