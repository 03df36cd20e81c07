"""The chunks of all ranks are the full tensor, once, and each is where the rank has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.runtime.chunks import boxes, held_chunks
from autopar.runtime.collectives import Axis
from autopar.runtime.layout import ParamLayout
from autopar.runtime.parts import part_of
from autopar.sharding.state import RP, R, padded_shard, shard


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], ParamLayout, int, int]:
    """A shape, a layout of it, and the sizes of the tensor and the expert axis."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    tensor_ranks, expert_ranks = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    if by_experts := expert_ranks > 1:
        shape[0] *= expert_ranks
    dim = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["whole", "on request", "divided", "in strides", "padded"]))
    outer = draw(st.integers(2, 3)) if kind == "in strides" else 1
    if kind in ("divided", "in strides"):
        shape[dim] *= outer * tensor_ranks
    own = shape[dim] // (expert_ranks if dim == 0 else 1)
    state = {"whole": R, "on request": RP}.get(kind, padded_shard(dim, own) if kind == "padded" else shard(dim, outer))
    layout = ParamLayout(names=("weight",), state=state, stages=(0,), unit="", by_experts=by_experts)
    return tuple(shape), layout, tensor_ranks, expert_ranks


@given(layouts())
def test_the_chunks_of_all_ranks_are_the_tensor(drawn: tuple[tuple[int, ...], ParamLayout, int, int]) -> None:
    shape, layout, tensor_ranks, expert_ranks = drawn
    full = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    built = torch.zeros_like(full)
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for expert_rank in range(expert_ranks):
        for tensor_rank in range(tensor_ranks):
            tensor_axis = Axis(group_name="tensor", size=tensor_ranks, rank=tensor_rank)
            expert_axis = Axis(group_name="experts", size=expert_ranks, rank=expert_rank)
            groups: Any = SimpleNamespace(
                tensor_axis=tensor_axis, expert_axis=expert_axis if expert_ranks > 1 else None, data_mesh=None,
                expert_mesh=None,
            )
            local = part_of(full, layout, groups)
            chunks = held_chunks(shape, layout, local, groups)
            assert sum(chunk.of(local).numel() for chunk in chunks) == (local != 0).sum(), "all but the padding"
            for chunk in chunks:
                ends = map(sum, zip(chunk.offsets, chunk.sizes, strict=True))
                place = tuple(map(slice, chunk.offsets, ends))
                assert torch.equal(chunk.of(local), full[place])
                if (chunk.offsets, chunk.sizes) not in seen:  # copies are the same box
                    seen.add((chunk.offsets, chunk.sizes))
                    built[place] += chunk.of(local)
    assert torch.equal(built, full)


def test_the_boxes_of_strides_rows_and_padding() -> None:
    found = boxes([torch.tensor([1, 2, 5, 6]), torch.tensor([3, 4, 0, 0])])
    assert [(chunk.offsets, chunk.sizes, chunk.starts) for chunk in found] == [
        ((0, 2), (2, 2), (0, 0)), ((4, 2), (2, 2), (2, 0)),
    ]
    assert boxes([torch.tensor([], dtype=torch.int64), torch.arange(1, 4)]) == (), "a rank without rows"
    assert [chunk.sizes for chunk in boxes([])] == [()], "a number is one chunk"
