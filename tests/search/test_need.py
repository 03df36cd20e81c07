"""What an infeasible request is told that it needs."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.search import need
from autopar.search.best_first import new_chooser
from autopar.search.need import Work, counts_to_try, gib_up
from autopar.search.planner import PlanRequest, find_plan

GRAPH = mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=4096)


def told(per_node: int, memory_gib: float, batch: int, num_nodes: int = 1) -> str:
    with pytest.raises(InfeasibleError) as caught:
        find_plan(GRAPH, cluster(num_nodes, per_node, memory_gib=memory_gib), PlanRequest(global_batch=batch))
    return str(caught.value)


def fits(num_nodes: int, per_node: int, memory_gib: float, batch: int) -> bool:
    try:
        find_plan(GRAPH, cluster(num_nodes, per_node, memory_gib=memory_gib), PlanRequest(global_batch=batch))
    except InfeasibleError:
        return False
    return True


@given(st.floats(1, 1e15))
def test_sizes_are_rounded_up(size: float) -> None:
    value = float(gib_up(size)) * 2**30
    assert size * (1 - 1e-12) <= value <= max(size * 1.11, size + 0.1001 * 2**30 * (size >= 2**30))


def test_a_size_of_two_digits_stays() -> None:
    assert (gib_up(0.25 * 2**30), gib_up(1.5 * 2**30), gib_up(0.0301 * 2**30)) == ("0.25", "1.5", "0.031")


@pytest.mark.parametrize(("per_node", "batch", "gib"), [(1, 6, 0.08), (1, 9, 0.08), (1, 15, 0.06), (2, 10, 0.06)])
def test_the_number_of_nodes_is_the_smallest_that_fits(per_node: int, batch: int, gib: float) -> None:
    """Batches that few numbers divide, so that more nodes are not always better."""
    text = told(per_node, gib, batch)
    found = re.search(r"or \d+ devices \((\d+)x", text)
    assert found, text
    number = int(found[1])
    assert fits(number, per_node, gib, batch)
    assert not any(fits(fewer, per_node, gib, batch) for fewer in range(2, number))


def test_the_memory_that_is_named_is_enough_and_little_less_is_not() -> None:
    found = re.search(r"at least ([\d.]+) GiB", told(1, 0.06, 6))
    assert found
    assert fits(1, 1, float(found[1]), 6)
    assert not fits(1, 1, float(found[1]) * 0.89, 6)


@pytest.mark.parametrize(("asked", "memory_gib", "words", "less"), [
    ({"global_batch": 64, "micro_batch": 64}, 0.5, "with --micro-batch 32", {"micro_batch": 32}),
    ({"global_batch": 64, "micro_batch": 64}, 0.4, "with --micro-batch 16", {"micro_batch": 16}),
    ({"global_batch": 1, "offload": False}, 0.25, "with --offload", {"offload": True}),
    ({"global_batch": 2, "mesh": (("dp_replicate", 2),)}, 0.25, "without --mesh", {"mesh": ()}),
])
def test_less_that_fits_on_the_same_devices_is_told(
    asked: dict[str, Any], memory_gib: float, words: str, less: dict[str, Any]
) -> None:
    request = PlanRequest(**asked)
    host_gb_per_s = None if request.offload else 16.0
    devices = cluster(1, 2 if request.mesh else 1, memory_gib=memory_gib, host_gb_per_s=host_gb_per_s)
    with pytest.raises(InfeasibleError, match=f"; on these devices it fits {words}$"):
        find_plan(GRAPH, devices, request)
    find_plan(GRAPH, devices, replace(request, **less))


def test_where_no_number_helps_only_what_was_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(1, 0.0001, 1)
    assert "that was tried is enough" in text
    monkeypatch.setattr(need, "MAX_WORK", 0)
    assert "that was tried is enough" in told(1, 0.06, 6)


def test_the_clusters_own_number_is_tried_only_where_its_nodes_differ() -> None:
    assert list(counts_to_try(cluster(2)))[:7] == [3, 4, 5, 6, 7, 8, 16]
    assert next(counts_to_try(cluster(speeds=(1.0, 0.5)))) == 2
    assert list(counts_to_try(cluster(2), 3.2))[:4] == [7, 8, 16, 32], "fewer nodes cannot have the memory"
    assert list(counts_to_try(cluster(2), 11.0))[:3] == [22, 44, 88]
    assert next(counts_to_try(cluster(2), math.inf)) == 3


@pytest.mark.parametrize("enough", [1, 3, 7, 9, 12, 13, 16, 700])
def test_numbers_between_those_that_are_tried_are_searched(monkeypatch: pytest.MonkeyPatch, enough: int) -> None:
    tried = []

    def fits(graph: Any, nodes: Cluster, request: Any, work: Work, chooser: Any) -> bool:
        tried.append(len(nodes.nodes))
        return len(nodes.nodes) >= enough

    monkeypatch.setattr(need, "fits", fits)
    monkeypatch.setattr(need, "new_chooser", lambda graph, nodes, request: nodes)
    engine: Any = SimpleNamespace(cluster=cluster(1), graph=None, request=None)
    assert need.some_nodes(engine, 1.5, Work()) == max(2, enough)
    assert len(tried) < 25
    assert need.some_nodes(engine, 1.5, Work(deadline=time.monotonic() - 1)) is None


@pytest.mark.parametrize(("most", "enough"), [(50_000, False), (10**9, True)])
def test_the_answer_is_the_same_however_fast_the_clock_runs(
    monkeypatch: pytest.MonkeyPatch, most: int, enough: bool
) -> None:
    """The number that fits lies behind ones that do not, so that a limit in between cuts the trying short."""
    monkeypatch.setattr(need, "MAX_WORK", most)
    answers = []
    for seconds in (0.0, 1000.0):
        clock = count(0.0, seconds)
        monkeypatch.setattr(time, "monotonic", lambda clock=clock: next(clock))
        answers.append(told(2, 0.06, 10))
    assert answers[0] == answers[1]
    assert ("that was tried is enough" in answers[0]) is not enough


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shardings_are_the_same_on_any_number_of_nodes(tp: int) -> None:
    few, many = (new_chooser(GRAPH, cluster(number, 4), PlanRequest(global_batch=4)) for number in (2, 7))
    for sequence_parallel in (False, True):
        choice = few.choose(tp, sequence_parallel=sequence_parallel)
        assert choice is not None
        assert choice == many.choose(tp, sequence_parallel=sequence_parallel)
