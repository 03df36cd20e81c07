"""Mixtures of experts and state-space models, tiny."""

from __future__ import annotations

from entry import Entry

ENTRIES: tuple[Entry, ...] = ()
