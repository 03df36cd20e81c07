"""Chains of elementwise ops that one kernel does, as that kernel: what they would keep for the backward is not kept.

Models write normalizations and activations out in small steps, and autograd keeps the tensors between them. A class is
searched for the known chains, and each becomes one op with the same result (rounded once instead of after every step
where the compute dtype is narrow):

* `w * (x * rsqrt(mean(x**2) + eps))`, in float32 or not: `aten::rms_norm`, which keeps x and a number a row;
* `0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3)))`: `aten::gelu`, which keeps x;
* `act(gate) * up`: `autopar::gated`, which keeps gate and up;
* cross-entropy of logits that are cast to float32 for it: `autopar::cross_entropy`, which keeps one such tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from autopar.graph.kernels import CROSS_ENTROPY_OP, GATED_OP, MEAN, SUM
from autopar.graph.model_graph import Arg, BlockClass, Op, Ref, TensorInfo

_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "alias"})
# Views that always share the memory of what they are taken of.
_SHARING = frozenset({"view", "squeeze", "unsqueeze", "alias", "transpose", "permute", "split", "slice", "select"})
_NARROW = ("bfloat16", "float16", "float32")


class _Chains:
    """A class's ops while chains of them are replaced."""

    def __init__(self, cls: BlockClass) -> None:
        self.cls = cls
        self.ops = {op.name: op for op in cls.ops}
        self.info = dict(cls.tensor)
        self.producer = dict(cls.producer)
        self.num_uses = Counter(name for op in cls.ops for name in op.operands)
        self.num_uses.update(cls.outputs)

    def made_by(self, arg: Arg, *names: str) -> Op | None:
        """The op of one of these names that makes the tensor, which nothing else reads; None for any other."""
        if not isinstance(arg, Ref) or self.num_uses[arg.name] != 1:
            return None
        op = self.producer.get(arg.name)
        return op if op is not None and _base(op) in names else None

    def read_elsewhere(self, arg: Arg, name: str) -> Op | None:
        """As `made_by`, whoever else reads it."""
        op = self.producer.get(arg.name) if isinstance(arg, Ref) else None
        return op if op is not None and _base(op) == name else None

    def storage(self, name: str) -> str:
        """The tensor whose memory a view shares."""
        while (op := self.producer.get(name)) is not None and _base(op) in _SHARING and op.operands:
            name = op.operands[0]
        return name

    def replace(self, last: Op, new: Op, gone: tuple[Op, ...]) -> None:
        """Puts `new` in the place of `last`; `gone` are dropped, and casts that nothing reads any more."""
        for op in (last, *gone):
            self.num_uses.subtract(op.operands)
            if op is not last:
                del self.ops[op.name]
                for output in op.outputs:
                    self.producer.pop(output, None)
        self.ops[last.name] = new
        self.producer[new.outputs[0]] = new
        self.num_uses.update(new.operands)

    def drop_unread(self, op: Op | None) -> None:
        """Drops an op whose results nothing reads."""
        if op is not None and op.name in self.ops and not any(self.num_uses[output] > 0 for output in op.outputs):
            del self.ops[op.name]
            self.num_uses.subtract(op.operands)

    def result(self) -> BlockClass:
        ops = tuple(self.ops.values())
        alive = {*self.cls.inputs, *self.cls.params, *self.cls.buffers, *(out for op in ops for out in op.outputs)}
        tensors = tuple(self.info[info.name] for info in self.cls.tensors if info.name in alive)
        return replace(self.cls, ops=ops, tensors=tensors)


def fused_class(cls: BlockClass) -> BlockClass:
    """The class with its chains as single ops; the class itself where it has none."""
    chains = _Chains(cls)
    changed = False
    for op in cls.ops:
        if op.name in chains.ops:
            finders: dict[str, tuple[Callable[[_Chains, Op], bool], ...]] = {
                "mul": (_rms_norm, _gelu, _gated), "cross_entropy_loss": (_cross_entropy,),
            }
            changed = any(find(chains, op) for find in finders.get(_base(op), ())) or changed
    return chains.result() if changed else cls


def _base(op: Op) -> str:
    return op.target.split(".")[1]


def _argument(op: Op, position: int, keyword: str, default: Arg) -> Arg:
    named = dict(op.kwargs)
    return named[keyword] if keyword in named else op.args[position] if len(op.args) > position else default


