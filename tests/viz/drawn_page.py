"""A plan that was drawn, and another plan of its model: their files, and what their pages show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The files of a plan, of another for the same model, and of their comparison; `picture` is the first one's."""

    model: Path
    plan: Path
    page: Path
    other_plan: Path
    comparison_page: Path
    picture: dict[str, Any]
