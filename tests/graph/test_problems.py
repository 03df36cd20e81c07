"""Whether a class's ops give the shapes that it states, run without data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopar.graph import interpret
from autopar.graph.capture import capture
from autopar.graph.interpret import problem_of, problems_of
from autopar.graph.model_graph import BlockClass, Op


def _class() -> BlockClass:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2)))
    graph = capture(model, (torch.ones(2, 8),), loss_fn=lambda output, batch: output.mean(), tag_rows=True).graph
    return next(cls for cls in graph.classes if len(cls.params) == 4)


def _with_shape(cls: BlockClass, name: str, shape: tuple[int, ...]) -> BlockClass:
    return replace(cls, tensors=tuple(
        replace(info, shape=shape) if info.name == name else info for info in cls.tensors))


def _failing_on(monkeypatch: pytest.MonkeyPatch, *, meta: bool, error: Exception) -> list[str]:
    """Lets the second op fail, on meta tensors alone if `meta`. Returns the ops that are run."""
    run, ran = interpret.run_op, list[str]()

    def failing(op: Op, local: dict[str, Tensor], device: torch.device) -> None:
        ran.append(op.name)
        if op.name == "gelu" and (device.type == "meta" or not meta):
            raise error
        run(op, local, device)

    monkeypatch.setattr(interpret, "run_op", failing)
    return ran


def test_an_op_that_gives_another_shape_or_does_not_run_is_named() -> None:
    cls = _class()
    assert problem_of(cls) is None
    assert "gives [" in (problem_of(_with_shape(cls, "gelu", (1, 8))) or "")
    assert "does not run" in (problem_of(_with_shape(cls, cls.params[0], (8, 3))) or "")
    other = replace(cls, ops=tuple(
        replace(op, target="aten.t.default", kwargs=()) if op.name == "gelu" else op for op in cls.ops))
    assert "aten.t.default" in (problem_of(other) or "")
    assert problems_of(cls, [cls, other, cls]) == [None, problem_of(other), None]
    assert problems_of(other, [cls, cls]) == [problem_of(other)] * 2
    assert problems_of(other, []) == []


@pytest.mark.parametrize("error", [NotImplementedError("no meta kernel"), AssertionError("not on meta")])
def test_what_meta_tensors_cannot_do_fake_ones_are_asked_for(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    cls = _class()
    ran = _failing_on(monkeypatch, meta=True, error=error)
    assert problem_of(cls) is None
    assert ran == ["linear", "gelu", "linear", "gelu", "linear_1"]
    assert problems_of(cls, [cls]) == [None]


def test_what_neither_can_do_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = _class()
    _failing_on(monkeypatch, meta=False, error=RuntimeError("it is broken\nhere"))
    assert "does not run: it is broken" in (problem_of(cls) or "")
