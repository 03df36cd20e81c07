"""The state of a parameter that two classes use is the best of all that both can use, by brute force."""

from __future__ import annotations

import random

import pytest
from toy_graphs import cluster, mlp_chain

from autopar.graph.model_graph import BlockClass
from autopar.search.shardings import ShardingChooser
from autopar.search.ties import Options, TieSearch
from autopar.sharding.joint import Placement
from autopar.sharding.propagate import class_strategies
from autopar.sharding.state import RP, R, State, shard
from autopar.sharding.strategy import ClassSharding

OWN = {"prologue": "table", "epilogue": "head"}
SHARDED = (shard(0), shard(1))


class Prices:
    """Random times of each class under each state of its parameter, and random charges for the states."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.time_of = {name: {state: chance.random() for state in (*SHARDED, RP)} for name in OWN}
        self.charge_of = {state: chance.random() for state in (*SHARDED, RP)}

    def solve(self, cls: BlockClass, options: Options) -> tuple[ClassSharding] | None:
        """The class with its parameter in the fastest of the states that the options leave."""
        own = OWN[cls.name]
        left = {
            strategy.inputs[op.operands.index(own)] for op in cls.ops if own in op.operands
            for (strategy,) in options[op.name]
        } & self.time_of[cls.name].keys()
        best = min(left, key=lambda state: self.time_of[cls.name][state], default=None)
        return None if best is None else self.sharding(cls, best)

    def sharding(self, cls: BlockClass, state: State) -> tuple[ClassSharding]:
        return (ClassSharding(
            cls=cls.name, inputs=(R,) * len(cls.inputs), params=(state,), buffers=(), outputs=(R,) * len(cls.outputs),
            ops=(),
        ),)

    def time_s(self, cls: BlockClass, choice: tuple[ClassSharding, ...]) -> float:
        return self.time_of[cls.name][choice[0].params[0]]

    def charge_s(self, cls: BlockClass, param: str, state: Placement) -> float:
        assert param == OWN[cls.name]
        return self.charge_of[state[0]]


@pytest.mark.parametrize("tied", [True, False])
def test_brute_force_agrees(tied: bool) -> None:
    graph = mlp_chain(tied=tied)
    options = {
        name: {op: [(own,) for own in each] for op, each in class_strategies(graph.block_class[name], 2).items()}
        for name in OWN
    }
    moved = 0
    for seed in range(60):
        prices = Prices(seed)
        search = TieSearch(graph=graph, solve=prices.solve, time_s=prices.time_s, charge_s=prices.charge_s)
        alone = {name: prices.solve(graph.block_class[name], options[name]) for name in OWN}
        assert None not in alone.values()
        before = {name: choice for name, choice in alone.items() if choice is not None}
        found = search.settle(before, options)
        states = {name: choice[0].params[0] for name, choice in found.items()}
        if not tied:
            assert found == before
            continue
        together = {
            state: sum(times[state] for times in prices.time_of.values()) + prices.charge_of[state]
            for state in SHARDED
        }
        own = {choice[0].params[0] for choice in before.values()}
        stored = own.pop() if len(own) == 1 else RP
        apart = sum(min(times.values()) for times in prices.time_of.values()) + prices.charge_of[stored]
        settled = set(states.values())
        cost = sum(prices.time_of[name][state] for name, state in states.items())
        cost += prices.charge_of[settled.pop() if len(settled) == 1 else RP]
        assert cost == pytest.approx(min(apart, *together.values()))
        moved += found != before
    assert (moved > 5) == tied


@pytest.mark.parametrize("cp", [1, 2])
def test_a_tied_embedding_is_split_in_one_state(cp: int) -> None:
    """Alone the embedding is split by features and the head by words: every rank would hold the whole."""
    graph = mlp_chain(num_layers=1, hidden=1024, inner=4096, seq_len=1024, vocab=8192, tied=True)
    choice = ShardingChooser(graph, cluster(1, 4), "bfloat16", rows=2).choose(2, sequence_parallel=True, cp=cp)
    assert choice is not None
    states = {own.cls: own.params for own in choice.shardings if own.axis == "tp" and own.cls in OWN}
    assert states == dict.fromkeys(OWN, (shard(0),))
