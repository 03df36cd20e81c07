"""Times ops one by one as they run in a training step: forward with autograd recording, backward by autograd.

Several instances of an op run one after another, as layers do: each has parameters, saved tensors and results of its
own, so that weights come from memory and results go to fresh memory; the forward's activations are shared, for in a
step they have just been computed. The backward of all instances is one call of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from autopar.cluster.measured import OpSample, OpTensor
from autopar.cost_models.measured import SMALLEST_PASS
from autopar.graph.interpret import bind_op, run_op
from autopar.profiler.clock import Clock, Work
from autopar.profiler.op_cases import OpCase, Operand, size_bytes

INSTANCE_BYTES = 48 * 2**20  # of all instances together: beyond the caches
MAX_INSTANCES = 24
MIN_INSTANCES = 3
MIN_PASSES = 3
MAX_PASSES = 9

Together = Callable[[float], bool]  # whether all processes go on; told the seconds that this one has spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The device's median over the passes and its spread, and the host's least: what disturbs the host only adds."""

    device_s: float
    host_s: float
    spread: float


def time_passes(clock: Clock, prepare: Callable[[], Work], count: int, go_on: Together) -> Timed:
    """Seconds of one of `count` instances: the median over passes, the first of them a warm-up that does not count."""
    device: list[float] = []
    host: list[float] = []
    clock.measure(prepare)
    spent = 0.0
    while len(device) < MIN_PASSES or (len(device) < MAX_PASSES and go_on(spent)):
        on_device, on_host = clock.measure(prepare)
        spent += on_device
        device.append(on_device / count)
        host.append(on_host / count)
    middle = median(device)
    low, _, high = quantiles(device, n=4)
    return Timed(device_s=middle, host_s=min(host), spread=(high - low) / 2 / middle if middle > 0 else 0.0)


def time_case(
    case: OpCase, device: torch.device, clock: Clock, go_on: Together, generator: torch.Generator | None = None
) -> OpSample:
    """The sample of one case. Whatever torch raises for the op is passed on."""
    count = int(max(MIN_INSTANCES, min(MAX_INSTANCES, INSTANCE_BYTES / max(1.0, size_bytes(case)))))
    make = _Maker(case, device, generator)
    instances = [make.tensors() for _ in range(count)]
    shared = instances[0]
    forward_inputs = [
        [tensor if item.is_param else common for tensor, common, item in zip(own, shared, case.operands, strict=True)]
        for own in instances
    ]

    calls = [make.bound(tensors) for tensors in forward_inputs]  # nothing is looked up while the host is timed

    def forward() -> list[Any]:
        return [call() for call in calls]

    first = time_passes(clock, lambda: forward, count, go_on)
    hands_over = any(item.is_param and item.tensor.requires_grad for item in case.operands)
    backward = _time_backward(make, instances, clock, count, go_on, hands_over=hands_over)
    return OpSample(
        target=case.target, settings=case.settings, dtype=case.dtype, is_copy=case.is_copy,
        operands=tuple(item.tensor for item in case.operands), outputs=case.outputs,
        forward_s=first.device_s, forward_spread=first.spread, host_forward_s=first.host_s,
        backward_s=backward.device_s, backward_spread=backward.spread, host_backward_s=backward.host_s,
    )


NOTHING = Timed(device_s=0.0, host_s=0.0, spread=0.0)


def _time_backward(
    make: _Maker, instances: Sequence[Sequence[Tensor]], clock: Clock, count: int, go_on: Together, *,
    hands_over: bool,
) -> Timed:
    """`hands_over`: the op has parameters, whose gradients leave the graph in a step, too."""
    leaves = [tensor for tensors in instances for tensor in tensors if tensor.requires_grad]
    sample = _differentiable(make.call(instances[0]))
    if not leaves or not sample:
        return NOTHING
    # Not ones: products of equal numbers draw less power, so that clocks stay up and large ones seem too fast.
    gradients = [torch.randn_like(out) for out in sample]
    del sample

    def prepare() -> Work:
        outputs = [out for tensors in instances for out in _differentiable(make.call(tensors))]
        given = gradients * len(instances)
        return lambda: torch.autograd.grad(outputs, leaves, given, allow_unused=True)

    timed = time_passes(clock, prepare, count, go_on)
    # A step calls the engine once, for one graph.
    alone_s = clock.engine_s / count + (0.0 if hands_over else clock.ends_s)
    return replace(timed, host_s=max(0.0, timed.host_s - alone_s))


