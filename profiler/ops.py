"""Rates of one device: matrix products, memory, and the floor of one small operation."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

NUM_WINDOWS = 3
COPY_BYTES = 32 * 2**20  # beyond the caches that one core has for itself
TINY_NUMEL = 16


def calls_per_s(call: Callable[[], object], device: torch.device, window_s: float) -> float:
    """Calls a second: the median over three windows of `window_s`, after a warm-up.

    A window counts whole calls until its time is over, so that a process that loses its core for a part of the window
    shows the rate that it really gets. CUDA windows are timed by events.
    """
    call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    once_s = max(time.perf_counter() - start, 1e-7)
    batch = max(1, int(window_s / 20 / once_s))
    return median(_window(call, device, window_s, batch) for _ in range(NUM_WINDOWS))


def matmul_flops_per_s(size: int, dtype: torch.dtype, device: torch.device, window_s: float) -> float:
    """FLOP/s of square products of `size`."""
    a = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    b = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2.0 * size**3 * calls_per_s(lambda: torch.mm(a, b, out=out), device, window_s)


def memory_bytes_per_s(device: torch.device, window_s: float) -> float:
    """Bytes a second of a large copy, those read and those written together."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * COPY_BYTES * calls_per_s(lambda: target.copy_(source), device, window_s)


def launch_s(device: torch.device, window_s: float) -> float:
    """Seconds of one tiny operation that depends on the one before."""
    value = torch.zeros(TINY_NUMEL, device=device)
    return 1 / calls_per_s(lambda: value.add_(1.0), device, window_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _window(call: Callable[[], object], device: torch.device, window_s: float, batch: int) -> float:
    if device.type == "cuda":
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(20 * batch):
            call()
        last.record()
        last.synchronize()
        return 20 * batch / (float(first.elapsed_time(last)) / 1e3)
    count, start = 0, time.perf_counter()
    while True:
        for _ in range(batch):
            call()
        count += batch
        elapsed = time.perf_counter() - start
        if elapsed >= window_s:
            return count / elapsed
