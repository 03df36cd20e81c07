"""Rewrites: other ops of a block class that compute the same from the same parameters, under the same names.

Linears of one input become one op (`autopar.graph.linears`), as one product or one each; a linear of which only parts
are read becomes a linear for each part, over that part of its weight. A rewritten class has the same inputs,
parameters, buffers and outputs, so that nothing outside of it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.errors import InputError
from autopar.graph.interpret import problem_of, problems_of
from autopar.graph.linears import LINEARS_OP
from autopar.graph.model_graph import BlockClass, ModelGraph, Op, Ref, TensorInfo
from autopar.sharding.rewrite import Rewrite, RewriteKind, rewrite_text
from autopar.sharding.rules.registry import Call, split_lengths

_LINEAR = "aten.linear.default"
_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_SLICE = "aten.slice.Tensor"


def candidates_of(cls: BlockClass) -> tuple[Rewrite, ...]:
    """The rewrites that apply to a class, in the order of its ops; those that its other ops could not take are none.

    (The results of merged linears are not contiguous: a view may need that they are.)
    """
    groups: dict[object, list[Op]] = {}
    for op in cls.ops:
        if _is_plain_linear(cls, op):
            weight = cls.tensor[op.operands[1]]
            groups.setdefault((op.operands[0], len(op.operands), weight.dtype), []).append(op)
    found: list[Rewrite] = []
    for group in groups.values():
        if _are_mergeable(cls, group):
            names = tuple(op.name for op in group)
            found += [Rewrite(kind=kind, cls=cls.name, ops=names)
                      for kind in (RewriteKind.MERGE_LINEARS, RewriteKind.SHARE_INPUT)]
    for op in cls.ops:
        if _is_plain_linear(cls, op) and _parts_read(cls, op):
            found.append(Rewrite(kind=RewriteKind.SPLIT_LINEAR, cls=cls.name, ops=(op.name,)))
    problems = problems_of(cls, [apply_rewrite(cls, rewrite) for rewrite in found])
    return tuple(rewrite for rewrite, problem in zip(found, problems, strict=True) if problem is None)


def apply_rewrite(cls: BlockClass, rewrite: Rewrite) -> BlockClass:
    """The rewritten class. InputError where the rewrite does not apply to it."""
    by_name = {op.name: op for op in cls.ops}
    if rewrite.cls != cls.name or not rewrite.ops or not set(rewrite.ops) <= by_name.keys():
        raise InputError(f"{rewrite_text(rewrite)} does not apply: class {cls.name} has no such ops")
    ops = [by_name[name] for name in rewrite.ops]
    if not all(_is_plain_linear(cls, op) for op in ops):
        raise InputError(f"{rewrite_text(rewrite)} does not apply: they are not all plain linears")
    if rewrite.kind is RewriteKind.SPLIT_LINEAR:
        parts = _parts_read(cls, ops[0]) if len(ops) == 1 else None
        if not parts:
            raise InputError(f"{rewrite_text(rewrite)} does not apply: more is read of it than its parts")
        return split_linear(cls, ops[0], parts)
    alike = len({(op.operands[0], len(op.operands), cls.tensor[op.operands[1]].dtype) for op in ops}) == 1
    if not alike or not _are_mergeable(cls, ops):
        raise InputError(f"{rewrite_text(rewrite)} does not apply: they are not linears of one input")
    return merge_linears(cls, ops, joined=rewrite.kind is RewriteKind.MERGE_LINEARS)


_KEPT = 64
_rewritten: dict[tuple[int, tuple[Rewrite, ...]], tuple[ModelGraph, ModelGraph]] = {}


def rewritten(graph: ModelGraph, rewrites: Sequence[Rewrite]) -> ModelGraph:
    """The graph with its classes rewritten, one rewrite after the other; the same object for the same arguments.

    InputError where one does not apply.
    """
    if not rewrites:
        return graph
    key = id(graph), tuple(rewrites)
    if key not in _rewritten:
        if len(_rewritten) >= _KEPT:
            _rewritten.clear()
        classes = dict(graph.block_class)
        for rewrite in rewrites:
            if rewrite.cls not in classes:
                raise InputError(f"{rewrite_text(rewrite)} does not apply: the model has no such block class")
            classes[rewrite.cls] = apply_rewrite(classes[rewrite.cls], rewrite)
        for name in dict.fromkeys(rewrite.cls for rewrite in rewrites):
            if problem := problem_of(classes[name]):
                raise InputError(f"the rewrites of class {name} do not apply: {problem}")
        changed = replace(graph, classes=tuple(classes[cls.name] for cls in graph.classes))
        # The key holds the graph's id: the graph is kept with the result, so that no id is used again.
        _rewritten[key] = graph, changed
    return _rewritten[key][1]


def rewrite_notes(graph: ModelGraph, rewrites: Sequence[Rewrite]) -> tuple[str, ...]:
    """A line for each rewrite, with the modules that it concerns."""
    words = {
        RewriteKind.MERGE_LINEARS: "run as one product, their weights laid together in every forward",
        RewriteKind.SHARE_INPUT: "add their gradients of the shared input as they are computed",
        RewriteKind.SPLIT_LINEAR: "runs as a product for each of its parts",
    }
    lines, classes = [], dict(graph.block_class)
    for rewrite in rewrites:
        cls = classes[rewrite.cls]
        modules = dict.fromkeys(op.module or op.name for op in cls.ops if op.name in rewrite.ops)
        lines.append(f"rewritten: {', '.join(modules)} of {cls.name} {words[rewrite.kind]}")
        classes[rewrite.cls] = apply_rewrite(cls, rewrite)
    return tuple(lines)


# -- the rewrites ------------------------------------------------------------------------------------------------------


def merge_linears(cls: BlockClass, ops: Sequence[Op], *, joined: bool) -> BlockClass:
    """The class with linears of one input as one op, at the place of the first."""
    names = {op.name for op in ops}
    outputs = tuple(op.outputs[0] for op in ops)
    saved = dict.fromkeys(name for op in ops for name in op.saved)
    if joined and any(set(outputs) & set(op.saved) for op in cls.ops):
        saved |= dict.fromkeys(outputs)  # one storage: whoever keeps one result keeps all
    merged = Op(
        name=_fresh("linears", {op.name for op in cls.ops}), target=LINEARS_OP,
        args=(
            Ref(ops[0].operands[0]), tuple(Ref(op.operands[1]) for op in ops),
            tuple(Ref(op.operands[2]) for op in ops if len(op.operands) > 2), joined,
        ),
        outputs=outputs, module=_common_module([op.module for op in ops]), source=ops[0].source,
        flops=sum(op.flops for op in ops), backward_flops=sum(op.backward_flops for op in ops), saved=tuple(saved),
        saved_extra_bytes=sum(op.saved_extra_bytes for op in ops),
    )
    kept: list[Op] = []
    for op in cls.ops:
        if op.name == ops[0].name:
            kept.append(merged)
        elif op.name not in names:
            kept.append(op)
    return replace(cls, ops=tuple(kept))


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a linear's result: its tensor, and how many columns it has."""

    name: str
    length: int


