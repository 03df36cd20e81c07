"""Factor graphs of any width: elimination, branch and bound, and the one adapter to OR-Tools MathOpt with HiGHS.

HiGHS runs in a process of its own, this module as a program: ortools and highspy crash when one process holds both.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np

from autopar.search.elimination import MAX_TABLE, Assignment, FactorGraph, TableTooLargeError, eliminate
from autopar.search.pruning import branch_and_bound

_LARGEST = 1e6
log = logging.getLogger(__name__)


class SolverFailedError(Exception):
    """MathOpt gave no proved optimum within the time limit."""


def minimize(graph: FactorGraph, *, max_table: int = MAX_TABLE, time_limit_s: float = 60.0) -> Assignment | None:
    """The cheapest assignment: by elimination; where a table would pass `max_table` entries, by branch and bound; and
    where that proves nothing in its number of subproblems, by HiGHS.
    """
    try:
        return eliminate(graph, max_table=max_table)
    except TableTooLargeError as error:
        log.info("%s; pruning by bounds instead", error)
    found = branch_and_bound(graph)
    if found.proved:
        return None if found.values is None else Assignment(found.values, graph.cost(found.values), 0)
    log.info("not proved by branch and bound; solving with HiGHS instead")
    try:
        return solve(graph, time_limit_s=time_limit_s)
    except SolverFailedError as error:
        if found.values is None:
            raise
        gap = found.cost / found.lower_bound - 1
        log.warning("a block's sharding is proved to be within %.2g%% of the fastest only: %s", 100 * gap, error)
        return Assignment(found.values, graph.cost(found.values), 0, unproved=found.cost - found.lower_bound)


def solve(graph: FactorGraph, *, time_limit_s: float = 60.0) -> Assignment | None:
    """The cheapest assignment by integer programming, or None where every one is forbidden.

    SolverFailedError where the time limit came before the proof.
    """
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "autopar.search.mathopt"], input=pickle.dumps((graph, time_limit_s)),
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SolverFailedError(f"the solver's process ended with {done.returncode}: {' '.join(last)}")
    values, problem = pickle.loads(done.stdout)
    if problem:
        raise SolverFailedError(problem)
    return None if values is None else Assignment(values, graph.cost(values), 0)


def _scale(graph: FactorGraph) -> float:
    """What makes the largest entry `_LARGEST`: times are microseconds, which HiGHS's tolerances (1e-7) would round."""
    largest = max((np.abs(f.table[np.isfinite(f.table)]).max(initial=0.0) for f in graph.factors), default=0.0)
    return _LARGEST / float(largest) if largest else 1.0


def _solve(graph: FactorGraph, time_limit_s: float) -> tuple[int, ...] | None:
    """The local polytope with integer unary variables: exact, since tables are linear in their own indicator."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model(name="factor_graph")
    chosen = [[model.add_binary_variable(name=f"x{v}_{i}") for i in range(n)] for v, n in enumerate(graph.sizes)]
    for options in chosen:
        model.add_linear_constraint(mathopt.fast_sum(options) == 1)
    terms = []
    scale = _scale(graph)
    for index, factor in enumerate(graph.factors):
        if not factor.variables:
            if not math.isfinite(float(factor.table)):
                return None
            continue
        if len(factor.variables) == 1:
            for i, cost in enumerate(factor.table.tolist()):
                if math.isinf(cost):
                    model.add_linear_constraint(chosen[factor.variables[0]][i] == 0)
                else:
                    terms.append(cost * chosen[factor.variables[0]][i])
            continue
        users: dict[tuple[int, int], list[mathopt.Variable]] = {}
        for entry in product(*(range(graph.sizes[v]) for v in factor.variables)):
            cost = float(factor.table[entry])
            if math.isinf(cost):
                continue
            joint = model.add_variable(lb=0.0, ub=1.0, name=f"y{index}_{'_'.join(map(str, entry))}")
            terms.append(cost * joint)
            for variable, value in zip(factor.variables, entry, strict=True):
                users.setdefault((variable, value), []).append(joint)
        for variable in factor.variables:
            for value in range(graph.sizes[variable]):
                joints = users.get((variable, value), [])
                model.add_linear_constraint(mathopt.fast_sum(joints) == chosen[variable][value])
    model.minimize(scale * mathopt.fast_sum(terms))
    limits = mathopt.SolveParameters(
        time_limit=timedelta(seconds=time_limit_s), relative_gap_tolerance=0.0, absolute_gap_tolerance=0.0,
    )
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=limits)
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        return None
    if reason is not mathopt.TerminationReason.OPTIMAL:
        raise SolverFailedError(f"HiGHS stopped with {reason.name} after {time_limit_s:g} s")
    picked = result.variable_values()
    return tuple(max(range(len(options)), key=lambda i: picked[options[i]]) for options in chosen)


def _main() -> None:
    """Reads a graph and a time limit from standard input, and writes the values or what went wrong."""
    graph, time_limit_s = pickle.loads(sys.stdin.buffer.read())
    answer: tuple[tuple[int, ...] | None, str]
    try:
        answer = (_solve(graph, time_limit_s), "")
    except SolverFailedError as error:
        answer = (None, str(error))
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    _main()
