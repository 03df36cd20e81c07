"""How fast training goes, as lines of the log: step time, tokens per second, MFU, and the fullest rank's memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan

log = logging.getLogger("autopar.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Means over the steps since the last ones. `mfu` is None where the devices' peak is not known.

    `peak_memory_bytes` is the largest of all ranks so far: of CUDA's allocator, of the whole process on the CPU.
    """

    step: int
    loss: float
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    peak_memory_bytes: int
    unit: str = "tokens"

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        return (
            f"step {self.step}: loss {self.loss:.4f}, {self.step_time_s * 1e3:.1f} ms, "
            f"{self.tokens_per_s:.4g} {self.unit}/s{mfu}, peak memory {self.peak_memory_bytes / 2**30:.3f} GiB"
        )


def model_flops(graph: ModelGraph, plan: Plan) -> float:
    """FLOPs of a training step as MFU counts them: three times the captured forward's, without recomputation."""
    forward = sum(op.flops for block in graph.blocks for op in graph.block_class[block.cls].ops)
    return 3 * forward / graph.rows * plan.global_batch


class StepLog:
    """Measures every `every` steps; rank 0 logs. All ranks must call it, with the same `every`."""

    def __init__(
        self, graph: ModelGraph, plan: Plan, device: torch.device, *, every: int, peak_flops: float | None
    ) -> None:
        """`graph` is as it was captured; `peak_flops`: per second, of all devices together."""
        self.every, self.device, self.peak_flops = every, device, peak_flops
        self.flops = model_flops(graph, plan)
        self.tokens = plan.global_batch * (graph.sequence_length or 1)
        self.unit = "tokens" if graph.sequence_length else "rows"
        self.last: StepMetrics | None = None
        self._began, self._since = time.perf_counter(), 0

    def after(self, step: int, loss: Tensor) -> None:
        """Count a step that has ended."""
        if not self.every:
            return
        self._since += 1
        if step % self.every:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self._since, self._began = (now - self._began) / self._since, 0, now
        memory = torch.tensor(_peak_memory(self.device), dtype=torch.int64, device=self.device)
        rank = 0
        if dist.is_initialized():
            dist.all_reduce(memory, op=dist.ReduceOp.MAX)
            rank = dist.get_rank()
        self.last = StepMetrics(
            step=step, loss=loss.item(), step_time_s=seconds, tokens_per_s=self.tokens / seconds,
            mfu=None if self.peak_flops is None else self.flops / seconds / self.peak_flops,
            peak_memory_bytes=int(memory), unit=self.unit,
        )
        if rank == 0:
            log.info("%s", self.last)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
