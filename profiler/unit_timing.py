"""Times what data parallelism adds to a layer: gathering its parameters and reducing its gradients, with all copies.

The runtime leaves both to torch's FSDP2 where states are in shards, so that this measures FSDP2: units of a few
parameters in a forward and a backward, whose own work is one product, which is timed in turn with them and taken off.
Whole copies gather nothing, and the runtime sums their gradients itself: joined to one tensor, while the backward goes
on.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from autopar.cluster.measured import OpSample, OpTensor
from autopar.cost_models.measured import SMALLEST_UNIT
from autopar.profiler.clock import Clock, Work
from autopar.profiler.links import SHORTEST_S, WorkBefore, largest
from autopar.profiler.op_timing import NOTHING, Timed

NUM_UNITS = 4
PARAMS_OF_UNIT = 8
NUM_PASSES = 4  # of each sweep
_AXES = ("dp_replicate", "dp_shard")
UNIT_ELEMENTS = tuple(SMALLEST_UNIT * 4**power for power in range(6))  # to 4 Mi


class _Use(torch.autograd.Function):
    """Passes x on; in the backward every parameter gets a gradient that is there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], work: Callable[[], None], x: Tensor, *params: Tensor) -> Tensor:
        ctx.gradients, ctx.work = gradients, work
        work()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.work()
        return (None, None, grads[0], *ctx.gradients)


class _Unit(nn.Module):
    def __init__(self, numel: int, device: torch.device, work: Callable[[], None]) -> None:
        super().__init__()
        self.work = work
        size = max(1, numel // PARAMS_OF_UNIT)
        self.params = nn.ParameterList([nn.Parameter(torch.ones(size, device=device)) for _ in range(PARAMS_OF_UNIT)])
        self.gradients = [torch.ones(size, device=device) for _ in range(PARAMS_OF_UNIT)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Use.apply(self.gradients, self.work, x, *self.params)  # type: ignore[no-untyped-call]
        return result


class _Root(nn.Module):
    def __init__(self, numel: int, device: torch.device, work: Callable[[], None]) -> None:
        super().__init__()
        self.units = nn.ModuleList([_Unit(numel, device, work) for _ in range(NUM_UNITS)])

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x


def time_unit(numel: int, num_ranks: int, *, sharded: bool, device: torch.device, clock: Clock) -> OpSample:
    """The sample of one unit of `numel` float32 parameters on all `num_ranks` processes of the job, which all call.

    Forward: its parameters are gathered. Backward: its gradients are reduced, and its shards freed. `sharded`: its
    states are in shards; else every rank has a copy.
    """
    work = WorkBefore(device)
    timed = _time_sharded if sharded else _time_copies
    gathered, reduced = timed(numel, num_ranks, device, clock, work)
    return OpSample(
        target=f"autopar.unit_{'sharded' if sharded else 'replicated'}", settings=str(num_ranks), dtype="float32",
        operands=(OpTensor(shape=(numel,), dtype="float32"),), outputs=(),
        forward_s=max(SHORTEST_S, gathered.device_s) if sharded else 0.0,
        backward_s=max(SHORTEST_S, reduced.device_s),
        forward_spread=gathered.spread, backward_spread=reduced.spread,
        host_forward_s=gathered.host_s, host_backward_s=reduced.host_s,
    )


def _time_copies(
    numel: int, num_ranks: int, device: torch.device, clock: Clock, work: WorkBefore
) -> tuple[Timed, Timed]:
    """Nothing, and summing the gradients of units one after another, each behind its work; all are waited for."""
    size = max(1, numel // PARAMS_OF_UNIT)
    gradients = [torch.ones(size, device=device) for _ in range(PARAMS_OF_UNIT)]

    def backward() -> list[Tensor]:
        sums, started = [], []
        for _ in range(NUM_UNITS):
            work.run()
            sums.append(torch.cat(gradients))
            started.append(dist.all_reduce(sums[-1], async_op=True))
        for each in started:
            assert each is not None
            each.wait()
        return sums

    return NOTHING, _added(lambda: backward, device, clock, work)


def _added(prepare: Callable[[], Work], device: torch.device, clock: Clock, work: WorkBefore) -> Timed:
    """What a unit adds to its work: of the slowest process, the median over passes, after one that does not count.

    Every pass communicates: all processes make the same number.
    """
    clock.measure(prepare)
    added: list[float] = []
    host: list[float] = []
    for _ in range(NUM_PASSES):
        alone_s = work.slowest_s(device, NUM_UNITS)
        on_device, on_host = clock.measure(prepare)
        added.append(largest(on_device / NUM_UNITS, device) - alone_s)
        host.append(on_host / NUM_UNITS)
    low, middle, high = quantiles(added, n=4)
    return Timed(device_s=middle, host_s=min(host), spread=(high - low) / 2 / middle if middle > 0 else 0.0)


def _time_sharded(
    numel: int, num_ranks: int, device: torch.device, clock: Clock, work: WorkBefore
) -> tuple[Timed, Timed]:
    """Gathering units in a forward, and reducing their gradients in a backward, by FSDP2."""
    mesh = DeviceMesh(device.type, torch.arange(num_ranks).view(1, num_ranks), mesh_dim_names=_AXES)
    root = _Root(numel, device, work.run)
    for unit in root.units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if device.type == "cpu":  # as the runtime does: gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    x = torch.zeros(8, device=device, requires_grad=True)
    state: dict[str, Tensor] = {}

    def forward() -> None:
        state["y"] = root(x)

    def prepare_forward() -> Callable[[], object]:
        if "y" in state:
            state.pop("y").sum().backward()  # type: ignore[no-untyped-call]
        root.zero_grad(set_to_none=True)
        return forward

    def prepare_backward() -> Callable[[], object]:
        root.zero_grad(set_to_none=True)
        loss = state.pop("y", None)
        loss = (root(x) if loss is None else loss).sum()
        return loss.backward

    gathered = _added(prepare_forward, device, clock, work)
    return gathered, _added(prepare_backward, device, clock, work)
