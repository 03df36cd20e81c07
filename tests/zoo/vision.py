"""Models of images, tiny."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import transformers
from entry import ROWS, VOCABULARY, Built, Entry, token_ids

_VIT: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
)
_NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_CLASSIFIERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("ViT", 16, _VIT | _NO_DROPOUT | dict(intermediate_size=64)),
    "dinov2": ("Dinov2", 16, _VIT | _NO_DROPOUT | dict(mlp_ratio=2, drop_path_rate=0.0, use_mask_token=False)),
    "swin": ("Swin", 32, _NO_DROPOUT | dict(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0)),
    "convnext": ("ConvNext", 32, dict(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, drop_path_rate=0.0)),
    "resnet": ("ResNet", 32, dict(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2])),
}


def _images(size: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(5))


def classifier(family: str) -> Built:
    """The family's image classifier with its loss."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prefix, size, settings = _CLASSIFIERS[family]
    config = getattr(transformers, f"{prefix}Config")(num_labels=5, **settings)
    labels = torch.randint(0, 5, (ROWS,), generator=torch.Generator().manual_seed(6))
    batch = {"pixel_values": _images(size), "labels": labels}
    return getattr(transformers, f"{prefix}ForImageClassification")(config), batch, None


def clip() -> Built:
    """Two towers, and a loss that holds each text of the batch against each image."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tower = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    words = dict(vocab_size=VOCABULARY, max_position_embeddings=16, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    config = transformers.CLIPConfig(
        text_config=tower | words, vision_config=tower | dict(image_size=16, patch_size=4), projection_dim=16
    )
    ids = token_ids()
    ids[:, -1] = 2  # a text is read off its end
    return transformers.CLIPModel(config), {"input_ids": ids, "pixel_values": _images(16), "return_loss": True}, None


ENTRIES: tuple[Entry, ...] = (
    *(Entry(name=family, family="vision", build=partial(classifier, family)) for family in _CLASSIFIERS),
    Entry(name="clip", family="vision", build=clip),
)
