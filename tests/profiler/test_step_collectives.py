"""Collectives as a step has them: what they give on two processes, and what a chain of work and collectives tells."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from autopar.profiler import links
from autopar.profiler.links import COLLECTIVES, WorkBefore
from autopar.profiler.step_collectives import OUTER, step_collective
from autopar.runtime.local import LocalPool

CPU = torch.device("cpu")


def given(numel: int) -> dict[str, list[list[float]]]:
    """What each collective gives on this rank: rank 0 has zeros, rank 1 ones."""
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for name in COLLECTIVES:
        call = step_collective(name, group, numel)
        assert torch.equal(call(), call()), "a second call finds what the first found"
        found[name] = call().reshape(-1, call().shape[-1]).tolist()
    return found


@pytest.mark.processes
def test_a_step_gathers_and_scatters_along_an_inner_dim() -> None:
    width = 3
    with LocalPool(2) as pool:
        for found in pool.run(given, 2 * OUTER * width):
            assert found["all_reduce"] == [[1.0] * 2 * width] * OUTER
            assert found["all_gather"] == [[0.0] * width + [1.0] * width] * OUTER
            assert found["reduce_scatter"] == [[1.0] * width] * OUTER
            assert found["all_to_all"] == [[0.0] * width] * OUTER + [[1.0] * width] * OUTER


class Clock:
    """Time that passes only where someone says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def add(self, seconds: float) -> None:
        self.now += seconds


def test_a_collective_takes_what_it_adds_to_a_chain_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, met = Clock(), []
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(links, "largest", lambda value, device: met.append(clock.now) or value)
    monkeypatch.setattr(torch, "mm", lambda left, right: clock.add(3.0))
    work = WorkBefore(CPU)
    assert work.slowest_s(CPU, 5) == 3.0
    met.clear()
    # Each collective waits 2 s; what the first finds right after all have met says nothing of the others.
    waits = iter([0.0, 2.0, 2.0, 2.0])
    start, middle, end = clock.now, clock.now + 12.0, clock.now + 30.0
    assert work.added_s(lambda: clock.add(next(waits)), CPU, 4) == pytest.approx(1.5)
    assert met == [start, middle, middle, end], "all meet before the work alone and before the chain, not in them"


def test_waiting_for_a_slower_process_is_no_part_of_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(links, "largest", lambda value, device: max(value, 5.0))  # the other needs 5 s for its work
    monkeypatch.setattr(torch, "mm", lambda left, right: clock.add(3.0))
    added_s = WorkBefore(CPU).added_s(lambda: clock.add(2.0 + 0.5), CPU, 4)  # waits 2 s, then the sum takes 0.5 s
    assert added_s == pytest.approx(0.5)


def test_a_message_between_stages_has_no_work_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(links, "largest", lambda value, device: value)
    monkeypatch.setattr(torch, "mm", lambda left, right: clock.add(3.0))
    work = WorkBefore(CPU, nothing=True)
    assert (work.slowest_s(CPU, 2), work.added_s(lambda: clock.add(2.0), CPU, 1)) == (0.0, 2.0)
