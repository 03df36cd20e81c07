"""What a piece of work takes: on the device, and of the host that issues it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], object]


class Clock(Protocol):
    """Times work that `prepare` makes; preparing is not timed.

    `engine_s`: seconds of the host that a call of autograd's engine takes whatever it computes; `ends_s`: what a graph
    of its own costs the engine beside its nodes, with a root and a leaf.
    """

    engine_s: float
    ends_s: float

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        """Seconds on the device and seconds of the host."""


class CpuClock:
    """Wall time: a CPU computes where it issues."""

    engine_s = ends_s = 0.0  # the host's time is not told apart

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        work = prepare()
        start = time.perf_counter()
        result = work()
        taken = time.perf_counter() - start
        del result  # what the work leaves is freed outside the timed part
        return taken, 0.0


class CudaClock:
    """CUDA events around work that waits in the queue, so that the host's pace does not show in the device's time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._plug = torch.randn(4096, 4096, device=device)
        self._plug_s = 0.0
        self._plug_s = self._device_s(lambda: self._block(8), 0.0) / 8
        self.engine_s, self.ends_s = self._engine_s()

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        work = prepare()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        result = work()
        host_s = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        del result
        return self._device_s(prepare(), host_s), host_s

    def _engine_s(self, count: int = 24) -> tuple[float, float]:
        """Seconds of a call of the engine, and of the ends of each graph: of one view, `count` apart, `count` in a row.

        A view's gradient launches nothing. The least of several times: what disturbs the host only adds.
        """
        leaves = [torch.ones(1, device=self.device, requires_grad=True) for _ in range(count)]
        given = torch.ones(1, device=self.device)

        def views(leaf: Tensor, length: int) -> Tensor:
            for _ in range(length):
                leaf = leaf.view(1)
            return leaf

        def least_s(starts: Sequence[Tensor], length: int) -> float:
            taken = []
            for _ in range(20):
                outs = [views(leaf, length) for leaf in starts]
                start = time.perf_counter()
                torch.autograd.grad(outs, starts, [given] * len(outs))
                taken.append(time.perf_counter() - start)
            return min(taken)

        one, apart, in_a_row = least_s(leaves[:1], 1), least_s(leaves, 1), least_s(leaves[:1], count)
        ends_s = max(0.0, (apart - in_a_row) / (count - 1))
        return max(0.0, one - ends_s), ends_s

    def _block(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._plug, self._plug)

    def _device_s(self, work: Work, host_s: float) -> float:
        """Seconds of the work behind products that keep the device busy for twice what issuing it takes."""
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        if self._plug_s:
            self._block(1 + int(2 * host_s / self._plug_s))
        first.record()
        result = work()
        last.record()
        last.synchronize()
        del result
        return float(first.elapsed_time(last)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
