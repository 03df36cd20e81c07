"""Random legal strategies for every op: all that a planner could emit on a tensor axis is right, not only the best."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import runtime_models
from test_parity import captured_of, graph_of, plan_of

from autopar.graph.model_graph import BlockClass
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import compare
from autopar.search.shardings import at_rows
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import conversion, divides
from autopar.sharding.state import RP, Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding

pytestmark = pytest.mark.processes


def random_sharding(cls: BlockClass, size: int, boundary: State, chance: random.Random) -> ClassSharding:
    """Any strategy for each op that its operands can be converted to; split strategies are preferred."""
    strategies = class_strategies(cls, size)
    tensors = cls.tensor

    def at_boundary(name: str) -> State:
        info = tensors[name]
        hidden = info.requires_grad and len(info.shape) == 3
        return boundary if hidden and divides(info.shape, boundary, size) else R

    wanted: dict[str, list[State]] = {name: [] for name in (*cls.params, *cls.buffers)}
    state: dict[str, State] = {name: at_boundary(name) for name in cls.inputs}
    chosen = []
    for op in cls.ops:
        def fits(name: str, want: State) -> bool:
            if name in wanted:
                return want.kind is not Kind.PARTIAL
            return conversion(state[name], want, tensors[name].requires_grad) is not None

        legal = [s for s in strategies[op.name] if all(map(fits, op.operands, s.inputs))]
        split = [s for s in legal if s.factor]
        strategy = chance.choice(split if split and chance.random() < 0.8 else legal)
        chosen.append((op.name, strategy))
        for name, want in zip(op.operands, strategy.inputs, strict=True):
            if name in wanted:
                wanted[name].append(want)
        state.update({name: s for name, s in zip(op.outputs, strategy.outputs, strict=True) if name})
    stored = {name: chance.choice([*states, R, RP]) for name, states in wanted.items()}
    return ClassSharding(
        cls=cls.name, inputs=tuple(map(at_boundary, cls.inputs)), params=tuple(stored[name] for name in cls.params),
        buffers=(R,) * len(cls.buffers), outputs=tuple(map(at_boundary, cls.outputs)), ops=tuple(chosen),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model", ["gpt2", "llama_untied"])
def test_random_strategies(pool: LocalPool, model: str, seed: int) -> None:
    chance = random.Random(f"{model} {seed}")
    boundary = shard(1) if seed % 2 else R
    plan = plan_of(model, "tp2" if seed < 4 else "fsdp2xtp2", "float64")
    graph = graph_of(model, "float64")
    shardings = tuple(
        random_sharding(graph.block_class[choice.cls], 2, boundary, chance) for choice in plan.shardings
    )
    shardings = at_rows(shardings, graph, plan.micro_batch)
    lowerings = {strategy.lowering for choice in shardings for _, strategy in choice.ops}
    report = compare(
        getattr(runtime_models, model), replace(plan, shardings=shardings), steps=2, pool=pool,
        captured=captured_of(model, "float64"),
    )
    assert report.passed, f"{sorted(lowerings)}: loss {report.loss_error:.1e}, {report.worst}"
