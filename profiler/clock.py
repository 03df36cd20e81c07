"""What a piece of work takes: on the device, and of the host that issues it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], object]


class Clock(Protocol):
    """Times work that `prepare` makes; preparing is not timed."""

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        """Seconds on the device and seconds of the host."""


class CpuClock:
    """Wall time: a CPU computes where it issues."""

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

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        work = prepare()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        result = work()
        host_s = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        del result
        return self._device_s(prepare(), host_s), host_s

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
