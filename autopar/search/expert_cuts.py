"""A bound over all cuts of plans with an expert axis, from the costs of each stage alone, and the cut it is of.

The bound is that of `bounds`: the first micro-batch's time through all blocks, what one stage does with the others, and
what stage 0 does once a step. A stage's times are the simulator's own; what its layers add so that it fits counts in
full, as if it hid no communication, beside times that hide none of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autopar.plan.plan import Plan, Stage
from autopar.search.balance import smallest_bottleneck, windows_of
from autopar.search.best_first import Engine
from autopar.search.bounds import Cuts
from autopar.search.candidates import Candidate
from autopar.sharding.rewrites import rewritten
from autopar.simulate.block_cost import BlockCost
from autopar.simulate.stage_cost import StageCost, stage_cost

Costs = dict[str, BlockCost]  # by class


class ExpertCuts:
    """Cuts of one candidate with an expert axis of `size` into stages, on nodes that are alike."""

    def __init__(self, engine: Engine, c: Candidate, size: int, costs: Costs, limit_s: float) -> None:
        self._engine, self._c, self._limit_s = engine, c, limit_s
        last = len(engine.graph.blocks)
        self._plan = engine.plan_of(c, (*range(c.pp), last), ep=size)
        self._graph = rewritten(engine.graph, self._plan.rewrites)
        each = [costs[block.cls] for block in engine.graph.blocks]
        self._forward = np.concatenate([[0.0], np.cumsum([x.forward_compute_s + x.forward_tp_comm_s for x in each])])
        self._backward = np.concatenate([[0.0], np.cumsum([x.backward_compute_s + x.backward_tp_comm_s for x in each])])
        params = [name for block in engine.graph.blocks for name in block.params]
        self._are_apart = len(set(params)) == len(params)
        self._classes = tuple(block.cls for block in engine.graph.blocks)
        self._known: dict[tuple[object, ...], StageCost] = {}
        self._loads: dict[tuple[object, ...], tuple[float, float]] = {}

    def best(self) -> tuple[float, Cuts | None]:
        """What no cut can be faster than, and the cut that this is of; the limit and None where all reach it."""
        c, last = self._c, len(self._forward) - 1
        chain = float(self._forward[-1] + self._backward[-1])
        tables, once = [], np.zeros(last + 1)
        for stage in range(c.pp):
            table = np.full((last + 1, last + 1), np.inf)
            firsts = range(stage, last - c.pp + stage + 1) if stage else (0,)
            for first in firsts:
                ends = range(first + 1, last - c.pp + stage + 2) if stage < c.pp - 1 else (last,)
                for end in ends:
                    if self._work(stage, first, end) + chain < self._limit_s:
                        table[first, end], alone = self._load(stage, first, end)
                        if not stage:
                            once[end] = alone
            tables.append(table)
        found = smallest_bottleneck(windows_of(tables), once)
        if found is None or found.value + chain >= self._limit_s:
            return self._limit_s, None
        return found.value + chain, found.cuts

    def _weights(self, stage: int) -> tuple[int, int]:
        """How often the stage's forward and backward count beside the first micro-batch's."""
        m = self._c.num_micro_batches
        return m - min(self._c.pp - stage, m), m - 1

    def _work(self, stage: int, first: int, end: int) -> float:
        """The load by the work of the blocks alone."""
        forwards, backwards = self._weights(stage)
        return float(
            forwards * (self._forward[end] - self._forward[first])
            + backwards * (self._backward[end] - self._backward[first])
        )

    def _load(self, stage: int, first: int, end: int) -> tuple[float, float]:
        """The load of a stage of these blocks (infinite: they do not fit), and what it does once a step at least."""
        key = stage, *self._alike(first, end)
        if key not in self._loads:
            self._loads[key] = self._make_load(stage, first, end)
        return self._loads[key]

    def _make_load(self, stage: int, first: int, end: int) -> tuple[float, float]:
        plan = self._with(stage, first, end)
        forwards, backwards = self._weights(stage)
        cost = self._cost(plan, stage)
        load = forwards * cost.forward_s + backwards * cost.backward_s
        kind = self._engine.layout.kinds(self._c)[stage]
        in_flight = min(self._c.pp - stage, self._c.num_micro_batches)
        if cost.peak_bytes(in_flight) <= kind.memory_limit_bytes:
            return load, cost.step_once_s
        options = self._engine.options(self._c, kind, plan, stage)
        if options is None:
            return np.inf, 0.0
        leaner = plan.stages[stage].with_variants([option.variant for option in options])
        added = stage_cost(self._graph, self._engine.cluster, _replaced(plan, stage, leaner), stage)
        more = (forwards + 1) * (_forward_s(added) - _forward_s(cost))
        more += (backwards + 1) * (_backward_s(added) - _backward_s(cost))
        plain = forwards * _forward_s(cost) + backwards * _backward_s(cost) + more
        return max(load, plain), cost.optimizer_s + cost.step_tp_s

    def _alike(self, first: int, end: int) -> tuple[object, ...]:
        """The same for ranges of blocks that cost the same: of equal classes, where no two blocks share parameters."""
        return self._classes[first:end] if self._are_apart else (first, end)

    def _with(self, stage: int, first: int, end: int) -> Plan:
        return _replaced(self._plan, stage, replace(self._plan.stages[stage], first=first, last=end))

    def _cost(self, plan: Plan, stage: int) -> StageCost:
        """The stage's cost where it keeps everything; the same on all nodes."""
        own = plan.stages[stage]
        key = id(self._engine.layout.kinds(self._c)[stage]), *self._alike(own.first, own.last)
        if key not in self._known:
            self._known[key] = stage_cost(self._graph, self._engine.cluster, plan, stage)
        return self._known[key]


def _replaced(plan: Plan, stage: int, own: Stage) -> Plan:
    return replace(plan, stages=tuple(own if i == stage else other for i, other in enumerate(plan.stages)))


def _forward_s(cost: StageCost) -> float:
    return cost.forward_compute_s + cost.forward_tp_s


def _backward_s(cost: StageCost) -> float:
    return cost.backward_compute_s + cost.backward_tp_s