def _differentiable(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [out for out in results if isinstance(out, Tensor) and out.requires_grad]


class _Maker:
    """Makes a case's tensors and calls its op on them."""

    def __init__(self, case: OpCase, device: torch.device, generator: torch.Generator | None) -> None:
        self.case, self.device, self.generator = case, device, generator
        self.names = case.op.operands

    def tensors(self) -> list[Tensor]:
        made: dict[str, Tensor] = {}  # an operand that occurs twice is one tensor
        for name, item in zip(self.names, self.case.operands, strict=True):
            if name not in made:
                made[name] = _make(item, self.device, self.generator)
        return [made[name] for name in self.names]

    def bound(self, tensors: Sequence[Tensor]) -> Work:
        return bind_op(self.case.op, dict(zip(self.names, tensors, strict=True)), self.device)

    def call(self, tensors: Sequence[Tensor]) -> Any:
        values = dict(zip(self.names, tensors, strict=True))
        run_op(self.case.op, values, self.device)
        return [values[name] for name in self.case.op.outputs if name]


def _make(item: Operand, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random tensor that lies in memory as the operand does."""
    shape = [1 if dim in item.repeated else size for dim, size in enumerate(item.tensor.shape)]
    stored = [shape[dim] for dim in item.order]
    dtype = getattr(torch, item.tensor.dtype)
    if dtype.is_floating_point:
        value = torch.randn(stored, generator=generator, device=device, dtype=torch.float32).to(dtype)
    elif dtype is torch.bool:
        value = torch.ones(stored, device=device, dtype=dtype)
    elif dtype.is_complex:
        value = torch.randn(stored, generator=generator, device=device, dtype=dtype)
    else:
        value = torch.randint(item.below, stored, generator=generator, device=device).to(dtype)
    back = sorted(range(len(stored)), key=lambda place: item.order[place])
    value = value.permute(back).expand(item.tensor.shape)
    return value.detach().requires_grad_(item.tensor.requires_grad)


# -- what the runtime does besides ops, by the number of elements

ELEMENTS = tuple(SMALLEST_PASS * 4**power for power in range(9))  # to 16 Mi


def time_runtime(
    name: str, dtype: str, numel: int, device: torch.device, clock: Clock, go_on: Together, mesh: Any = None
) -> OpSample:
    """The sample of one piece of the runtime's own work on a tensor of `numel` elements.

    "accumulate" adds a gradient to another; "copy" copies into memory that is there; "adamw", "adam" and "sgd" step
    one parameter, which lies in shards over `mesh` where one is given, on CUDA as the trainer steps: fused.
    """
    size = numel * getattr(torch, dtype).itemsize
    count = int(max(2, min(MAX_INSTANCES, INSTANCE_BYTES / (4 * size))))
    values = [torch.randn(numel, device=device).to(getattr(torch, dtype)) for _ in range(count)]
    if name in ("accumulate", "copy"):
        others = [torch.ones_like(value) for value in values]
        pairs = list(zip(values, others, strict=True))

        def passes() -> None:
            for one, other in pairs:
                one.add_(other) if name == "accumulate" else one.copy_(other)

        work: Callable[[], object] = passes
    else:
        work = _optimizer_work(name, values, mesh)
    timed = time_passes(clock, lambda: work, count, go_on)
    sharded = "_sharded" if mesh is not None else ""
    return OpSample(
        target=f"autopar.{name}{sharded}", settings="", dtype=dtype,
        operands=(OpTensor(shape=(numel,), dtype=dtype),), outputs=(),
        forward_s=timed.device_s, forward_spread=timed.spread, host_forward_s=timed.host_s, backward_s=0.0,
    )


def _optimizer_work(name: str, values: Sequence[Tensor], mesh: Any) -> Callable[[], object]:
    from torch.distributed.tensor import DTensor, Shard

    optimizers: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}

    def placed(value: Tensor) -> Tensor:
        return value if mesh is None else DTensor.from_local(value, mesh, [Shard(0)], run_check=False)

    params = [torch.nn.Parameter(placed(value)) for value in values]
    for param, value in zip(params, values, strict=True):
        param.grad = placed(torch.full_like(value, 1e-3))
    fused = {"fused": True} if params[0].is_cuda and name != "sgd" else {}
    optimizer = optimizers[name](params, lr=1e-4, **fused)
    return optimizer.step  # type: ignore[no-any-return]
