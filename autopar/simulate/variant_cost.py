"""What a variant of a layer keeps on the device and what it adds to a micro-batch: recomputation and offload."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cluster.cluster import DeviceType
from autopar.cost_models.compute import memory_bandwidth
from autopar.cost_models.memory import host_copy_s
from autopar.plan.plan import Recompute, Variant
from autopar.simulate.block_cost import BlockCost


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantCost:
    """What a variant adds to one block and one micro-batch, and the bytes that it takes."""

    forward_s: float  # of compute and copies
    backward_s: float
    backward_tp_s: float  # communication of the tensor axis that runs again
    held_bytes: float  # on the device, from forward to backward
    extra_bytes: float  # beside what is held while the block's backward runs
    host_bytes: float  # in host memory, from forward to backward


def variant_cost(cost: BlockCost, variant: Variant, device: DeviceType) -> VariantCost:
    """The cost of a block under a variant, from the block's own saved tensors.

    Offloaded tensors leave while the block computes and come back while the block behind it does its backward; the
    block waits for what takes longer, so that at most two blocks' tensors are on the device. A hidden copy still takes
    its share of the device's memory bandwidth. InputError where a device that offloads has no known host link.
    """
    match variant.recompute:
        case Recompute.FULL:
            kept, again, again_tp = cost.boundary_bytes, cost.recompute_s, cost.recompute_tp_s
        case Recompute.SELECTIVE:
            kept, again = cost.selective_saved_bytes, cost.selective_recompute_s
            again_tp = cost.selective_recompute_tp_s
        case Recompute.NONE:
            kept, again, again_tp = cost.saved_bytes, 0.0, 0.0
    brought_back = cost.saved_bytes - kept if variant.recompute is not Recompute.FULL else cost.saved_bytes
    extra = brought_back + cost.transient_bytes
    if not variant.offload:
        return VariantCost(
            forward_s=0.0, backward_s=again, backward_tp_s=again_tp, held_bytes=kept, extra_bytes=extra, host_bytes=0.0
        )
    copy_s = host_copy_s(kept, device)
    through_memory_s = min(copy_s, kept / memory_bandwidth(device))
    forward_s = cost.forward_compute_s + cost.forward_tp_comm_s
    backward_s = cost.backward_compute_s + cost.backward_tp_comm_s + again + again_tp
    return VariantCost(
        forward_s=max(through_memory_s, copy_s - forward_s),
        backward_s=again + max(through_memory_s, copy_s - backward_s), backward_tp_s=again_tp,
        held_bytes=0.0, extra_bytes=extra + 2 * kept, host_bytes=kept,
    )
