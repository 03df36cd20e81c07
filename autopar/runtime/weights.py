"""Weights from safetensors files, read part by part: no rank ever has the whole model.

The files are those of `save_pretrained`: one model.safetensors, or shards with their index. A rank reads of each
parameter that it holds what its tensor axis gives it, one parameter at a time; of a parameter that data ranks share
out, it then keeps its own rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autopar.errors import InputError
from autopar.runtime.collectives import Axis
from autopar.runtime.layout import local_part
from autopar.sharding.state import Kind, State


class WeightFiles:
    """The tensors of a safetensors file, or of a folder of them, by name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = _files(self.path)
        self._open: dict[Path, Any] = {}

    def has(self, names: Sequence[str]) -> bool:
        """Whether a tensor is there under one of its names."""
        return any(name in self._file_of for name in names)

    def part(
        self, names: Sequence[str], shape: tuple[int, ...], state: State, axis: Axis | None,
        expert_axis: Axis | None = None,
    ) -> Tensor:
        """This rank's part on the tensor axis of the tensor called by one of `names`, of a whole `shape`, on the CPU.

        With an `expert_axis` the tensor axis has part of what that leaves of dim 0.

        InputError, one line, where it is missing or of another shape.
        """
        name = next((name for name in names if name in self._file_of), None)
        if name is None:
            raise InputError(
                f"{self.path} has no weight {names[0]}; it has {', '.join(sorted(self._file_of)[:3])}, ...: the "
                "names must be the model's own (load it once with from_pretrained and save its state_dict)"
            )
        try:
            found = self._handle(self._file_of[name]).get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise InputError(f"{name} in {self.path} is of shape {found.get_shape()}; the model's is {list(shape)}")
            if expert_axis is not None:
                each = shape[0] // expert_axis.size
                held: Tensor = found[expert_axis.rank * each : (expert_axis.rank + 1) * each]
                return local_part(held, state, axis)
            plain = axis is not None and state.kind is Kind.SHARDED and state.outer == 1 and not state.length
            if plain and axis is not None and shape[state.dim] % axis.size == 0:
                each = shape[state.dim] // axis.size
                where = [slice(None)] * state.dim + [slice(axis.rank * each, (axis.rank + 1) * each)]
                own: Tensor = found[tuple(where)]
                return own
            whole: Tensor = found[:] if shape else self._handle(self._file_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._file_of[name]} cannot be read: {error}; is the file whole?") from None
        return local_part(whole, state, axis)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            named = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError):
            raise InputError(f"{index} is no index of safetensors files: it has no weight_map") from None
        return {name: path / file for name, file in named.items()}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path} holds no weights: give a .safetensors file or a folder of them")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is no safetensors file: {error}") from None
    return found


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose memory is taken page by page as it is written: until then it costs nothing.

    A module is built and sharded with such tensors, and what a rank keeps of them is filled in afterwards.
    """
    return torch.empty(tuple(shape), dtype=dtype)
