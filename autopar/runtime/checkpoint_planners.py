"""torch.distributed.checkpoint's planners for held tensors: every rank writes and reads the chunks that it holds.

Of chunks that several ranks hold, the planner that torch gives lets one write each, and shares them out evenly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from autopar.runtime.chunks import Chunk, HeldTensor


class HeldSavePlanner(DefaultSavePlanner):
    """Saves a flat dict of held tensors and of objects; an object is given by one rank alone."""

    def create_local_plan(self) -> SavePlan:
        items = [item for name, value in self.state_dict.items() for item in _write_items(name, value)]
        self.plan = replace(SavePlan(items), planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return _chunk_at(value, index).detach() if isinstance(value, HeldTensor) else value


class HeldLoadPlanner(DefaultLoadPlanner):
    """Loads into a flat dict of held tensors, in place, and of objects, whatever they are before."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata[name]
            if isinstance(saved, TensorStorageMetadata):
                items.extend(create_read_items_for_chunk_list(name, saved, [_box(chunk) for chunk in value.chunks]))
            else:
                nowhere, index = torch.Size((0,)), MetadataIndex(name)
                items.append(ReadItem(
                    type=LoadItemType.BYTE_IO, dest_index=index, dest_offsets=nowhere, storage_index=index,
                    storage_offsets=nowhere, lengths=nowhere,
                ))
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _chunk_at(self.state_dict[index.fqn], index)


def _write_items(name: str, value: Any) -> list[WriteItem]:
    if not isinstance(value, HeldTensor):
        return [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)]
    properties, size = TensorProperties.create_from_tensor(value.local), torch.Size(value.shape)
    return [
        WriteItem(
            index=MetadataIndex(name, torch.Size(chunk.offsets)), type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=_box(chunk), properties=properties, size=size),
        )
        for chunk in value.chunks
    ]


def _box(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))


def _chunk_at(held: HeldTensor, index: MetadataIndex) -> Tensor:
    chunk = next(chunk for chunk in held.chunks if chunk.offsets == index.offset)
    return chunk.of(held.local)
