"""The one adapter to OR-Tools CP-SAT: the shortest schedule of a small pipeline, proved.

It runs in a process of its own, this module as a program, like HiGHS in `mathopt`: the two crash in one process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORKERS = 1  # with a limit in deterministic time: the same answer on every machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that a machine does without a break: a stage's action, or a message on a link."""

    machine: int
    duration: int  # in ticks
    after: tuple[int, ...] = ()  # indices of tasks that must have ended
    store: int = -1  # of the memory whose level `change` moves: at the start where it adds, at the end where it takes
    change: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """Tasks to schedule; `limits[s]` bounds the level of store s. `hint`: starts of a schedule that is known."""

    tasks: tuple[Task, ...]
    limits: tuple[int, ...]
    hint: tuple[int, ...]
    horizon: int
    lower: int  # a bound that is known
    work_limit: float  # CP-SAT's deterministic seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Starts in ticks (empty: none better than the hint was found), and the bound that was proved."""

    starts: tuple[int, ...]
    end: int
    lower: int


class SolverFailedError(Exception):
    """The solver's process gave no answer."""


def solve_shop(shop: Shop) -> Answer:
    """The shortest schedule found within the limit of work. SolverFailedError where the process fails."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "autopar.search.cpsat"], input=pickle.dumps(shop), capture_output=True,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SolverFailedError(f"the solver's process ended with {done.returncode}: {' '.join(last)}")
    answer = pickle.loads(done.stdout)
    assert isinstance(answer, Answer)
    return answer


def _solve(shop: Shop) -> Answer:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    starts = [model.new_int_var(0, shop.horizon, f"s{i}") for i in range(len(shop.tasks))]
    end = model.new_int_var(shop.lower, shop.horizon, "end")
    machines: dict[int, list[cp_model.IntervalVar]] = {}
    stores: dict[int, list[tuple[cp_model.LinearExprT, int]]] = {}
    for i, task in enumerate(shop.tasks):
        interval = model.new_fixed_size_interval_var(starts[i], task.duration, f"i{i}")
        machines.setdefault(task.machine, []).append(interval)
        for before in task.after:
            model.add(starts[i] >= starts[before] + shop.tasks[before].duration)
        model.add(end >= starts[i] + task.duration)
        if task.change:
            at = starts[i] if task.change > 0 else starts[i] + task.duration
            stores.setdefault(task.store, []).append((at, task.change))
        model.add_hint(starts[i], shop.hint[i])
    for intervals in machines.values():
        model.add_no_overlap(intervals)
    for store, changes in stores.items():
        model.add_reservoir_constraint(
            [at for at, _ in changes], [change for _, change in changes], 0, shop.limits[store]
        )
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = WORKERS
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = shop.work_limit
    status = solver.solve(model)
    lower = max(shop.lower, round(solver.best_objective_bound)) if status != cp_model.UNKNOWN else shop.lower
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(starts=(), end=shop.horizon, lower=lower)
    return Answer(starts=tuple(solver.value(own) for own in starts), end=solver.value(end), lower=lower)


def _main() -> None:
    sys.stdout.buffer.write(pickle.dumps(_solve(pickle.load(sys.stdin.buffer))))


if __name__ == "__main__":
    from autopar.search import cpsat  # so that what is pickled is known by this module's name

    cpsat._main()
