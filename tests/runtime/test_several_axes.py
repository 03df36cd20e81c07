"""Two axes inside a stage, planned and at random, give one process's numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import runtime_models
import torch
from test_checkpoint import load_and_go_on, save_and_go_on
from test_parity import captured_of, graph_of

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import BlockClass
from autopar.plan.plan import Plan
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.shardings import at_rows
from autopar.sharding.joint import Placement, can_be_placed, joint_strategies
from autopar.sharding.route import steps
from autopar.sharding.state import RP, Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding

pytestmark = pytest.mark.processes
CASES: dict[str, dict[str, int | bool]] = {
    "cp2": {"cp": 2}, "cp2xtp2": {"cp": 2, "tp": 2}, "cp2xtp2_sequence": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "cp2xfsdp2": {"cp": 2, "dp_shard": 2, "zero": 3}, "cp2xzero1": {"cp": 2, "dp_shard": 2, "zero": 1},
    "cp2xdp2": {"cp": 2, "dp_replicate": 2}, "pp2xcp2": {"cp": 2, "pp": 2},
}


@cache
def plan_of(model: str, name: str) -> Plan:
    case = CASES[name]
    ranks = int(case.get("cp", 1)) * int(case.get("tp", 1)) * int(case.get("pp", 1)) * int(case.get("dp_shard", 1))
    ranks *= int(case.get("dp_replicate", 1))
    degrees = Degrees(global_batch=8, micro_batch=2, dtype="float64", param_dtype="float64", **case)  # type: ignore[arg-type]
    return plan_from_degrees(graph_of(model, "float64"), parse_cluster(f"{ranks}xCPU"), degrees)


@pytest.mark.parametrize(("model", "name"), [*(("llama", name) for name in CASES), ("gpt2", "cp2xtp2")])
def test_context_axis(pool: LocalPool, model: str, name: str) -> None:
    plan = plan_of(model, name)
    context = [choice for choice in plan.shardings if choice.axis == "cp" and choice.cls != "prologue"]
    assert context and all(shard(1) in choice.inputs for choice in context)
    if plan.stages[0].mesh.tp > 1:
        split = [choice for choice in plan.shardings if choice.axis == "tp"]
        assert any(state.kind is Kind.SHARDED for choice in split for state in choice.params)
    report = compare(
        getattr(runtime_models, model), plan, steps=2, pool=pool, captured=captured_of(model, "float64")
    )
    assert report.passed, f"loss {report.loss_error:.1e}, {report.worst}"


@pytest.mark.parametrize(("before", "after"), [("cp2xfsdp2", "cp2xtp2"), ("cp2xtp2", "cp2xzero1")])
def test_a_checkpoint_of_a_context_plan_loads_under_another(
    pool: LocalPool, tmp_path: Path, before: str, after: str
) -> None:
    directory = str(tmp_path / "state")
    losses, saved = pool.run(save_and_go_on, "llama", plan_of("llama", before), directory, num_ranks=4)[0]
    found, loaded = pool.run(load_and_go_on, "llama", plan_of("llama", after), directory, num_ranks=4)[0]
    assert found == pytest.approx(losses, rel=1e-9)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def random_shardings(cls: BlockClass, boundary: Placement, chance: random.Random) -> tuple[ClassSharding, ...]:
    """Any joint strategy for each op that its operands can be converted to; those that split twice are preferred."""
    strategies, tensors, sizes = joint_strategies(cls, (2, 2)), cls.tensor, (2, 2)

    def at_boundary(name: str) -> Placement:
        info = tensors[name]
        hidden = info.requires_grad and len(info.shape) == 3
        return boundary if hidden and can_be_placed(info.shape, boundary, sizes) else (R, R)

    wanted: dict[str, list[Placement]] = {name: [] for name in (*cls.params, *cls.buffers)}
    place: dict[str, Placement] = {name: at_boundary(name) for name in cls.inputs}
    chosen = []
    for op in cls.ops:
        legal = []
        for own in strategies[op.name]:
            inputs = list(zip(*(part.inputs for part in own), strict=True))
            if all(
                (all(s.kind is not Kind.PARTIAL for s in want) and want[0].kind is not Kind.SHARDED)
                if name in wanted else steps(place[name], want, tensors[name].requires_grad) is not None
                for name, want in zip(op.operands, inputs, strict=True)
            ):
                legal.append(own)
        twice = [own for own in legal if own[0].factor and own[1].factor]
        own = chance.choice(twice if twice and chance.random() < 0.7 else legal)
        chosen.append((op.name, own))
        for name, want in zip(op.operands, zip(*(part.inputs for part in own), strict=True), strict=True):
            if name in wanted:
                wanted[name].append(want)
        left = zip(*(part.outputs for part in own), strict=True)
        place.update({name: p for name, p in zip(op.outputs, left, strict=True) if name})

    def stored(name: str) -> State:
        return chance.choice([*(want[1] for want in wanted[name]), R, RP])

    rest = {name: (RP, stored(name)) for name in cls.params}
    return tuple(
        ClassSharding(
            cls=cls.name, inputs=tuple(at_boundary(name)[i] for name in cls.inputs),
            params=tuple(rest[name][i] for name in cls.params), buffers=(R,) * len(cls.buffers),
            outputs=tuple(at_boundary(name)[i] for name in cls.outputs),
            ops=tuple((name, own[i]) for name, own in chosen), axis=axis,
        )
        for i, axis in enumerate(("cp", "tp"))
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", ["gpt2", "llama_untied"])
def test_random_joint_strategies(pool: LocalPool, model: str, seed: int) -> None:
    chance = random.Random(f"{model} {seed}")
    graph, plan = graph_of(model, "float64"), plan_of(model, "cp2xtp2")
    boundary = [(shard(1), R), (shard(1), shard(1)), (R, shard(1))][seed % 3]
    names = dict.fromkeys(choice.cls for choice in plan.shardings)
    shardings = [own for name in names for own in random_shardings(graph.block_class[name], boundary, chance)]
    joint = replace(plan, shardings=at_rows(tuple(shardings), graph, plan.micro_batch))
    lowerings = sorted({strategy.lowering for choice in shardings for _, strategy in choice.ops})
    report = compare(
        getattr(runtime_models, model), joint, steps=2, pool=pool, captured=captured_of(model, "float64")
    )
    assert report.passed, f"{lowerings}: loss {report.loss_error:.1e}, {report.worst}"
