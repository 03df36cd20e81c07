"""Seconds that one op takes on one device, forward and backward: a roofline with documented efficiencies.

time = max(launch, max(flops / (peak * efficiency), bytes / (bandwidth * efficiency)) + gap) for each kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cluster.cluster import DeviceType
from autopar.cost_models.efficiency import efficiency_of
from autopar.cost_models.matmul import aligned_share, shape_efficiency
from autopar.cost_models.op_kinds import CASTS, OpKind, base_name, op_kind
from autopar.graph.model_graph import Op, refs_in

# Attention with a mask given as a tensor runs the memory-efficient kernel, which skips nothing and reaches about 0.6 of
# the flash kernel's rate (assumed, range 0.4-0.8).
MASKED_ATTENTION_SLOWDOWN = 0.6
# Fused attention deals tiles of queries of one head to the multiprocessors; a causal one is half as much work. With so
# many whole tiles for each multiprocessor it reaches half of its rate, forward and backward (which has tiles of keys
# besides). From the kernels at 4 to 128 heads and 4096 keys in SimuMax's system files (A100: 0.9 and 0.3, B200: 1.2 and
# 0.3; taken to be alike on other devices).
ATTENTION_HALF_TILES = (1.0, 0.3)
# Convolutions relative to matrix products (assumed, range 0.4-0.9).
CONVOLUTION_EFFICIENCY = 0.6
# Images lie channel by channel, which tensor cores cannot read in 16 bits: kernels before and behind a convolution turn
# its operands and its result over, the weights among them. Counted in kernels-H200.csv, where small ones take 17 us
# forward, four launches, and 30 to 50 us backward.
CONVOLUTION_TURNS = 3
# Large copies reach 0.90 of HBM's peak on H200 and A100; kernels that also compute a little less (range 0.75-0.92).
MEMORY_EFFICIENCY = 0.85
# Kernels that compute along rows, or add at random places, are bound by the multiprocessors before they are by HBM:
# bytes a second, as counted below, that each multiprocessor moves forward and backward in 16 bits, twice as many in 32.
# From the larger sizes in hardware/kernels-H200.csv (torch 2.11; `python tests/benchmarks/bench_kernels.py`), over 132;
# on other devices in proportion to their clocks.
MULTIPROCESSOR_RATES: dict[str, tuple[float, float]] = {
    "layer_norm": (17.5e9, 12.2e9),
    "rms_norm": (21.5e9, 12.4e9),
    "softmax": (8.7e9, 15.8e9),
    "cross_entropy_loss": (8.7e9, math.inf),  # log_softmax; its gradient is bound by HBM
    "gelu": (23.2e9, 26e9),
    "embedding": (math.inf, 3.2e9),  # rows are sorted, then added
}
RATES_CLOCK_GHZ = 1.98  # an H200's
# The same at rows of 1024: norms have fewer elements to a row's reduction, and softmax keeps short rows in registers.
# Between NARROW and WIDE the rates lie between, in proportion to the logarithm.
NARROW_RATES = {"layer_norm": (12.1e9, 6.5e9), "rms_norm": (21.5e9, 7.6e9), "softmax": (15.5e9, 11.8e9)}
NARROW, WIDE = 1024, 4096
# Time between the end of a kernel and the start of the next that waits in the queue, as a share of `kernel_launch_s`:
# 1.28 us in a replayed graph against 4.2 us from Python on an H100 (assumed for others, range 0.15-0.5).
GAP_SHARE = 0.3

# What the reference host needs to issue an op eagerly: the module's Python, the dispatcher and autograd's record, the
# launch; less for views; autograd's nodes in the backward, which issue one to three kernels each; a collective of a
# process group with its events. A block takes at least the sum of these, however fast the device is; a device's queue
# hides it where kernels are longer. Compiled blocks are not bound by it. A layer of a Hugging Face Llama (30 kernels
# and 40 views) takes about 0.85 ms when it generates on an H100 (25-30 ms for the 32 layers of the 7B model, from
# common reports), which is 21 and 5 us for each; recording for the backward adds 5 and 3 (assumed, range 0.6-1.5).
FORWARD_DISPATCH_S = 26e-6
VIEW_DISPATCH_S = 8e-6
BACKWARD_DISPATCH_S = 40e-6
VIEW_BACKWARD_DISPATCH_S = 10e-6
COLLECTIVE_DISPATCH_S = 60e-6
# Recomputing a block: torch.utils.checkpoint saves and restores the states of the CPU's and the device's random
# numbers, unpacks its inputs and enters autograd again (assumed, range 0.1-0.3 ms).
CHECKPOINT_DISPATCH_S = 150e-6


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """What one device holds of a tensor: the local shape (a row count may be a fraction) and its bytes an element."""

    shape: tuple[float, ...]
    element_bytes: int
    requires_grad: bool

    @property
    def numel(self) -> float:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> float:
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True, slots=True)
class OpTime:
    forward_s: float
    backward_s: float


FREE = OpTime(0.0, 0.0)


def matmul_efficiency(
    device: DeviceType, m: float, n: float, k: float, batch: float = 1.0, dtype: str = "bfloat16"
) -> float:
    """Share of the peak that `batch` products of (m, k) by (k, n) reach: the device's best, less for small dims.

    Rows of the operands and of the result, k and n long, should be multiples of 8 in 16 bits. A CPU core has neither
    tiles nor waves: it keeps its best.
    """
    best = best_matmul_efficiency(device, dtype)
    if _is_cpu(device):
        return best
    aligned = aligned_share(k, n, odd=efficiency_of(device.name).odd_rows) if dtype in ("bfloat16", "float16") else 1.0
    return best * aligned * shape_efficiency(efficiency_of(device.name).multiprocessors, m, n, k, batch)


def best_matmul_efficiency(device: DeviceType, dtype: str) -> float:
    """The share of `device.peak` that the best-shaped products reach on the slowest of the job's devices.

    It is 1 on a usual device where the peak was measured.
    """
    share = 1.0 if _is_measured(device, f"peak_flops.{dtype}") else efficiency_of(device.name).matmul
    return share * device.slowest_share


_bandwidths: dict[int, tuple[DeviceType, float]] = {}


def memory_bandwidth(device: DeviceType) -> float:
    """Bytes a second that kernels reach."""
    found = _bandwidths.get(id(device))
    if found is None:
        if len(_bandwidths) >= 1024:
            _bandwidths.clear()
        measured = _is_measured(device, "memory_bandwidth_bytes_per_s")
        rate = device.memory_bandwidth_bytes_per_s * (1.0 if measured else MEMORY_EFFICIENCY)
        found = _bandwidths[id(device)] = device, rate  # kept with its id, which is not used again
    return found[1]


def kernel_time_s(device: DeviceType, busy_s: float) -> float:
    """Seconds of one kernel that computes or moves data for `busy_s`."""
    return max(device.kernel_launch_s, busy_s + GAP_SHARE * device.kernel_launch_s)


def memory_time_s(device: DeviceType, size_bytes: float) -> float:
    """Seconds of one kernel that moves `size_bytes` (reads and writes together)."""
    return kernel_time_s(device, size_bytes / memory_bandwidth(device))


def _row_time_s(
    op: Op, device: DeviceType, size_bytes: float, element_bytes: int, *, width: float, backward: bool
) -> float:
    """Seconds of a kernel that moves `size_bytes` in rows of this width, bound by HBM or by the multiprocessors."""
    name = base_name(op.target).removeprefix("_")
    rates = MULTIPROCESSOR_RATES.get(name)
    if rates is None or _is_cpu(device):
        return memory_time_s(device, size_bytes)
    found = efficiency_of(device.name)
    rate = rates[backward]
    narrow = NARROW_RATES.get(name, rates)[backward]
    if narrow != rate and width < WIDE:
        nearness = min(1.0, math.log(WIDE / max(1.0, width)) / math.log(WIDE / NARROW))
        rate *= (narrow / rate) ** nearness
    rate *= found.multiprocessors * found.clock_ghz / RATES_CLOCK_GHZ * max(1.0, element_bytes / 2)
    return kernel_time_s(device, size_bytes / min(memory_bandwidth(device), rate))


def op_time_s(
    op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor], device: DeviceType, dtype: str, *,
    flops: float, backward_flops: float, saved_bytes: float = 0.0, extra_bytes: float = 0.0, is_copy: bool = False,
) -> OpTime:
    """Seconds of one op on one device, forward and backward.

    `operands` follow `op.operands`, `outputs` follow `op.outputs` (unused ones left out), both local. `flops` and
    `backward_flops` are this device's. `saved_bytes`: the tensors of the forward that the backward reads;
    `extra_bytes`: what the op keeps besides, written in the forward. `is_copy`: a view op (reshape, contiguous) that
    has to copy here.
    """
    kind = op_kind(op.target)
    grads = [operand for operand in operands if operand.requires_grad]
    in_bytes = sum(operand.size_bytes for operand in operands)
    out_bytes = sum(output.size_bytes for output in outputs)
    grad_in_bytes = sum(operand.size_bytes for operand in grads)
    if (is_free(op, outputs) or is_identity_cast(op, operands, outputs)) and not is_copy:
        return OpTime(0.0, _view_backward_s(op, operands, outputs, device))
    if kind is OpKind.VIEW or (base_name(op.target) == "clone"):
        moved = memory_time_s(device, 2 * out_bytes)
        return OpTime(moved, moved if grads else 0.0)
    if base_name(op.target) == "linears":
        return _linears_time(op, operands, outputs, device, dtype, flops, backward_flops if grads else 0.0)
    if kind in (OpKind.MATMUL, OpKind.CONVOLUTION) and operands:
        m, n, k, batch = _matmul_dims(op, operands, outputs)
        used = _matmul_dtype(operands, dtype)
        rate = device.peak(used) * matmul_efficiency(device, m, n, k, batch, used)
        if kind is OpKind.CONVOLUTION:
            rate *= CONVOLUTION_EFFICIENCY
        bandwidth = memory_bandwidth(device)
        moved = in_bytes + out_bytes
        turned_s = 0.0
        if kind is OpKind.CONVOLUTION and used in ("bfloat16", "float16") and not _is_cpu(device):
            turned_s = CONVOLUTION_TURNS * memory_time_s(device, 2 * moved / CONVOLUTION_TURNS)
        forward = kernel_time_s(device, max(flops / rate, moved / bandwidth)) + turned_s
        # Each gradient of a product is a product of the same three sizes, which reads two of the tensors' like and
        # writes the third's.
        products = max(1, round(backward_flops / flops)) if flops else max(1, len(grads))
        each = kernel_time_s(device, max(backward_flops / products / rate, moved / bandwidth)) + turned_s
        # The gradient of a bias is a sum over the result's.
        bias_s = sum(
            memory_time_s(device, out_bytes + x.size_bytes) for x in grads if len(x.shape) == 1 and len(operands) == 3
        )
        return OpTime(forward, products * each + bias_s if grads and backward_flops else 0.0)
    if kind is OpKind.EXPERTS and flops:
        return _experts_time(operands, device, dtype, flops, backward_flops if grads else 0.0)
    if kind is OpKind.ATTENTION:
        keys = operands[1].shape[-2] if len(operands) > 1 else operands[0].shape[-2]
        head_dim = operands[0].shape[-1]
        forward_share, backward_share = attention_efficiency(
            device, head_dim, keys, is_causal(op), operands[0].numel / max(1.0, head_dim)
        )
        peak = device.peak(dtype) * (MASKED_ATTENTION_SLOWDOWN if has_mask(op) else 1.0)
        bandwidth = memory_bandwidth(device)
        return OpTime(
            kernel_time_s(device, max(flops / (peak * forward_share), (in_bytes + out_bytes) / bandwidth)),
            kernel_time_s(
                device, max(backward_flops / (peak * backward_share), 2 * (in_bytes + out_bytes) / bandwidth)
            ) if grads else 0.0,
        )
    if kind is OpKind.CREATION:
        return OpTime(memory_time_s(device, out_bytes), 0.0)
    if kind is OpKind.GATHER:
        # The backward fills the table's gradient with zeros and adds into it.
        filled_s = grad_in_bytes / memory_bandwidth(device)
        added_s = _row_time_s(
            op, device, 3 * out_bytes, outputs[0].element_bytes if outputs else 2, width=math.inf, backward=True
        )
        return OpTime(memory_time_s(device, 2 * out_bytes), added_s + filled_s if grads else 0.0)
    element_bytes = operands[0].element_bytes if operands else 2
    width = operands[0].shape[-1] if operands and operands[0].shape else 1.0
    forward = _row_time_s(op, device, in_bytes + out_bytes + extra_bytes, element_bytes, width=width, backward=False)
    if not grads or not any(output.requires_grad for output in outputs) or base_name(op.target) in ("cat", "stack"):
        return OpTime(forward, 0.0)  # the gradient of a concatenation is read in place
    if base_name(op.target) == "cross_entropy_loss":
        # log_softmax is kept; its gradient is filled with zeros and set, then read with it to give the input's.
        return OpTime(forward, memory_time_s(device, 3 * extra_bytes + grad_in_bytes))
    if base_name(op.target) == "cross_entropy":
        # What is kept is exponentiated, scaled in place, and read to give the input's gradient.
        return OpTime(forward, memory_time_s(device, 5 * extra_bytes + grad_in_bytes))
    if base_name(op.target) in ("add", "sub") and not saved_bytes:
        # The gradient passes unchanged to operands of the output's size, and is summed for smaller ones.
        out_numel = max((output.numel for output in outputs), default=0.0)
        summed = [operand for operand in grads if operand.numel < out_numel]
        return OpTime(forward, sum(memory_time_s(device, out_bytes + operand.size_bytes) for operand in summed))
    moved = out_bytes + saved_bytes + extra_bytes + grad_in_bytes
    if base_name(op.target) in ("mul", "div") and len(grads) > 1:
        moved += out_bytes  # two kernels read the gradient
    return OpTime(forward, _row_time_s(op, device, moved, element_bytes, width=width, backward=True))


def _linears_time(
    op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor], device: DeviceType, dtype: str,
    flops: float, backward_flops: float,
) -> OpTime:
    """Several linears of one input: in the forward one product after a copy of the weights, or one each.

    The backward has the products of each; a gradient of the input is read again where the next adds onto it.
    """
    data, *tensors = operands
    weights = [tensor for tensor in tensors if len(tensor.shape) == 2]
    k, bandwidth, used = data.shape[-1], memory_bandwidth(device), _matmul_dtype(operands, dtype)
    rows = data.numel / max(1.0, k)
    columns = sum(weight.shape[0] for weight in weights)

    def product_s(n: float, work: float, moved: float) -> float:
        rate = device.peak(used) * matmul_efficiency(device, rows, n, k, 1.0, used)
        return kernel_time_s(device, max(work / rate, moved / bandwidth))

    in_bytes, out_bytes = data.size_bytes, sum(output.size_bytes for output in outputs)
    weight_bytes = sum(weight.size_bytes for weight in weights)
    products = max(1, round(backward_flops / flops)) if flops else 0
    forward = backward = 0.0
    if is_joined(op):
        forward += memory_time_s(device, 2 * weight_bytes)
        forward += product_s(columns, flops, in_bytes + weight_bytes + out_bytes)
    for i, (weight, output) in enumerate(zip(weights, outputs, strict=False)):
        share = weight.shape[0] / columns
        moved = in_bytes + weight.size_bytes + output.size_bytes
        if not is_joined(op):
            forward += product_s(weight.shape[0], flops * share, moved)
        backward += products * product_s(weight.shape[0], backward_flops * share / products, moved)
        backward += in_bytes / bandwidth if i and data.requires_grad else 0.0
    return OpTime(forward, backward if backward_flops else 0.0)


def is_joined(op: Op) -> bool:
    """Whether linears of one input run as one product in the forward."""
    return base_name(op.target) == "linears" and op.args[3] is True


def _experts_time(
    operands: Sequence[LocalTensor], device: DeviceType, dtype: str, flops: float, backward_flops: float
) -> OpTime:
    """A product a matrix for the rows of each expert, and what sorting rows, gate and weighted sum move besides.

    The router is taken to be balanced: every expert has its mean of the rows, which follows from the FLOPs.
    """
    hidden, _, _, up, down = operands[:5]
    width = hidden.shape[-1]
    num_experts, rows_each = up.shape[0], flops / (2 * (up.numel + down.numel))
    rows = rows_each * num_experts
    columns, inner = up.numel / (num_experts * width), down.numel / (num_experts * width)
    used = _matmul_dtype(operands[:1], dtype)
    rate = device.peak(used) * matmul_efficiency(device, rows_each, columns, width, num_experts, used)
    weights_s = (up.size_bytes + down.size_bytes) / memory_bandwidth(device)
    # Rows are taken, given back and summed; the first products are written, read by the gate, its result written.
    moved_s = 4 * memory_time_s(device, rows * (4 * width + 2 * columns + inner) / 4 * hidden.element_bytes)
    forward = kernel_time_s(device, max(flops / rate, weights_s))
    backward = kernel_time_s(device, max(backward_flops / rate, 2 * weights_s)) + 2 * moved_s
    return OpTime(forward + moved_s, backward if backward_flops else 0.0)


def dispatch_s(op: Op, device: DeviceType, differentiable: bool) -> OpTime:
    """Seconds that the host needs to issue an op; none on a CPU, which computes where it issues."""
    if _is_cpu(device):
        return FREE
    host = efficiency_of(device.name).host
    if base_name(op.target) == "linears":  # its backward is in Python too, two products and a view for each
        num = sum(1 for _ in refs_in(op.args[1]))
        calls = 3 if is_joined(op) else num
        return OpTime(
            calls * FORWARD_DISPATCH_S * host, num * BACKWARD_DISPATCH_S * host if differentiable else 0.0
        )
    is_view = op_kind(op.target) is OpKind.VIEW
    forward = VIEW_DISPATCH_S if is_view else FORWARD_DISPATCH_S
    backward = VIEW_BACKWARD_DISPATCH_S if is_view else BACKWARD_DISPATCH_S
    return OpTime(forward * host, backward * host if differentiable else 0.0)


def collective_dispatch_s(device: DeviceType) -> float:
    """Seconds that the host needs to issue one collective."""
    return COLLECTIVE_DISPATCH_S * efficiency_of(device.name).host


def lowering_dispatch_s(device: DeviceType, num_collectives: int, num_calls: int) -> float:
    """Seconds that the host needs to issue the collectives and the calls of an op's special program."""
    calls_s = num_calls * FORWARD_DISPATCH_S * efficiency_of(device.name).host
    return num_collectives * collective_dispatch_s(device) + calls_s