def split_linear(cls: BlockClass, op: Op, parts: Sequence[_Part]) -> BlockClass:
    """The class with a linear for each part, over views of the weight (and bias)."""
    taken_ops, taken = {item.name for item in cls.ops}, {info.name for info in cls.tensors}
    whole, lengths = op.outputs[0], tuple(part.length for part in parts)
    made: list[Op] = []
    infos: list[TensorInfo] = []
    pieces: list[tuple[str, ...]] = []
    for operand in op.operands[1:]:
        info = cls.tensor[operand]
        own = tuple(_fresh(f"{operand}.{i}", taken) for i in range(len(parts)))
        infos += [
            replace(info, name=name, shape=(length, *info.shape[1:]))
            for name, length in zip(own, lengths, strict=True)
        ]
        pieces.append(own)
        made.append(Op(
            name=_fresh("split_weight", taken_ops | {item.name for item in made}),
            target="aten.split_with_sizes.default", args=(Ref(operand), lengths, 0), outputs=own, module=op.module,
            source=op.source,
        ))
    total = sum(lengths)
    for i, part in enumerate(parts):
        made.append(replace(
            op, name=_fresh(f"{op.name}.{i}", taken_ops), args=(op.args[0], *(Ref(own[i]) for own in pieces)),
            outputs=(part.name,), flops=op.flops * part.length / total,
            backward_flops=op.backward_flops * part.length / total,
        ))
    gone = {reader.name for reader in _readers(cls, whole)}
    ops: list[Op] = []
    for item in cls.ops:
        if item.name == op.name:
            ops += made
        elif item.name not in gone:
            ops.append(item)
    changed = replace(
        cls, ops=tuple(ops), tensors=(*(info for info in cls.tensors if info.name != whole), *infos),
    )
    names = {part.name for part in parts}
    return replace(changed, ops=tuple(
        replace(item, saved=_saved_parts(changed, item, whole, names)) if whole in item.saved else item
        for item in changed.ops
    ))


