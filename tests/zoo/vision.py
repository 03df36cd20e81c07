"""Models of images, tiny."""

from __future__ import annotations

from entry import Entry

ENTRIES: tuple[Entry, ...] = ()