def _pair(op: Op) -> tuple[tuple[Arg, Arg], ...]:
    """The two arguments of an op, in either order."""
    return () if len(op.args) < 2 else ((op.args[0], op.args[1]), (op.args[1], op.args[0]))


def _is_number(arg: Arg, value: float) -> bool:
    return isinstance(arg, int | float) and math.isclose(arg, value, rel_tol=1e-6)


def _times(chains: _Chains, arg: Arg, value: float) -> tuple[Op, Arg] | None:
    """The op that multiplies with a number, and what it multiplies."""
    op = chains.made_by(arg, "mul")
    for one, other in _pair(op) if op is not None else ():
        if op is not None and _is_number(other, value):
            return op, one
    return None


def _plus(chains: _Chains, arg: Arg, value: float) -> tuple[Op, Arg] | None:
    op = chains.made_by(arg, "add")
    for one, other in _pair(op) if op is not None and not op.kwargs else ():
        if op is not None and _is_number(other, value):
            return op, one
    return None


def _rms_norm(chains: _Chains, last: Op) -> bool:
    """`weight * cast(x * rsqrt(mean(x**2, -1) + eps))`, where a cast may be left out."""
    for weight, value in _pair(last):
        if not isinstance(weight, Ref) or weight.name not in chains.cls.params:
            continue
        gone: list[Op] = []
        back = chains.made_by(value, "to", "_to_copy", "type_as")
        if back is not None:
            gone.append(back)
            value = back.args[0]
        product = chains.made_by(value, "mul")
        if product is None:
            continue
        for data, scale in _pair(product):
            found = _root_mean_square(chains, scale)
            if found is None or not isinstance(data, Ref):
                continue
            inside, squared, eps = found
            source, cast = _before_cast(chains, data.name)
            if source != _before_cast(chains, squared)[0]:
                continue
            x, out = chains.info[source], chains.info[last.outputs[0]]
            w = chains.info[weight.name]
            if w.shape != x.shape[-1:] or out.shape != x.shape or not x.dtype == w.dtype == out.dtype:
                continue
            wide = 8 if x.dtype == "float64" else 4
            rows = x.numel // x.shape[-1] if x.shape[-1] else 0
            new = replace(
                last, target="aten.rms_norm.default", args=(Ref(source), (x.shape[-1],), weight, eps), kwargs=(),
                saved=_kept(chains, out, source), saved_extra_bytes=wide * rows if out.requires_grad else 0,
            )
            casts = {op.name: op for op in (cast, _before_cast(chains, squared)[1]) if op is not None}
            chains.replace(last, new, (*gone, product, *inside))
            for op in casts.values():
                chains.drop_unread(op)
            return True
    return False


def _root_mean_square(chains: _Chains, arg: Arg) -> tuple[tuple[Op, ...], str, float] | None:
    """The ops of `rsqrt(mean(x**2, -1, keepdim) + eps)`, x, and eps."""
    root = chains.made_by(arg, "rsqrt")
    total = chains.made_by(root.args[0], "add") if root is not None else None
    if root is None or total is None or total.kwargs or len(total.args) != 2:
        return None
    mean_of, eps = total.args
    mean = chains.made_by(mean_of, "mean")
    if mean is None or not isinstance(eps, float) or _argument(mean, 2, "keepdim", False) is not True:
        return None
    last_dim = len(chains.info[mean.operands[0]].shape) - 1
    if _argument(mean, 1, "dim", None) not in ((-1,), (last_dim,)) or dict(mean.kwargs).get("dtype") is not None:
        return None
    square = chains.made_by(mean.args[0], "pow", "square")
    if square is None or (_base(square) == "pow" and not _is_number(square.args[1], 2)):
        return None
    return (root, total, mean, square), square.operands[0], eps


def _before_cast(chains: _Chains, name: str) -> tuple[str, Op | None]:
    """The tensor before a cast to float32, and the cast; the tensor itself where it is none."""
    op = chains.producer.get(name)
    is_cast = op is not None and _base(op) in ("to", "_to_copy") and chains.info[name].dtype == "float32"
    if op is None or not is_cast or chains.info[op.operands[0]].dtype not in _NARROW:
        return name, None
    return op.operands[0], op