def _saved_parts(cls: BlockClass, op: Op, whole: str, parts: set[str]) -> tuple[str, ...]:
    """What the op saves where it saved the whole: the parts that it reads, through views."""
    read = [source for name in op.operands if (source := _source(cls, name, parts))]
    own = dict.fromkeys(read or sorted(parts))
    return tuple(dict.fromkeys(item for name in op.saved for item in (own if name == whole else (name,))))


def _source(cls: BlockClass, name: str, wanted: set[str]) -> str | None:
    """The first of the wanted tensors on the way back through ops of one operand."""
    while name not in wanted:
        op = cls.producer.get(name)
        if op is None or len(op.operands) != 1:
            return None
        name = op.operands[0]
    return name


# -- what applies ------------------------------------------------------------------------------------------------------


def _is_plain_linear(cls: BlockClass, op: Op) -> bool:
    """Whether the op is a linear whose weight is a matrix and whose tensors have one dtype."""
    if op.target != _LINEAR or op.kwargs or not op.outputs[0] or not 2 <= len(op.operands) <= 3:
        return False
    infos = [cls.tensor[name] for name in (*op.operands, *op.outputs)]
    return len(infos[1].shape) == 2 and len({info.dtype for info in infos}) == 1


def _are_mergeable(cls: BlockClass, ops: Sequence[Op]) -> bool:
    """Whether linears of one input may run at the place of the first: their weights are there by then."""
    if len(ops) < 2 or len({op.operands[1] for op in ops}) < len(ops):
        return False
    place = [op.name for op in cls.ops].index(ops[0].name)
    late = {name for op in cls.ops[place:] for name in op.outputs}
    return late.isdisjoint(name for op in ops for name in op.operands)


def _readers(cls: BlockClass, name: str) -> list[Op]:
    return [op for op in cls.ops if name in op.operands]


def _parts_read(cls: BlockClass, op: Op) -> tuple[_Part, ...]:
    """The parts of a linear's last dim that are read, in order; none where they are not all of it, each once."""
    whole = op.outputs[0]
    shape = cls.tensor[whole].shape
    readers = _readers(cls, whole)
    if whole in cls.outputs or not readers or any(reader.operands != (whole,) for reader in readers):
        return ()
    found = _split_parts(cls, readers[0], shape) if len(readers) == 1 else _slice_parts(cls, readers, shape)
    good = len(found) > 1 and sum(part.length for part in found) == shape[-1] and all(p.length for p in found)
    return tuple(found) if good else ()


def _split_parts(cls: BlockClass, reader: Op, shape: tuple[int, ...]) -> list[_Part]:
    if reader.target not in _SPLITS or not all(reader.outputs):
        return []
    call = Call(reader, cls.tensor, ("self", "how", "dim"))
    if call.number("dim", 0) % len(shape) != len(shape) - 1:
        return []
    lengths = split_lengths(call, shape, len(shape) - 1)
    return [_Part(*item) for item in zip(reader.outputs, lengths, strict=True)] if (
        len(lengths) == len(reader.outputs)
    ) else []


def _slice_parts(cls: BlockClass, readers: Sequence[Op], shape: tuple[int, ...]) -> list[_Part]:
    """The slices in their order, where each begins where the last ended."""
    found: list[tuple[int, int, str]] = []
    for reader in readers:
        call = Call(reader, cls.tensor, ("self", "dim", "start", "end", "step"))
        good = reader.target == _SLICE and all(isinstance(call.get(n, 0), int) for n in ("dim", "start", "end", "step"))
        if not good or call.number("dim", 0) % len(shape) != len(shape) - 1 or call.number("step", 1) != 1:
            return []
        start = call.number("start", 0)
        start = max(0, start + shape[-1]) if start < 0 else start
        found.append((start, call.output_shape()[-1], reader.outputs[0]))
    found.sort()
    at = 0
    for start, length, _ in found:
        if start != at:
            return []
        at += length
    return [_Part(name, length) for _, length, name in found]


def _fresh(name: str, taken: set[str]) -> str:
    """The name, or with a number after it where it is taken."""
    number = 0
    found = name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _common_module(modules: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    common: list[str] = []
    for words in zip(*(module.split(".") for module in modules), strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common)


