"""The whole zoo, family by family."""

from __future__ import annotations

import decoders
import encoders
import experts
import networks
import vision
from entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *decoders.ENTRIES, *encoders.ENTRIES, *vision.ENTRIES, *experts.ENTRIES, *networks.ENTRIES,
)