def _kept(chains: _Chains, out: TensorInfo, *names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chains.storage(name) for name in names)) if out.requires_grad else ()


def _gelu(chains: _Chains, last: Op) -> bool:
    """The tanh form of GELU, as GPT-2 and others write it."""
    for half, bracket in _pair(last):
        outer, one = _times(chains, half, 0.5), _plus(chains, bracket, 1.0)
        tanh = chains.made_by(one[1], "tanh") if one is not None else None
        inner = _times(chains, tanh.args[0], math.sqrt(2 / math.pi)) if tanh is not None else None
        total = chains.made_by(inner[1], "add") if inner is not None else None
        if outer is None or one is None or tanh is None or inner is None or total is None or total.kwargs:
            continue
        for data, cubic in _pair(total):
            scaled = _times(chains, cubic, 0.044715)
            cube = chains.made_by(scaled[1], "pow") if scaled is not None else None
            if scaled is None or cube is None or not _is_number(cube.args[1], 3):
                continue
            if not isinstance(data, Ref) or not outer[1] == data == cube.args[0]:
                continue
            new = replace(
                last, target="aten.gelu.default", args=(data,), kwargs=(("approximate", "tanh"),),
                saved=_kept(chains, chains.info[last.outputs[0]], data.name), saved_extra_bytes=0,
            )
            chains.replace(last, new, (outer[0], one[0], tanh, inner[0], total, scaled[0], cube))
            return True
    return False


def _gated(chains: _Chains, last: Op) -> bool:
    """`act(gate) * up` of tensors of one shape."""
    for active, up in _pair(last):
        act = chains.made_by(active, "silu", "gelu", "relu")
        if act is None or not isinstance(up, Ref) or not isinstance(act.args[0], Ref):
            continue
        gate = act.args[0]
        one, two, out = (chains.info[name] for name in (gate.name, up.name, last.outputs[0]))
        if one.shape != two.shape or not one.dtype == two.dtype == out.dtype or not one.requires_grad:
            continue
        tanh = _base(act) == "gelu" and _argument(act, 1, "approximate", "none") == "tanh"
        new = replace(
            last, target=GATED_OP, args=(gate, up, "gelu_tanh" if tanh else _base(act)), kwargs=(),
            saved=_kept(chains, out, gate.name, up.name), saved_extra_bytes=0,
        )
        chains.replace(last, new, (act,))
        return True
    return False


def _cross_entropy(chains: _Chains, loss: Op) -> bool:
    """A loss of (rows, classes) and class numbers, whose logits are cast to float32, reshaped, and read by it alone."""
    logits, target = loss.args[:2]
    between: list[Op] = []
    while (view := chains.made_by(logits, *_VIEWS)) is not None:
        between.append(view)
        logits = view.args[0]
    cast = chains.made_by(logits, "to", "_to_copy")
    if cast is None or not isinstance(target, Ref) or chains.info[target.name].dtype != "int64":
        return False
    reduction = _argument(loss, 3, "reduction", MEAN)
    if _argument(loss, 2, "weight", None) is not None or _argument(loss, 5, "label_smoothing", 0.0) != 0.0:
        return False
    seen = chains.info[loss.operands[0]]
    source, _ = _before_cast(chains, cast.outputs[0])
    if reduction not in (MEAN, SUM) or len(seen.shape) != 2 or source == cast.outputs[0]:
        return False
    # The views are then of the logits as they are.
    narrow = chains.info[source].dtype
    first = between[-1] if between else loss
    data: Arg = Ref(source)
    for view in between:
        chains.info[view.outputs[0]] = replace(chains.info[view.outputs[0]], dtype=narrow)
    chains.replace(first, replace(first, args=(data, *first.args[1:])), (cast,))
    last = chains.ops[loss.name]
    kept = 4 * seen.numel if chains.info[loss.outputs[0]].requires_grad else 0
    new = replace(
        last, target=CROSS_ENTROPY_OP,
        args=(last.args[0], target, None, reduction, _argument(loss, 4, "ignore_index", -100), 0.0), kwargs=(),
        saved=_kept(chains, chains.info[loss.outputs[0]], target.name), saved_extra_bytes=kept,
    )
    chains.replace(last, new, ())
    return True