def checkpoint_dispatch_s(device: DeviceType) -> float:
    """Seconds that the host needs around a recomputed block, beside issuing its ops again."""
    return CHECKPOINT_DISPATCH_S * efficiency_of(device.name).host


def is_free(op: Op, outputs: Sequence[LocalTensor]) -> bool:
    """Whether the op moves nothing in the forward: a view, or dropout that is off."""
    name = base_name(op.target)
    if name in ("dropout", "feature_dropout"):
        return len(op.args) > 1 and (op.args[1] == 0 or (len(op.args) > 2 and op.args[2] is False))
    return op_kind(op.target) is OpKind.VIEW or not outputs


def is_identity_cast(op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor]) -> bool:
    """Whether a cast finds its operand in the dtype already, so that it returns it."""
    if base_name(op.target) not in CASTS or len(outputs) != 1 or not operands:
        return False
    given, got = operands[0], outputs[0]
    return given.element_bytes == got.element_bytes and given.requires_grad == got.requires_grad


def attention_efficiency(
    device: DeviceType, head_dim: float, keys: float = math.inf, causal: bool = True, queries: float = math.inf
) -> tuple[float, float]:
    """Shares of the peak of fused attention, forward and backward; `queries` are those of all rows and heads together.

    Heads smaller than 128 use the units less, and so do short sequences; without a causal mask half as many keys give
    as much work. Where there are few tiles for each multiprocessor, the last of them run alone.
    """
    found = efficiency_of(device.name)
    share = min(1.0, 0.6 + 0.4 * head_dim / 128)  # 0.8 at head dim 64, as in FlashAttention-2's figures
    share *= device.slowest_share
    fewer = 1.0 if causal else 0.5
    tiles = queries / found.attention_tile_rows / found.multiprocessors * (0.5 if causal else 1.0)

    def reached(half_keys: float, half_tiles: float) -> float:
        by_length = 1.0 if math.isinf(keys) else keys / (keys + half_keys * fewer)
        return share * by_length * (1.0 if math.isinf(tiles) else tiles / (tiles + half_tiles))

    forward_tiles, backward_tiles = (0.0, 0.0) if _is_cpu(device) else ATTENTION_HALF_TILES
    return (
        found.attention_forward * reached(found.attention_half_keys, forward_tiles),
        found.attention_backward * reached(found.attention_backward_half_keys, backward_tiles),
    )


