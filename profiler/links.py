"""Message times among the processes of a group."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

SIZES_BYTES = (1024, 4096, 256 * 1024, 1024 * 1024, 4 * 1024 * 1024, 16 * 1024 * 1024)
MIN_ROUNDS = 3
MAX_ROUNDS = 30


def all_reduce_times_s(device: torch.device, budget_s: float) -> dict[int, float]:
    """Median seconds of an all-reduce by size of the tensor, of the slowest process."""
    return _times(lambda buffer: dist.all_reduce(buffer), device, budget_s)


def send_recv_times_s(device: torch.device, budget_s: float) -> dict[int, float]:
    """Median seconds of a message by size, half of there and back, between ranks 2i and 2i+1, all pairs at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    other = rank ^ 1

    def there_and_back(buffer: torch.Tensor) -> None:
        if other >= size:
            return
        for sender in (0, 1):
            if rank % 2 == sender:
                dist.send(buffer, other)
            else:
                dist.recv(buffer, other)

    return {size: time_s / 2 for size, time_s in _times(there_and_back, device, budget_s).items()}


def _times(operation: Callable[[torch.Tensor], object], device: torch.device, budget_s: float) -> dict[int, float]:
    buffers = {size: torch.zeros(size // 4, device=device) for size in SIZES_BYTES}
    for buffer in buffers.values():
        operation(buffer)
    times: dict[int, list[float]] = {size: [] for size in SIZES_BYTES}
    start = time.perf_counter()
    for count in range(MAX_ROUNDS):
        over = float(time.perf_counter() - start > budget_s and count >= MIN_ROUNDS)
        if _largest(over, device) > 0:  # every process stops after the same round
            break
        for size, buffer in buffers.items():
            _largest(0.0, device)  # all begin together
            begin = time.perf_counter()
            operation(buffer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[size].append(time.perf_counter() - begin)
    return {size: _largest(median(seen), device) for size, seen in times.items()}


def _largest(value: float, device: torch.device) -> float:
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())
