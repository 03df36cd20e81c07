"""Plain networks, written here or of common shape, that are no transformers, tiny."""

from __future__ import annotations

from entry import Entry

ENTRIES: tuple[Entry, ...] = ()
