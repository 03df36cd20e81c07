"""Blocks that are compiled together: which, as what, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import runtime_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_machines import slow_cluster
from torch import Tensor

from autopar.graph.capture import capture
from autopar.plan.plan import Recompute, Variant
from autopar.runtime.compiled_runs import MAX_TOGETHER, RunMaker, lengths
from autopar.runtime.engine import Trainer
from autopar.search.degrees import Degrees, plan_from_degrees


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=6))
def test_every_block_is_in_one_run_and_equal_ones_are_cut_evenly(groups: list[tuple[int, int]]) -> None:
    classes = [(i, name) for i, (name, count) in enumerate(groups) for _ in range(count)]
    found = lengths(classes)
    assert sum(found) == len(classes)
    assert all(1 <= length <= MAX_TOGETHER for length in found)
    ends = {sum(found[:i]) for i in range(len(found) + 1)}
    start = 0
    for _, count in groups:
        if count > 1:  # such a group is cut off from its neighbours
            assert {start, start + count} <= ends
            inside = sorted(end for end in ends if start <= end <= start + count)
            pieces = [b - a for a, b in pairwise(inside)]
            assert max(pieces) - min(pieces) <= 1
            assert len(pieces) == -(-count // MAX_TOGETHER)
        start += count


def test_a_model_is_cut_by_its_layers() -> None:
    layers = ["layer"] * 24
    assert lengths(["prologue", *layers, "norm", "epilogue"]) == [1, 8, 8, 8, 2]
    assert lengths(["prologue", *layers[:22], "epilogue"]) == [1, 8, 7, 7, 1]
    assert lengths(["sliding", "full"] * 6) == [6, 6]


def trainer_of(compiles: bool, recompute: Recompute, param_dtype: str) -> tuple[Trainer, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch, _ = runtime_models.gpt2()
    captured = capture(model, batch, tag_rows=True)
    wanted = Degrees(global_batch=8, micro_batch=4, dtype="float32", param_dtype="float32", recompute=recompute)
    plan = plan_from_degrees(captured.graph, slow_cluster(1), wanted)
    plan = replace(plan, compile=compiles, param_dtype=param_dtype)
    return Trainer(model, plan, captured, lambda params: torch.optim.SGD(params, lr=0.1)), batch


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize("param_dtype", ["float32", "float64"])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL])
def test_losses_and_gradients_are_those_of_single_blocks(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, param_dtype: str
) -> None:
    """Parameters in float64 have copies in float32, whose gradients are collected by run."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    found: list[tuple[float, float, dict[str, Tensor]]] = []
    for compiles in (False, True):
        trainer, batch = trainer_of(compiles, recompute, param_dtype)
        runs = trainer.stages[0].module._autopar_runs
        layers_together = compiles and recompute is not Recompute.FULL
        assert [(run.first, run.last) for run in runs.values()] == ([(1, 3)] if layers_together else []) + (
            [(3, 5)] if compiles and len(trainer.stages[0].module._autopar_chain) > 4 else [])
        loss = trainer.forward_backward(batch).item()
        gradients = trainer.full_gradients()
        trainer.optimizer_step()
        found.append((loss, trainer.evaluate(batch).item(), gradients))
        trainer.close()
    (loss, evaluated, gradients), (again, evaluated_again, others) = found
    assert again == pytest.approx(loss, rel=1e-6)
    assert evaluated_again == pytest.approx(evaluated, rel=1e-6)
    for name, value in gradients.items():
        assert (others[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


def test_runs_of_one_structure_share_their_function() -> None:
    trainer, _ = trainer_of(False, Recompute.NONE, "float32")
    chain = trainer.stages[0].module._autopar_chain
    (first, one), (second, other) = chain[1:3]
    compiled: list[Any] = []
    maker = RunMaker(lambda code: compiled.append(code) or code)  # type: ignore[func-returns-value]
    runs = [
        maker.run(number, [block], [module._autopar_bound], frozenset(block.outputs))
        for number, (block, module) in ((1, (first, one)), (2, (second, other)))
    ]
    assert len(compiled) == 1
    assert runs[0].code is runs[1].code
    assert runs[0].inputs != runs[1].inputs, "under the names of their own blocks"
    trainer.close()


def test_variants_that_recompute_whole_blocks_stand_alone() -> None:
    trainer, _ = trainer_of(False, Recompute.NONE, "float32")
    module = trainer.stages[0].module._autopar_chain[1][1]
    assert module._autopar_is_plain
    module._autopar_variant = Variant(recompute=Recompute.FULL)
    assert not module._autopar_is_plain
    trainer.close()
