"""Encoders and encoder-decoders of text and speech, tiny."""

from __future__ import annotations

from entry import Entry

ENTRIES: tuple[Entry, ...] = ()
