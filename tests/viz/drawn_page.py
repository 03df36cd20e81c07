"""A plan that was drawn: its files, and what its page shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The files of a plan, and what its page shows."""

    model: Path
    plan: Path
    page: Path
    picture: dict[str, Any]
