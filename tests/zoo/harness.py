"""What the tests and the benchmark of the zoo do with an entry: capture it, plan it, compare its numbers."""

from __future__ import annotations

from functools import cache

from entry import ROWS, Entry
from local_machines import slow_cluster

from autopar.graph.capture import Captured
from autopar.plan.plan import Plan
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import ParityReport, capture_for, compare
from autopar.search.degrees import Degrees, plan_from_degrees

DTYPE = "float64"


@cache
def captured(entry: Entry) -> Captured:
    """The entry in float64 with tagged rows, captured once a session."""
    return capture_for(entry.build, DTYPE)


def tensor_plan(entry: Entry, tp: int = 2) -> Plan:
    """The best plan that is one tensor axis of `tp` ranks."""
    wanted = Degrees(
        global_batch=ROWS, micro_batch=ROWS, tp=tp, dtype=DTYPE, param_dtype=DTYPE, optimizer="sgd",
    )
    return plan_from_degrees(captured(entry).graph, slow_cluster(tp), wanted)


def parity(entry: Entry, plan: Plan, pool: LocalPool) -> ParityReport:
    """The plan's loss and gradients on the pool against one process's."""
    return compare(entry.build, plan, pool=pool, captured=captured(entry))


def num_split_ops(plan: Plan) -> int:
    """Ops of the plan's classes that split a factor."""
    return sum(bool(strategy.factor) for choice in plan.shardings for _, strategy in choice.ops)
