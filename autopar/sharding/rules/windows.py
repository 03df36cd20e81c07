"""Windows that slide over positions: what an equal part of the positions needs of its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.graph.model_graph import Op, TensorInfo
from autopar.sharding.rules.registry import Call, find_rule
from autopar.sharding.state import Kind
from autopar.sharding.strategy import Strategy

NEIGHBOURS = "positions need their neighbours across the cut"
_LARGEST_NEAREST = 8  # up to here torch's rounding of o * (1 / f) takes the position o // f, at any offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How one dim of positions is cut: runs of `inner_in` positions become runs of `inner_out` ones, in order.

    A part needs `before` positions of the part before it and `after` of the one after it, or what stands for them at
    the ends ("zero", "lowest" or "edge", the border repeated). From what it computes on them, the part's own positions
    start at `skip`, for a part of any length. `reason`: why the dim cannot be cut.
    """

    inner_in: int = 1
    inner_out: int = 1
    before: int = 0
    after: int = 0
    skip: int = 0
    fill: str = "zero"
    reason: str = ""

    @property
    def communicates(self) -> bool:
        return self.before > 0 or self.after > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """What a rank does along `dim`: borrow `before` and `after` positions, run the op, keep `keep` from `skip` on."""

    dim: int
    before: int
    after: int
    fill: str
    skip: int
    keep: int


def num_positions(target: str) -> int:
    """How many dims are positions, from the op's name: "max_pool2d" has 2."""
    return next(space for space in (1, 2, 3) if f"{space}d" in target)


def packet(target: str) -> str:
    return target.split(".")[1]


def per_dim(call: Call, name: str, default: int) -> tuple[int, ...]:
    """An argument with one number for each dim of positions; a single number stands for all of them."""
    space = num_positions(call.op.target)
    given = call.ints(name) or (default,)
    return given * space if len(given) == 1 else given


def paddings(call: Call) -> tuple[tuple[int, int], ...]:
    """The padding before and after, for each dim of positions; of "same" and "valid" the numbers they stand for."""
    given = call.get("padding", 0)
    if given == "valid":
        return ((0, 0),) * num_positions(call.op.target)
    if given == "same":
        kernel, dilation = call.shape("weight")[2:], per_dim(call, "dilation", 1)
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in both)
    return tuple((amount, amount) for amount in per_dim(call, "padding", 0))


def reaches(call: Call) -> tuple[Reach, ...]:
    """The reach of each dim of positions of a convolution, a pooling or an upsampling."""
    name, space = packet(call.op.target), num_positions(call.op.target)
    lengths = call.shape("input")[-space:]
    made = call.output_shape()[-space:]
    if name.startswith("conv_transpose"):
        found = [_transposed(call, dim) for dim in range(space)]
    elif name.startswith("conv"):
        kernel = call.shape("weight")[2:]
        found = [_sliding(call, dim, kernel[dim], "zero") for dim in range(space)]
        if any(before != after for before, after in paddings(call)):
            found = [Reach(reason="the padding differs at the two ends")] * space
    elif "adaptive" in name:
        found = [_adaptive(a, b) for a, b in zip(lengths, made, strict=True)]
    elif "upsample" in name:
        found = [_upsampled(call, dim, a, b) for dim, (a, b) in enumerate(zip(lengths, made, strict=True))]
    else:
        found = [_pooled(call, dim) for dim in range(space)]
    return tuple(
        reach if reach.reason or a * reach.inner_out == b * reach.inner_in
        else Reach(reason=f"{NEIGHBOURS}, and {a} of them do not become {b} in equal parts")
        for reach, a, b in zip(found, lengths, made, strict=True)
    )


def _sliding(call: Call, dim: int, kernel: int, fill: str, *, stride: int | None = None) -> Reach:
    step = per_dim(call, "stride", 1)[dim] if stride is None else stride
    padding, extent = paddings(call)[dim][0], per_dim(call, "dilation", 1)[dim] * (kernel - 1)
    return Reach(inner_in=step, before=padding, after=max(0, extent - padding - step + 1), fill=fill)


def _pooled(call: Call, dim: int) -> Reach:
    kernel = per_dim(call, "kernel_size", 1)[dim]
    stride = per_dim(call, "stride", kernel)[dim]
    is_mean = packet(call.op.target).startswith("avg")
    if is_mean and paddings(call)[dim] != (0, 0) and call.get("count_include_pad", True) is not True:
        return Reach(reason="the mean counts the positions in the window, fewer at the ends")
    if is_mean and call.get("ceil_mode", False) is True:
        return Reach(reason="the last window may be shorter")
    if any(call.op.outputs[1:]):
        return Reach(reason="the indices count positions of the whole")
    return _sliding(call, dim, kernel, "zero" if is_mean else "lowest", stride=stride)


def _adaptive(length: int, made: int) -> Reach:
    if length % made:
        return Reach(reason="the windows differ in length")
    return Reach(inner_in=length // made)


def _transposed(call: Call, dim: int) -> Reach:
    stride, padding = per_dim(call, "stride", 1)[dim], paddings(call)[dim][0]
    extent = per_dim(call, "dilation", 1)[dim] * (call.shape("weight")[2 + dim] - 1)
    before, after = max(0, (extent - padding) // stride), (padding - 1) // stride + 1
    return Reach(inner_out=stride, before=before, after=after, skip=stride * before + padding)


def _upsampled(call: Call, dim: int, length: int, made: int) -> Reach:
    if made % length:
        return Reach(reason=f"{length} positions become {made}, not a whole number each")
    factor, name = made // length, packet(call.op.target)
    scales = [value for key, value in call.args.items() if key.startswith("scale") and value is not None]
    given = [scale for value in scales for scale in (value if isinstance(value, tuple) else (value,))]
    own = given[dim : dim + 1] if len(given) == num_positions(call.op.target) else given
    if any(scale != factor for scale in own):
        return Reach(reason="the scale given is not the ratio of the lengths")
    if call.get("align_corners", False) is True:
        return Reach(reason="the corners are aligned with those of the whole")
    if "nearest" in name:
        too_large = factor > _LARGEST_NEAREST
        return Reach(inner_out=factor, reason="positions are rounded from afar" if too_large else "")
    width = 0 if factor == 1 else 2 if "bicubic" in name else 1
    return Reach(inner_out=factor, before=width, after=width, skip=width * factor, fill="edge")


def split_position(op: Op, strategy: Strategy, tensors: Mapping[str, TensorInfo]) -> int | None:
    """Which dim of positions (0 the first of them) the strategy splits; None where it splits none."""
    state, rank = strategy.inputs[0], len(tensors[op.operands[0]].shape)
    position = state.dim - (rank - num_positions(op.target))
    return position if state.kind is Kind.SHARDED and position >= 0 else None


def halo_of(op: Op, strategy: Strategy, tensors: Mapping[str, TensorInfo], size: int) -> Halo:
    """What a rank of an axis of `size` borrows and keeps under a strategy with the lowering SPATIAL_HALO.

    `op` is the op as it is before its arguments are made local.
    """
    found = find_rule(op.target)
    position = split_position(op, strategy, tensors)
    assert found is not None and position is not None, f"{op.target} splits no positions under {strategy}"
    call = Call(op, tensors, found[1])
    reach = reaches(call)[position]
    keep = call.output_shape()[strategy.outputs[0].dim] // size
    return Halo(
        dim=strategy.inputs[0].dim, before=reach.before, after=reach.after, fill=reach.fill, skip=reach.skip, keep=keep
    )
