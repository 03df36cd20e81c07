"""A global batch cut into the rows of each data-parallel replica and micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.graph.model_graph import ModelGraph, TensorInfo
from autopar.plan.plan import Plan, Stage


class BatchReader:
    """Checks a global batch and gives a data rank its micro-batches. `graph` is the model as it was captured.

    A tensor has the batch in its first dim if the captured one had its rows there; another tensor goes
    whole to every replica. Micro-batches follow one another in the batch; each is shared out among the data ranks of a
    stage in their order.
    Values that are no tensors must be those of the capture, and may be left out.
    """

    def __init__(self, graph: ModelGraph, plan: Plan) -> None:
        self.inputs, self.settings, self.plan, self.rows = graph.inputs, dict(graph.settings), plan, graph.rows

    def micro_batches(
        self, batch: Mapping[str, Any] | Sequence[Any], stage: Stage, data_rank: int, device: torch.device
    ) -> list[dict[str, Tensor]]:
        """One dict of local tensors for each micro-batch of a replica; InputError for a batch of another form."""
        named = dict(batch) if isinstance(batch, Mapping) else {str(i): value for i, value in enumerate(batch)}
        expected = [info.name for info in self.inputs]
        if missing := [name for name in expected if name not in named]:
            raise InputError(f"the batch has no {missing[0]!r}; the model was captured with {', '.join(expected)}")
        if unknown := sorted(set(named) - set(expected) - set(self.settings)):
            raise InputError(f"the batch has {unknown[0]!r}; the model was captured with {', '.join(expected)}")
        for name in sorted(named.keys() & self.settings.keys()):
            given = "a tensor" if isinstance(named[name], Tensor) else repr(named[name])
            if given != self.settings[name]:
                captured = self.settings[name]
                raise InputError(f"the batch has {given} as {name!r}; the model was captured with {captured}")
        rows = self.plan.rows_of(stage)
        start = sum(rows[:data_rank])
        found: list[dict[str, Tensor]] = [{} for _ in range(self.plan.num_micro_batches)]
        for info in self.inputs:
            value = self._in_dtype(info, named[info.name])
            split = self._is_split(info, value)
            for i, part in enumerate(found):
                first = i * self.plan.micro_batch_rows + start
                part[info.name] = (value[first : first + rows[data_rank]] if split else value).to(device)
        return found

    def _is_split(self, info: TensorInfo, value: Tensor) -> bool:
        shape = tuple(value.shape)
        if info.shape and info.shape[0] == self.rows:
            if shape == (self.plan.global_batch, *info.shape[1:]):
                return True
            wanted = [self.plan.global_batch, *info.shape[1:]]
        else:
            if shape == info.shape:
                return False
            wanted = list(info.shape)
        few = shape[1:] == info.shape[1:] and 0 < shape[0] < wanted[0] if shape and wanted else False
        raise InputError(
            f"batch tensor {info.name!r} has shape {list(shape)}; the plan takes {wanted} "
            f"(global batch of {self.plan.global_batch} rows, the same on every rank)"
            + ("; leave out an epoch's last, shorter batch: DataLoader(drop_last=True)" if few else "")
        )

    def _in_dtype(self, info: TensorInfo, value: Tensor) -> Tensor:
        """The tensor in the captured dtype: floats are cast, since the model may compute in another one."""
        wanted: torch.dtype = getattr(torch, info.dtype)
        if value.dtype == wanted:
            return value
        if value.is_floating_point() and wanted.is_floating_point:
            return value.to(wanted)
        found = str(value.dtype).removeprefix("torch.")
        raise InputError(f"batch tensor {info.name!r} is {found}; the model was captured with {info.dtype}")
