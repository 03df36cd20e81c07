"""What kind of work an ATen op is, and how many bytes an element of each tensor takes under mixed precision."""

from __future__ import annotations

from enum import StrEnum
from functools import cache

from autopar.graph.model_graph import DTYPE_BYTES, Arg, BlockClass, Literal, Op, Ref


class OpKind(StrEnum):
    VIEW = "view"  # moves nothing
    POINTWISE = "pointwise"  # reads its operands and writes its output once; fuses with its neighbours
    REDUCTION = "reduction"  # likewise, along an axis (norms, softmax, sums, losses)
    MATMUL = "matmul"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    EXPERTS = "experts"  # a mixture's: two products for each choice of a token, sorted by expert
    GATHER = "gather"  # reads as much as it writes, whatever the table's size
    CREATION = "creation"  # writes alone
    OTHER = "other"  # bound by memory, never fused


_BY_KIND: dict[OpKind, str] = {
    OpKind.VIEW: """view _unsafe_view reshape transpose permute t unsqueeze squeeze expand expand_as view_as reshape_as
        slice select narrow detach alias split split_with_sizes chunk unbind flatten unflatten movedim swapaxes swapdims
        lift_fresh lift_fresh_copy as_strided diagonal getitem sym_size unsafe_split unsafe_chunk tensor_split
        contiguous identity _assert_tensor_metadata mT numpy_T view_as_complex view_as_real broadcast_tensors""",
    OpKind.POINTWISE: """add sub rsub mul div neg pow rsqrt sqrt exp log log1p log2 expm1 tanh gelu silu relu sigmoid
        to _to_copy type_as clone where masked_fill cos sin polar eq ne lt gt ge le logical_and logical_or logical_not
        logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor clamp clamp_min clamp_max abs dropout native_dropout
        tril triu square reciprocal erf hardtanh hardswish hardsigmoid leaky_relu elu celu selu mish softplus logsigmoid
        maximum minimum isnan isinf copy fill floor ceil round trunc sign remainder fmod floor_divide float bfloat16
        half float_power atan2 addcmul addcdiv lerp feature_dropout alpha_dropout relu6 glu threshold rand_like
        bernoulli nan_to_num gated cat stack pad constant_pad_nd roll flip""",
    OpKind.REDUCTION: """sum mean amax amin max min var var_mean std softmax log_softmax _softmax _log_softmax
        layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm
        native_batch_norm _native_batch_norm_legit cudnn_batch_norm instance_norm cross_entropy cross_entropy_loss
        nll_loss nll_loss_nd nll_loss2d nll_loss_forward mse_loss l1_loss smooth_l1_loss binary_cross_entropy
        binary_cross_entropy_with_logits kl_div norm linalg_vector_norm logsumexp prod all any argmax argmin cumsum
        cumprod count_nonzero""",
    OpKind.MATMUL: "linear linears matmul mm bmm addmm addbmm baddbmm einsum dot mv outer _grouped_mm grouped_mm",
    OpKind.CONVOLUTION: "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    OpKind.ATTENTION: """scaled_dot_product_attention _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
        _scaled_dot_product_flash_attention_for_cpu""",
    OpKind.EXPERTS: "experts",
    OpKind.GATHER: """embedding index index_select gather take take_along_dim embedding_bag _unsafe_index repeat
        repeat_interleave""",
    OpKind.CREATION: """arange zeros ones full empty scalar_tensor zeros_like ones_like full_like empty_like new_zeros
        new_ones new_full new_empty rand randn linspace eye randint randperm""",
}
_KIND_OF: dict[str, OpKind] = {name: kind for kind, names in _BY_KIND.items() for name in names.split()}


@cache
def base_name(target: str) -> str:
    """The op's name without library, overload and in-place mark: "aten.add_.Tensor" -> "add"."""
    parts = target.split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    return name if name.startswith("__") else (name[:-1] if name.endswith("_") and len(name) > 1 else name)


@cache
def op_kind(target: str) -> OpKind:
    """The kind of an op by its target; OTHER where it is not known."""
    return _KIND_OF.get(base_name(target), OpKind.OTHER)


def is_known(target: str) -> bool:
    return base_name(target) in _KIND_OF


def dtype_literal(op: Op) -> str | None:
    """The dtype that an op's arguments name, or None."""

    def find(arg: Arg) -> str | None:
        if isinstance(arg, Literal):
            return arg.value if arg.kind == "dtype" else None
        return None

    for arg in (*op.args, *(value for _, value in op.kwargs)):
        found = find(arg)
        if found is not None:
            return found.removeprefix("torch.")
    return None


CASTS = {"to", "_to_copy", "float", "half", "bfloat16", "type_as"}
_FLOATS = {"float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}


def element_bytes(cls: BlockClass, captured_dtype: str, compute_dtype: str) -> dict[str, int]:
    """Bytes an element of each tensor of a class when a model captured in one dtype computes in another.

    Where the two are the same, every tensor has the bytes of its own dtype. A model captured in float32 that computes
    in 2 bytes shows its own upcasts as float32-to-float32 casts, there and back alike. They are read so: a cast to
    float32 of a tensor in the compute dtype is an upcast, and of a 4-byte tensor is the way back. Between them
    pointwise ops and reductions keep the widest of their operands; products, attention and embeddings give the compute
    dtype. A reduction that names a dtype (softmax(dtype=float32)) gives that dtype. In such a capture an upcast is also
    the same tensor as its source, so that a residual sum may name either: an upcast tensor that meets a tensor of equal
    size in the compute dtype counts as its source. A capture in the compute dtype itself needs none of this.
    """
    own = {info.name: DTYPE_BYTES[info.dtype] for info in cls.tensors}
    if captured_dtype == compute_dtype:
        return own
    narrow = DTYPE_BYTES[compute_dtype]
    floating = {info.name: info.dtype in _FLOATS for info in cls.tensors}
    of_capture = {info.name: info.dtype == captured_dtype for info in cls.tensors}
    width = {name: narrow if of_capture[name] else size for name, size in own.items()}
    if captured_dtype != "float32" or narrow >= 4:
        return width
    upcast: set[str] = set()
    for op in cls.ops:
        name, kind, literal = base_name(op.target), op_kind(op.target), dtype_literal(op)
        operands = [ref for ref in op.operands if floating.get(ref)]
        full = max((cls.tensor[ref].numel for ref in operands), default=0)
        meets = any(width[ref] <= narrow and cls.tensor[ref].numel == full for ref in operands)
        widest = max((narrow if meets and ref in upcast else width[ref] for ref in operands), default=None)
        for output in op.outputs:
            if not output or not floating[output] or not of_capture[output]:
                continue
            if name in CASTS:
                if name == "type_as" or (literal is None and len(op.args) > 1 and isinstance(op.args[1], Ref)):
                    width[output] = width[op.operands[1]]
                elif widest is None:  # from integers
                    width[output] = 4
                elif literal is None and name == "to":  # to a device or a layout
                    width[output] = widest
                else:
                    width[output] = 4 if widest <= narrow else narrow
                    if width[output] > widest:
                        upcast.add(output)
            elif kind is OpKind.REDUCTION and literal == "float32":
                width[output] = 4
            elif kind in (OpKind.MATMUL, OpKind.CONVOLUTION, OpKind.ATTENTION, OpKind.EXPERTS, OpKind.GATHER):
                width[output] = narrow if kind is not OpKind.GATHER or widest is None else widest
            elif widest is not None:
                width[output] = widest
    return width
