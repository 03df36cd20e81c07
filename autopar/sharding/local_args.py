"""The op that one rank runs: literal shape arguments rewritten for the shapes of its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import Arg, Op, TensorInfo
from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import local_shape
from autopar.sharding.rules.registry import Call, find_rule, normal_dim, slice_range, split_lengths
from autopar.sharding.rules.windows import paddings, per_dim, reaches, split_position
from autopar.sharding.state import Kind, State
from autopar.sharding.strategy import Strategy

Shape = tuple[int, ...]


def local_infos(
    op: Op, strategy: Strategy, tensors: Mapping[str, TensorInfo], size: int
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The local shapes of the op's operands and of its outputs (an unused output has shape ())."""
    operands = tuple(
        local_shape(tensors[name].shape, state, size) for name, state in zip(op.operands, strategy.inputs, strict=True)
    )
    outputs = tuple(
        local_shape(tensors[name].shape, state, size) if name else ()
        for name, state in zip(op.outputs, strategy.outputs, strict=True)
    )
    return operands, outputs


def bias_operand(op: Op) -> int:
    """The position among the operands of the bias that the lowering "bias_on_first_rank" adds on one rank alone."""
    return {"addmm": 0, "baddbmm": 0, "index_add": 0, "index_add_": 0, EXPERTS_OP: 6}.get(_packet(op), 2)


def local_op(op: Op, strategy: Strategy, tensors: Mapping[str, TensorInfo], size: int) -> Op:
    """The op to call on one rank's operands. `tensors` has the whole shapes; names, operands and outputs stay.

    Views become reshapes (a shard need not be contiguous, nor what was put together from shards), a squeeze becomes a
    reshape (a dim may get size 1), and the literal sizes of expand, slice, split, pad, roll, repeat, grouped
    convolutions and group norms follow the local shapes. Every other op is returned unchanged where no factor splits
    it. What a special lowering does is its own matter.
    """
    if op.target == "aten.view.default":
        op = replace(op, target="aten.reshape.default")
    if not any(state.kind is Kind.SHARDED for state in (*strategy.inputs, *strategy.outputs)):
        return op
    rewrite = _REWRITES.get(_packet(op))
    return rewrite(_Local(op, strategy, tensors, size)) if rewrite else op


def _packet(op: Op) -> str:
    return op.target.split(".")[1] if op.target.startswith("aten.") else op.target


class _Local:
    """An op with its global and local shapes, and setters for its arguments."""

    def __init__(self, op: Op, strategy: Strategy, tensors: Mapping[str, TensorInfo], size: int) -> None:
        found = find_rule(op.target)
        self.signature = found[1] if found else ()
        self.call = Call(op, tensors, self.signature)
        self.op, self.strategy, self.size = op, strategy, size
        self.operands, self.outputs = local_infos(op, strategy, tensors, size)

    @property
    def shape(self) -> Shape:
        """The whole shape of the first operand."""
        return self.call.operand_shapes()[0]

    def shards(self, dim: int) -> bool:
        """Whether the first operand is sharded along this dim."""
        state: State = self.strategy.inputs[0]
        return state.kind is Kind.SHARDED and state.dim == dim

    def with_args(self, **values: Arg) -> Op:
        """The op with these arguments replaced or, where they were left to their defaults, added as keywords."""
        args, kwargs = list(self.op.args), dict(self.op.kwargs)
        for name, value in values.items():
            if name in self.signature and self.signature.index(name) < len(args):
                args[self.signature.index(name)] = value
            else:
                kwargs[name] = value
        return replace(self.op, args=tuple(args), kwargs=tuple(kwargs.items()))


def _reshape(local: _Local) -> Op:
    if local.op.target == "aten.view.dtype":
        return local.op
    return replace(local.op, target="aten.reshape.default", args=(local.op.args[0], local.outputs[0]), kwargs=())


def _like_other(local: _Local) -> Op:
    """view_as and the like keep their second operand, whose local shape is the output's."""
    return replace(local.op, target="aten.reshape_as.default")


def _expand(local: _Local) -> Op:
    return local.with_args(size=local.outputs[0])


