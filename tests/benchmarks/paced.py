"""Paced devices: real math on this machine's cores, stretched to what a slower device of a known speed would take.

A device has a queue as a GPU has: the host runs ahead of it by at most `lead_s`, and whatever the other hosts must see
(a message, a collective) waits until the device is that far. Ops take the time of a roofline over their multiplications
and the bytes that they read and write. That must come to much more than the real math takes, or pacing means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FLOPS_PER_S = 2e9  # of a device of speed 1
BYTES_PER_S = 1e9
LEAD_S = 0.02
HOST_GAP_S = 0.002  # so long may the host take to issue what comes next, without the device losing time
SHORTEST_SLEEP_S = 2e-4

COMMUNICATION = ("c10d", "_c10d_functional", "c10d_functional")
FREE = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::detach", "aten::lift_fresh",
        "aten::_local_scalar_dense", "aten::new_empty", "aten::new_empty_strided")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"

Cost = Callable[[tuple[Any, ...], dict[str, Any], Any], float]


class Paced(TorchDispatchMode):
    """Inside, this thread's ops take the time that a device of that speed takes."""

    def __init__(self, speed: float, *, lead_s: float = LEAD_S) -> None:
        super().__init__()
        self.flops_per_s, self.bytes_per_s = FLOPS_PER_S * speed, BYTES_PER_S * speed
        self.lead_s = lead_s
        self.busy_until = 0.0
        self._costs: dict[Any, Cost | None] = {}

    def flush(self) -> None:
        """Wait until the device has done all that was issued."""
        left = self.busy_until - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # its local ops come here by themselves
        kwargs = kwargs or {}
        if func.namespace in COMMUNICATION:
            if "recv" not in func._schema.name:  # what leaves must be there; what comes may be announced before
                self.flush()
            return func(*args, **kwargs)
        if func not in self._costs:
            self._costs[func] = self._cost(func)
        cost = self._costs[func]
        if cost is None:
            return func(*args, **kwargs)
        now = time.perf_counter()
        if now > self.busy_until + HOST_GAP_S:
            self.busy_until = now
        out = func(*args, **kwargs)
        self.busy_until += cost(args, kwargs, out)
        ahead = self.busy_until - time.perf_counter() - self.lead_s
        if ahead > SHORTEST_SLEEP_S:
            time.sleep(ahead)
        return out

    def _cost(self, func: Any) -> Cost | None:
        """What tells an op's seconds from its arguments and results; None for one that takes none."""
        name = func._schema.name
        if name in FREE or func.is_view:
            return None
        if name.startswith(ATTENTION):
            formula: Any = _attention_backward_flops if name.endswith("backward") else _attention_flops
        else:
            formula = flop_registry.get(func._overloadpacket)

        def cost(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
            moving = sum(map(_bytes, (*args, *kwargs.values(), out))) / self.bytes_per_s
            if formula is None:
                return moving
            return max(moving, formula(*args, **kwargs, out_val=out) / self.flops_per_s)

        return cost


def _bytes(value: Any) -> int:
    """Of all tensors in an argument or a result."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0


def _attention_flops(query: Tensor, key: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> float:
    """Two products of queries and keys; a causal mask is not made use of."""
    return 4.0 * query.numel() * key.shape[-2]


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, *args: Any, out_val: Any, **kwargs: Any
) -> float:
    return 2.5 * _attention_flops(query, key, out_val=out_val)
