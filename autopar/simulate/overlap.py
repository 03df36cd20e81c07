"""How much of data-parallel communication hides behind compute, unit by unit, as FSDP2 prefetches.

Compute runs on one stream, communication on one queue: gathers and reductions of a device share its links. All times
are of one micro-batch through one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Communication kernels take multiprocessors, memory bandwidth and power from the compute that they run beside: compute
# took 18.9% longer with communication beside it (on average, at most 40%) when GPTs and Llamas were trained on 4 A100,
# H100, MI210 or MI250 (Lee et al. 2025, arXiv 2507.03114). Taken of the hidden time, which is at most the compute.
OVERLAP_SLOWDOWN = 0.19


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Seconds that communication adds: while the compute runs, and after its end."""

    during_s: float
    after_s: float


def forward_exposed(compute_s: Sequence[float], gather_s: Sequence[float], *, hides: bool = True) -> Exposed:
    """Gathering each unit in the forward: the first is waited for, the next runs behind the compute of the one before.

    A gather starts when the one before has ended and the unit before has begun to compute. `hides` is False where
    communication does not run beside compute: processes on CPUs do both on the same cores, one after the other.
    """
    if not hides:
        return Exposed(during_s=sum(gather_s), after_s=0.0)
    clock = queue = 0.0
    for compute, gather in zip(compute_s, gather_s, strict=True):
        queue = max(queue, 0.0) + gather
        begin = max(clock, queue)
        clock = begin + compute
        queue = max(queue, begin)
    return _exposed(clock, compute_s, gather_s, 0.0)


def backward_exposed(
    compute_s: Sequence[float], gather_s: Sequence[float], reduce_s: Sequence[float], *, hides: bool = True
) -> Exposed:
    """Gathering each unit before its backward and reducing its gradients after it; units in the order of the backward.

    `after_s`: what is left of the reductions when the compute has ended. `hides` as for the forward.
    """
    if not hides:
        return Exposed(during_s=sum(gather_s) + sum(reduce_s), after_s=0.0)
    clock = queue = 0.0
    ready = gather_s[0] if gather_s else 0.0
    queue = ready
    for i, compute in enumerate(compute_s):
        begin = max(clock, ready)
        if i + 1 < len(compute_s) and gather_s[i + 1] > 0:
            queue = ready = max(queue, begin) + gather_s[i + 1]
        clock = begin + compute
        if reduce_s[i] > 0:
            queue = max(queue, clock) + reduce_s[i]
    return _exposed(clock, compute_s, (*gather_s, *reduce_s), max(0.0, queue - clock))


def _exposed(end: float, compute_s: Sequence[float], comm_s: Sequence[float], after: float) -> Exposed:
    during = end - sum(compute_s)
    hidden = max(0.0, sum(comm_s) - during - after)
    return Exposed(during_s=during + OVERLAP_SLOWDOWN * hidden, after_s=after)