def _repeat(local: _Local) -> Op:
    own, out = local.operands[0], local.outputs[0]
    padded = (1,) * (len(out) - len(own)) + own
    return local.with_args(repeats=tuple(b // a if a else 1 for a, b in zip(padded, out, strict=True)))


def _repeat_interleave(local: _Local) -> Op:
    dim = normal_dim(local.call.number("dim", 0), len(local.shape))
    return local.with_args(repeats=local.outputs[0][dim] // local.operands[0][dim])


def _slice(local: _Local) -> Op:
    call = local.call
    dim = normal_dim(call.number("dim", 0), len(local.shape))
    if not local.shards(dim):
        return local.op
    if call.number("step", 1) != 1:
        start, _ = slice_range(local.shape[dim], call.number("start", 0), 0)
        return local.with_args(start=start, end=local.operands[0][dim])
    start, end = slice_range(local.shape[dim], call.number("start", 0), call.output_shape()[dim])
    return local.with_args(start=start // local.size, end=end // local.size)


def _slice_scatter(local: _Local) -> Op:
    call = local.call
    dim = normal_dim(call.number("dim", 0), len(local.shape))
    if not local.shards(dim):
        return local.op
    start, end = slice_range(local.shape[dim], call.number("start", 0), call.operand_shapes()[1][dim])
    return local.with_args(start=start // local.size, end=end // local.size)


def _pad(local: _Local) -> Op:
    divisor = [local.size if local.shards(dim) else 1 for dim in reversed(range(len(local.shape)))]
    return local.with_args(pad=tuple(n // divisor[i // 2] for i, n in enumerate(local.call.ints("pad"))))


def _roll(local: _Local) -> Op:
    shifts, dims = local.call.ints("shifts"), local.call.ints("dims")
    sharded = [local.shards(normal_dim(dim, len(local.shape))) for dim in dims]
    return local.with_args(shifts=tuple(n // local.size if own else n for n, own in zip(shifts, sharded, strict=True)))


def _narrow(local: _Local) -> Op:
    dim = normal_dim(local.call.number("dim", 0), len(local.shape))
    if not local.shards(dim):
        return local.op
    start, end = slice_range(local.shape[dim], local.call.number("start", 0), local.call.output_shape()[dim])
    return local.with_args(start=start // local.size, length=(end - start) // local.size)


def _split(local: _Local) -> Op:
    dim = normal_dim(local.call.number("dim", 0), len(local.shape))
    if not local.shards(dim):
        return local.op
    lengths = tuple(length // local.size for length in split_lengths(local.call, local.shape, dim))
    return replace(local.op, target="aten.split_with_sizes.default", args=(local.op.args[0], lengths, dim), kwargs=())


def _convolution(local: _Local) -> Op:
    values = _without_padding(local)
    if local.call.number("groups", 1) > 1:
        channels, weight = local.operands[0][1 - len(local.operands[1]) :][0], local.operands[1]
        values["groups"] = channels // weight[1]
    op = local.with_args(**values) if values else local.op
    return replace(op, target=f"aten.{_packet(op)}.default") if "padding" in values else op


def _without_padding(local: _Local) -> dict[str, Arg]:
    """No padding where the positions are split and borders come from the neighbours."""
    position = split_position(local.op, local.strategy, local.call.tensors)
    if position is None or local.strategy.lowering != Lowering.SPATIAL_HALO:
        return {}
    kept = tuple(0 if dim == position else before for dim, (before, _) in enumerate(paddings(local.call)))
    return {"padding": kept}


def _transposed_convolution(local: _Local) -> Op:
    """Groups as the local channels have them; split positions are made with no padding and cut to length after."""
    values = _without_padding(local)
    if local.call.number("groups", 1) > 1:
        channels, weight = local.outputs[0][1 - len(local.operands[1]) :][0], local.operands[1]
        values["groups"] = channels // weight[1]
    if "padding" in values:
        position = split_position(local.op, local.strategy, local.call.tensors)
        assert position is not None
        reach, extra = reaches(local.call)[position], list(per_dim(local.call, "output_padding", 0))
        length, made = local.operands[0][-len(extra) + position], local.outputs[0][-len(extra) + position]
        extent = per_dim(local.call, "dilation", 1)[position] * (local.operands[1][2 + position] - 1)
        full = (length + reach.before + reach.after - 1) * reach.inner_out + extent + 1
        extra[position] = max(0, reach.skip + made - full)
        values["output_padding"] = tuple(extra)
    return local.with_args(**values) if values else local.op


def _pooling(local: _Local) -> Op:
    values = _without_padding(local)
    return local.with_args(**values) if values else local.op


def _resized(local: _Local) -> Op:
    """Poolings to a size and upsamplings, with the size that this part has (before its borders are cut away)."""
    position = split_position(local.op, local.strategy, local.call.tensors)
    if position is None or not local.call.has("output_size"):
        return local.op
    reaching = reaches(local.call)
    reach, wanted = reaching[position], list(local.call.output_shape()[-len(reaching) :])
    if wanted[position] > 1:
        wanted[position] = wanted[position] // local.size + (reach.before + reach.after) * reach.inner_out
    return local.with_args(output_size=tuple(wanted))


def _group_norm(local: _Local) -> Op:
    groups = local.call.number("num_groups", 1) * local.operands[0][1] // local.shape[1]
    return local.with_args(num_groups=groups)


_REWRITES: dict[str, Callable[[_Local], Op]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), _reshape
    ),
    **dict.fromkeys(("view_as", "reshape_as"), _like_other),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "narrow": _narrow,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "roll": _roll,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _split
    ),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _pooling
    ),
    **dict.fromkeys(
        (
            "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
            "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
            "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
            "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
            "upsample_bicubic2d",
        ),
        _resized,
    ),
    "group_norm": _group_norm,
}  # fmt: skip
