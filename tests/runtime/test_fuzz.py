"""A dozen random legal plans of six families against one process; tests/benchmarks/bench_fuzz.py runs hundreds."""

from __future__ import annotations

import random

import pytest
from fuzz import case, check, drawn
from fuzz_models import FAMILIES
from random_plans import random_actions

from autopar.plan.actions import check_actions
from autopar.runtime.local import LocalPool


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(2 * len(FAMILIES)))
def test_a_random_plan_has_the_numbers_of_one_process(pool: LocalPool, seed: int) -> None:
    """Losses and gradients of three steps, and the parameters after them."""
    of = case(seed, worlds=(2, 3, 4))
    found = drawn(of)
    report = check(of, found, pool)
    assert report.passed, f"{of}: {report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"


@pytest.mark.processes
@pytest.mark.parametrize("seed", [13, 18])  # GPT-2 and Llama with a tensor axis, in one stage and in a pipeline
def test_a_compiled_random_plan_has_the_numbers_of_one_process(pool: LocalPool, seed: int) -> None:
    of = case(seed, worlds=(2,))
    report = check(of, drawn(of), pool, compiled=True)
    assert report.passed, f"{of}: {report.plan_summary}: loss {report.loss_error:.1e}, {report.worst}"


@pytest.mark.parametrize("seed", range(20))
def test_random_lists_of_actions_pass_the_check(seed: int) -> None:
    chance = random.Random(seed)
    ranks, chunks, micro_batches = chance.randint(1, 4), chance.randint(1, 2), chance.randint(1, 4)
    lists = random_actions(ranks, ranks * chunks, micro_batches, chance)
    check_actions(lists, ranks * chunks, micro_batches)
