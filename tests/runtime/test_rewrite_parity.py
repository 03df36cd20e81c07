"""Plans that rewrite their blocks, against one process: the same loss and gradients under the model's own names."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import runtime_models
from local_machines import slow_cluster

from autopar.errors import InputError
from autopar.graph.capture import Captured
from autopar.graph.fingerprint import model_fingerprint
from autopar.plan.file import plan_from_json, plan_to_json
from autopar.plan.plan import Plan, Recompute
from autopar.plan.verify import verify_plan
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, compare
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.rewrite import Rewrite, RewriteKind
from autopar.sharding.rewrites import apply_rewrite, candidates_of, rewritten
from autopar.sharding.state import Kind

MERGE, SHARE, SPLIT = RewriteKind.MERGE_LINEARS, RewriteKind.SHARE_INPUT, RewriteKind.SPLIT_LINEAR
DEGREES: dict[str, dict[str, Any]] = {
    "tp2": dict(tp=2, micro_batch=4, recompute=Recompute.SELECTIVE),
    "tp2_sequence": dict(tp=2, sequence_parallel=True, micro_batch=8, recompute=Recompute.FULL),
    "fsdp2": dict(dp_shard=2, zero=3, micro_batch=2),
}


@cache
def captured(model: str) -> Captured:
    return capture_for(getattr(runtime_models, model), "float64")


def rewrites_of(model: str, kinds: tuple[RewriteKind, ...]) -> tuple[Rewrite, ...]:
    """The first rewrite of each of these kinds that applies, one after the other."""
    graph = captured(model).graph
    cls = graph.block_class[graph.blocks[1].cls]
    found: list[Rewrite] = []
    for kind in kinds:
        found.append(next(item for item in candidates_of(cls) if item.kind is kind))
        cls = apply_rewrite(cls, found[-1])
    return tuple(found)


def plan_of(model: str, kinds: tuple[RewriteKind, ...], name: str) -> Plan:
    graph, rewrites = captured(model).graph, rewrites_of(model, kinds)
    degrees = Degrees(global_batch=8, dtype="float64", param_dtype="float64", optimizer="sgd", **DEGREES[name])
    plan = plan_from_degrees(rewritten(graph, rewrites), slow_cluster(2), degrees)
    plan = replace(plan, rewrites=rewrites, model_fingerprint=model_fingerprint(graph))
    return plan_from_json(plan_to_json(plan))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "kinds", "name"),
    [
        ("llama", (MERGE, SHARE), "tp2"), ("llama", (SHARE, MERGE), "tp2_sequence"), ("llama", (MERGE, SHARE), "fsdp2"),
        ("phi3", (SPLIT, SPLIT, SHARE, MERGE), "tp2"), ("phi3", (SPLIT, SPLIT, SHARE), "fsdp2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)  # fmt: skip
def test_a_rewritten_plan_trains_as_one_process_does(
    pool: LocalPool, model: str, kinds: tuple[RewriteKind, ...], name: str
) -> None:
    plan = plan_of(model, kinds, name)
    assert [item.kind for item in plan.rewrites] == list(kinds)
    if plan.stages[0].mesh.tp > 1:
        cls = rewritten(captured(model).graph, plan.rewrites).block_class[plan.rewrites[0].cls]
        choice = plan.sharding[cls.name]
        products = [op for op in cls.ops if op.flops]
        assert all(choice.strategy[op.name].factor for op in products)
        assert sum(state.kind is Kind.SHARDED for state in choice.params) >= 4
    report = compare(getattr(runtime_models, model), plan, steps=2, pool=pool, captured=captured(model))
    assert report.passed, f"{report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"
    assert report.worst[1] <= 1e-9
    assert {name for name, _ in report.gradient_errors} == {info.name for info in captured(model).graph.params}


def test_a_plan_keeps_its_rewrites_in_its_file_and_old_files_stay_readable() -> None:
    plan = plan_of("llama", (MERGE, SHARE), "tp2")
    assert plan_from_json(plan_to_json(plan)) == plan
    verify_plan(plan, captured("llama").graph)
    without = plan_to_json(replace(plan, rewrites=())).replace(',\n "rewrites": []', "")
    assert "rewrites" not in without
    assert plan_from_json(without).rewrites == ()


def test_rewrites_that_the_model_does_not_take_are_refused_in_one_line() -> None:
    graph = captured("llama").graph
    plan = plan_of("llama", (MERGE,), "tp2")
    (rewrite,) = plan.rewrites
    head = graph.blocks[-1].cls
    for wrong, words in (
        (replace(rewrite, ops=("linear", "nothing")), "has no such ops"),
        (replace(rewrite, cls=head), "only the classes of layers are rewritten"),
        (replace(rewrite, kind=SPLIT), "more is read of it than its parts"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            verify_plan(replace(plan, rewrites=(wrong,)), graph)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not list the class's"):  # shardings of the captured ops
        verify_plan(replace(plan, rewrites=()), graph)
