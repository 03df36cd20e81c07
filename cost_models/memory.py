"""Bytes of parameters, gradients and optimizer state on one device, by ZeRO level, dtype and optimizer.

Parameters rest in `param_dtype`, sharded; the compute copy is a tensor of its own, gathered in the compute dtype;
gradients are accumulated and reduced in float32 (PyTorch's FSDP2 with MixedPrecisionPolicy(param_dtype, reduce_dtype =
float32)). ZeRO 0 gathers nothing away, 1 shards the optimizer, 2 the gradients too, 3 the parameters too.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cluster.cluster import USABLE_MEMORY_FRACTION, DeviceType
from autopar.cluster.names import resolve_name
from autopar.errors import InputError
from autopar.graph.model_graph import DTYPE_BYTES

GRADIENT_BYTES = 4  # reduced and accumulated in float32
STATE_BYTES = 4
# Bytes a parameter of state where parameters rest in float32, and those that one step then reads and writes (parameter,
# gradient, state).
OPTIMIZER_STATE_BYTES = {"adamw": 8, "adam": 8, "sgd_momentum": 4, "sgd": 0}
OPTIMIZER_STEP_BYTES = {"adamw": 28, "adam": 28, "sgd_momentum": 20, "sgd": 12}


def check_optimizer(optimizer: str) -> str:
    """The optimizer's name as the tables spell it; InputError where it is unknown."""
    return resolve_name(optimizer, dict.fromkeys(OPTIMIZER_STATE_BYTES, ()), what="optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticBytes:
    """What a device holds whatever the micro-batches in flight. `buffers`: gathered units, gradients on their way."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def static_bytes(
    numel: float, *, zero: int, num_shards: int, dtype: str, param_dtype: str, optimizer: str, unit_numel: float,
    root_numel: float,
) -> StaticBytes:
    """Bytes on one device that holds `numel` parameters before data sharding over `num_shards` devices.

    `unit_numel`: the largest layer, which is gathered and reduced as one; `root_numel`: the parameters outside layers,
    which stay gathered. ZeRO 3 holds two units at once (the one in use and the next) and the copy that an all-gather
    delivers; ZeRO 2 and 3 hold a unit's gradients in the compute dtype and again in that at rest while they are
    reduced, in every micro-batch; what ZeRO 0 and 1 need once a step for that, `reduction_bytes` says. ZeRO 0 computes
    with the parameters at rest where the two dtypes are one. torch keeps gradients, once added up, and states in the
    dtype of the parameters at rest.
    """
    shards = num_shards if zero > 0 else 1
    compute, rest = DTYPE_BYTES[dtype], DTYPE_BYTES[param_dtype]
    parameters = rest * numel / shards
    buffers = 0.0
    if zero < 3:
        parameters += 0.0 if zero == 0 and dtype == param_dtype else compute * numel
    else:
        parameters += compute * root_numel
        buffers += unit_buffer_bytes(unit_numel, zero=zero, dtype=dtype)
    if zero < 2:
        gradients = rest * numel
    else:
        gradients = rest * numel / shards
        buffers += (compute + rest) * unit_numel + compute * root_numel
    return StaticBytes(
        parameters=parameters, gradients=gradients, buffers=buffers,
        optimizer=OPTIMIZER_STATE_BYTES[check_optimizer(optimizer)] * rest / STATE_BYTES * numel / shards,
    )


def unit_buffer_bytes(unit_numel: float, *, zero: int, dtype: str) -> float:
    """Bytes of gathered units under ZeRO 3: the one in use, the next, and the copy that an all-gather delivers."""
    return 3 * DTYPE_BYTES[dtype] * unit_numel if zero == 3 else 0.0


def reduction_bytes(unit_numel: float, *, zero: int, num_shards: int) -> float:
    """Bytes beside the gradients while ZeRO 0 or 1 reduces a unit in the step's last backward; 0 for other levels.

    FSDP2 copies the unit's gradients to send them, and the shard arrives. A shard axis of one rank sends nothing.
    """
    if zero > 1 or (zero == 1 and num_shards == 1):
        return 0.0
    return GRADIENT_BYTES * unit_numel * (1 + 1 / (num_shards if zero else 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardBytes:
    """Bytes a parameter of a block in the one backward of a step, which starts without gradients.

    `copy`: of what is computed with, until the block's backward is through; `is_kept`: until that of the stage is.
    `making`: gradients on their way when the block's backward ends, beside its copy; `made`: from then on; `reducing`:
    while those that are kept to the end are reduced; `whole`: after that.
    """

    copy: float
    is_kept: bool
    making: float
    made: float
    reducing: float
    whole: float


def backward_bytes(
    *, zero: int, num_shards: int, num_copies: int, dtype: str, param_dtype: str, is_layer: bool
) -> BackwardBytes:
    """What a parameter of a layer, or of a block that is none, takes while the step's only backward runs.

    ZeRO 0: gradients come in the compute dtype where that is not the parameters' own, and are copied when the block's
    are all there; several copies send a layer's together, as one more tensor. Other levels run in FSDP2: it drops a
    layer's gathered parameters, copies its gradients into one tensor of the dtype at rest and gets the shard; what lies
    outside layers is gathered until the end, and so are its gradients.
    """
    compute, gradient = DTYPE_BYTES[dtype], DTYPE_BYTES[param_dtype]
    shard = gradient / num_shards
    if zero == 0:
        copy = 0.0 if dtype == param_dtype else float(compute)
        sent = 2 * gradient - copy if num_copies > 1 else 0
        return BackwardBytes(
            copy=copy, is_kept=False, making=max(copy + gradient, sent), made=gradient, reducing=gradient,
            whole=gradient,
        )
    sent = gradient + shard
    if not is_layer:
        return BackwardBytes(
            copy=compute, is_kept=True, making=compute, made=compute, reducing=compute + sent, whole=shard
        )
    copy = 0.0 if zero == 3 else float(compute)
    return BackwardBytes(
        copy=copy, is_kept=False, making=max(compute, compute + sent - copy), made=shard, reducing=shard, whole=shard
    )


# What pinned copies reach of the host link's rate: 24 to 26 of 31.5 GB/s on PCIe 4, 50 to 55 of 63 on PCIe 5, one
# device copying one way (assumed from reports of CUDA's bandwidthTest, range 0.7-0.87; not measured here). Devices that
# share a PCIe switch's way to the host get less when they copy at once.
HOST_LINK_EFFICIENCY = 0.8


def host_copy_s(size_bytes: float, device: DeviceType) -> float:
    """Seconds of copying so much between a device and pinned host memory, one way.

    InputError where the tables know no link to the host.
    """
    if device.host_bandwidth_bytes_per_s is None:
        raise InputError(
            f"{device.name} has no known link to host memory, so nothing can be offloaded: give host_gb_per_s in a "
            "cluster file, or plan without offload"
        )
    return size_bytes / (HOST_LINK_EFFICIENCY * device.host_bandwidth_bytes_per_s)


def offloaded_step_s(numel: float, *, zero: int, num_shards: int, optimizer: str, device: DeviceType) -> float:
    """Seconds that streaming the optimizer's state from host memory and back adds to a step; nothing overlaps."""
    state = OPTIMIZER_STATE_BYTES[check_optimizer(optimizer)] * numel / (num_shards if zero > 0 else 1)
    return 2 * host_copy_s(state, device) if state else 0.0


def step_temporary_bytes(*, zero: int, num_shards: int, optimizer: str | None = None) -> float:
    """Bytes beside the states in the optimizer's step, for each parameter that is stepped at once.

    A fused step, which the trainer chooses on a GPU where the optimizer has one and its maker did not say otherwise,
    has no temporaries. With the name of an `optimizer` whose state is streamed from host memory: what is fetched.
    """
    state = OPTIMIZER_STATE_BYTES[check_optimizer(optimizer)] if optimizer is not None else 0
    return state / (num_shards if zero > 0 else 1)


# Workspaces of the matrix library, which torch takes from the same allocator: CUDA's cuBLAS gets 32 MiB on Hopper and
# newer, 8 MiB before (torch's documentation of CUBLAS_WORKSPACE_CONFIG; the larger is taken for all).
WORKSPACE_BYTES = 32 * 2**20


def workspace_bytes(device: DeviceType) -> float:
    """Bytes that libraries take from the allocator for as long as the job runs."""
    return 0.0 if device.name.startswith("CPU") else WORKSPACE_BYTES


# What the driver keeps for itself (PyTorch's messages say 39.4 to 39.6 GiB of 40, 79.1 to 79.3 of 80, 15.8 of 16), and
# what a process needs beside the allocator: CUDA's context with the libraries' kernels, about 0.5 GiB, and buffers of
# the communication library, assumed 0.5 GiB (range 0.2-2; they grow with the number of groups).
DRIVER_SHARE = 0.011
PROCESS_BYTES = 2**30


def allocatable_bytes(device: DeviceType) -> float:
    """Bytes that the allocator can get at most. Plans use less, `usable_memory_bytes`: memory fragments.

    What a user said of a device's usable share holds here, too.
    """
    if device.name.startswith("CPU") or device.usable_memory_fraction != USABLE_MEMORY_FRACTION:
        return device.usable_memory_bytes
    return max(device.usable_memory_bytes, device.memory_bytes * (1 - DRIVER_SHARE) - PROCESS_BYTES)


# What the caching allocator keeps beyond the peak of what is allocated, as a share of what comes and goes (activations
# and buffers): blocks of other sizes than are asked for. Assumed; published runs show 0.1 to 0.3 (docs of SimuMax for
# B200: 0.2 to 0.3). Reported as `reserved_memory_gib`; whether a plan fits is asked of the allocated peak.
RESERVE_SHARE = 0.25


def optimizer_step_bytes(numel: float, *, zero: int, num_shards: int, optimizer: str) -> float:
    """Bytes that one optimizer step moves on a device: every state is read and written once."""
    return OPTIMIZER_STEP_BYTES[check_optimizer(optimizer)] * numel / (num_shards if zero > 0 else 1)
