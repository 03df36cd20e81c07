"""Encoders and encoder-decoders of text and speech, tiny."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import transformers
from entry import LENGTH, ROWS, VOCABULARY, Built, Entry, causal_batch
from torch import Tensor

_NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_ENCODER: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCABULARY,
)
_DISENTANGLED: dict[str, Any] = dict(
    relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_biased_input=False,
)
_SEQ2SEQ: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY, dropout=0.0,
)
_T5: dict[str, Any] = dict(
    d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
    decoder_start_token_id=0,
)
_SPEECH: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
    conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, num_labels=5,
    # Which layers are skipped and which times are masked is drawn in Python at each step: a graph cannot hold it.
    layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0,
)
_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _ENCODER | _NO_DROPOUT | dict(max_position_embeddings=32)),
    "roberta": ("RobertaForMaskedLM", _ENCODER | _NO_DROPOUT | dict(max_position_embeddings=32)),
    "deberta_v2": ("DebertaV2ForMaskedLM", _ENCODER | _NO_DROPOUT | _DISENTANGLED | dict(
        position_buckets=4, max_relative_positions=-1, max_position_embeddings=32, share_att_key=True)),
    "deberta_v2_unshared": ("DebertaV2ForMaskedLM", _ENCODER | _NO_DROPOUT | _DISENTANGLED | dict(
        max_relative_positions=8, share_att_key=False, conv_kernel_size=3, conv_act="gelu")),
    "deberta": ("DebertaForMaskedLM", _ENCODER | _NO_DROPOUT | dict(  # each layer takes the embeddings of distances
        relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=-1, max_position_embeddings=32)),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5_gated": ("T5ForConditionalGeneration", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ | dict(max_position_embeddings=32)),
}


def _model(name: str, settings: dict[str, Any]) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings))


def text(family: str) -> Built:
    """The family's model of masked or of following words, with its loss."""
    return _model(*_TEXT[family]), causal_batch(), None


def _waves(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(5))


def whisper() -> Built:
    settings = _SEQ2SEQ | dict(
        num_mel_bins=8, max_source_positions=16, max_target_positions=LENGTH, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )
    batch = {"input_features": _waves(8, 32), "labels": causal_batch()["labels"]}
    return _model("WhisperForConditionalGeneration", settings), batch, None


def wav2vec2(stable: bool) -> Built:
    """A classifier of whole recordings: transformers' CTC loss picks as many labels as a batch happens to have.

    `stable`: as the large model is built, layer norms in every convolution and before attention.
    """
    extra: dict[str, Any] = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True) if stable else {}
    labels = torch.randint(0, 5, (ROWS,), generator=torch.Generator().manual_seed(6))
    batch = {"input_values": _waves(405), "labels": labels}
    return _model("Wav2Vec2ForSequenceClassification", _SPEECH | extra), batch, None


ENTRIES: tuple[Entry, ...] = (
    *(Entry(name=family, family="encoder", build=partial(text, family)) for family in _TEXT),
    Entry(name="whisper", family="speech", build=whisper),
    Entry(name="wav2vec2", family="speech", build=partial(wav2vec2, False)),
    Entry(name="wav2vec2_stable", family="speech", build=partial(wav2vec2, True)),
)
