"""What capture says autograd keeps is what autograd keeps, on real tensors."""

from __future__ import annotations

import graph_models as models
import pytest
import torch
from fused_norm import one_kernel

from autopar.graph.capture import capture
from autopar.graph.hugging_face import traceable


def kept_bytes(run, excluded: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps while `run` runs, without those of `excluded`."""
    storages: dict[int, int] = {}
    keep: list[torch.Tensor] = []
    skip = {tensor.untyped_storage().data_ptr() for tensor in excluded}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        keep.append(tensor)
        if storage.data_ptr() not in skip:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    keep.append(result)
    return sum(storages.values())


def predicted_bytes(graph, cls_names: set[str]) -> int:
    """Bytes that the blocks of these classes keep, each global tensor once."""
    owned: dict[str, int] = {}
    extra = 0
    for block in graph.blocks:
        cls = graph.block_class[block.cls]
        if cls.name not in cls_names:
            continue
        names = dict(zip(cls.inputs, block.inputs, strict=True)) | dict(zip(cls.outputs, block.outputs, strict=True))
        for op in cls.ops:
            extra += op.saved_extra_bytes
            for name in op.saved:
                owned[names.get(name, f"{block.name}:{name}")] = cls.tensor[name].size_bytes
    return extra + sum(owned.values())


@pytest.mark.parametrize("case", ["gpt2", "llama", "llama_tied", "llama_eager", "bert", "vit", "resnet"])
def test_whole_model(case: str) -> None:
    model, batch = {
        "gpt2": models.gpt2, "llama": models.llama, "llama_tied": lambda: models.llama(tie_word_embeddings=True),
        "llama_eager": lambda: models.llama(attn_implementation="eager"), "bert": models.bert, "vit": models.vit,
        "resnet": models.resnet,
    }[case]()
    model.train()
    model.config.use_cache = False
    graph = capture(model, batch).graph
    with traceable(model), one_kernel():  # as it is captured and run: norms and GELUs are one op each
        real = kept_bytes(lambda: model(**batch).loss, [*model.parameters(), *model.buffers()])
    assert predicted_bytes(graph, {cls.name for cls in graph.classes}) == pytest.approx(real, rel=0.02)


def test_one_block() -> None:
    for model, batch, cls, layers in ((*models.gpt2(), "GPT2Block", "transformer.h"),
                                      (*models.llama(), "LlamaDecoderLayer", "model.layers")):
        model.config.use_cache = False
        graph = capture(model, batch).graph
        seen: list[int] = []
        block = model.get_submodule(f"{layers}.1")
        original = block.forward

        def forward(*args, _original=original, _block=block, _seen=seen, **kwargs):
            out = None

            def run():
                nonlocal out
                out = _original(*args, **kwargs)
                return out

            _seen.append(kept_bytes(run, [*_block.parameters()]))
            return out

        block.forward = forward
        with traceable(model), one_kernel():
            model(**batch)
        count = sum(block.cls == cls for block in graph.blocks)
        single = predicted_bytes(graph, {cls}) / count
        shared = 2 * 12 * 8 * 4 if layers == "model.layers" else 0  # cos and sin, which all blocks keep
        assert single == pytest.approx(seen[0], rel=0.02, abs=shared)


def test_low_precision() -> None:
    """Norms keep float32 copies; capturing in the compute dtype counts them."""
    model, batch = models.llama()
    model.config.use_cache = False
    graph = capture(model, batch, dtype="bfloat16").graph
    for param in model.parameters():
        param.data = param.data.bfloat16()
    with traceable(model), one_kernel():  # as it is captured and run: norms and GELUs are one op each
        real = kept_bytes(lambda: model(**batch).loss, [*model.parameters(), *model.buffers()])
    assert predicted_bytes(graph, {cls.name for cls in graph.classes}) == pytest.approx(real, rel=0.02)