def has_mask(op: Op) -> bool:
    """Whether an attention op is given a mask tensor. (A causal flag shows in its FLOPs, which are half.)"""
    return dict(op.kwargs).get("attn_mask", op.args[3] if len(op.args) > 3 else None) is not None


def is_causal(op: Op) -> bool:
    """Whether an attention op has the implied causal mask."""
    return dict(op.kwargs).get("is_causal", op.args[5] if len(op.args) > 5 else False) is True


def _view_backward_s(
    op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor], device: DeviceType
) -> float:
    """Backwards that views do have: a sum for expand, zeros and a copy for slice and select, a concatenation."""
    if not operands or not operands[0].requires_grad or not outputs:
        return 0.0
    name = base_name(op.target)
    whole, parts = operands[0].size_bytes, sum(output.size_bytes for output in outputs)
    if name in ("expand", "expand_as"):
        return memory_time_s(device, whole + parts) if parts > whole else 0.0
    if name in ("slice", "select", "narrow"):
        return memory_time_s(device, whole + 2 * parts) if parts < whole else 0.0
    if name in ("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"):
        return memory_time_s(device, 2 * whole)
    return 0.0


def _matmul_dims(
    op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor]
) -> tuple[float, float, float, float]:
    """(m, n, k, batch) of a product; a convolution counts as (positions, channels out, channels in * window)."""
    name = base_name(op.target)
    out = outputs[0]
    if name.startswith("conv"):
        weight = operands[1]
        n = weight.shape[0]
        return out.numel / max(1.0, n), n, weight.numel / max(1.0, n), 1.0
    first = operands[1] if name in ("addmm", "baddbmm", "addbmm") and len(operands) > 2 else operands[0]
    second = operands[2] if name in ("addmm", "baddbmm", "addbmm") and len(operands) > 2 else operands[-1]
    if name == "linear":
        second = operands[1]
    k = first.shape[-1] if first.shape else 1.0
    n = out.shape[-1] if out.shape else 1.0
    if len(second.shape) > 2 and len(out.shape) > 2:
        m = out.shape[-2]
        return m, n, k, out.numel / max(1.0, m * n)
    return out.numel / max(1.0, n), n, k, 1.0


def _matmul_dtype(operands: Sequence[LocalTensor], dtype: str) -> str:
    """Products of tensors that are all held in 4 bytes run in float32, whatever the compute dtype."""
    return dtype if any(operand.element_bytes < 4 for operand in operands) else "float32"


def _is_cpu(device: DeviceType) -> bool:
    return device.name.startswith("CPU")


def _is_measured(device: DeviceType, field: str) -> bool:
    return dict(device.sources).get(field, "").startswith("measured")
