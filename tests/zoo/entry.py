"""What an entry of the model zoo is: a tiny model of a known family, with what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 4, 16, 96

Built = tuple[nn.Module, dict[str, Any], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A model of the zoo. `build` gives (model, batch of ROWS rows by keyword, loss function or None).

    `build` is picklable (a function of a module, or a partial of one) and its weights follow torch's seed; the model
    runs eagerly on the CPU in float64 and has no dropout. `expected_unruled` maps the op targets without a rule to the
    reason. `parity_refused` is the text of the InputError that a plan with a tensor axis of 2 must end with ("": the
    plan runs, and gives one process's numbers). `may_repeat` says why nothing of it can be split by 2.
    """

    name: str
    family: str
    build: Callable[[], Built]
    expected_unruled: Mapping[str, str] = field(default_factory=dict)
    parity_refused: str = ""
    may_repeat: str = ""

    def __str__(self) -> str:
        return self.name


def token_ids(rows: int = ROWS, length: int = LENGTH, vocabulary: int = VOCABULARY, *, seed: int = 7) -> Tensor:
    """Random ids (rows, length); none is below 3, where configs keep their special tokens."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal_batch() -> dict[str, Tensor]:
    """Ids and labels; rows ignore very different numbers of targets."""
    ids = token_ids()
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : (5 * row) % 13] = -100
    return {"input_ids": ids, "labels": labels}
