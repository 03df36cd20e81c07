"""A tagged graph at true rows is the graph that capture gives at those rows."""

from __future__ import annotations

import pytest
import runtime_models
import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.graph.capture import capture
from autopar.graph.rows import at_rows


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_graph_at_true_rows(model: str, rows: int) -> None:
    module, example, _ = getattr(runtime_models, model)()
    found = at_rows(capture(module, example, tag_rows=True).graph, rows)
    expected = capture(module, {name: value[:rows] for name, value in example.items()}).graph
    assert found.blocks == expected.blocks
    for own, other in zip(found.classes, expected.classes, strict=True):
        assert own.tensors == other.tensors
        for op, right in zip(own.ops, other.ops, strict=True):
            assert (op.name, op.target) == (right.name, right.target)
            assert (op.kwargs, op.outputs) == (right.kwargs, right.outputs)
            assert op.args == right.args, op


class HalfBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[: x.shape[0] // 2].sum()


def test_sizes_that_are_no_multiple_of_the_rows_are_named() -> None:
    graph = capture(HalfBatch(), {"x": torch.ones(4, 4)}, tag_rows=True).graph
    with pytest.raises(InputError, match=r"aten\.slice"):
        at_rows(graph, 4)
