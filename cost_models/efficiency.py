"""What a device's kernels reach of its peaks: hardware/efficiency.yaml as values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from autopar.cost_models.matmul import ALIGNED_SHARE

PATH = Path(__file__).parent / "hardware" / "efficiency.yaml"
KINDS = ("vendor", "measured", "assumed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """One device's entry of the table; the file says what each field means."""

    multiprocessors: int
    clock_ghz: float
    matmul: float
    attention_forward: float
    attention_backward: float
    attention_half_keys: float
    host: float
    attention_backward_half_keys: float
    odd_rows: float
    attention_tile_rows: float


@cache
def efficiency_of(name: str) -> Efficiency:
    """The entry of the device with this name; that of unknown devices where the table has none."""
    entry = next(row for prefix, row in table()["devices"].items() if name.startswith(prefix))
    values = {name: entry[name]["value"] for name in (field.name for field in fields(Efficiency)) if name in entry}
    values.setdefault("attention_backward_half_keys", values["attention_half_keys"])
    values.setdefault("odd_rows", ALIGNED_SHARE[1])
    values.setdefault("attention_tile_rows", 128)
    return Efficiency(**values)


@cache
def table() -> dict[str, Any]:
    """The file's content: `sources`, and `devices` in order, the one that any name begins with last."""
    content: dict[str, Any] = yaml.load(
        PATH.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return content
