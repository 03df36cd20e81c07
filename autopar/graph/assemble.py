"""From lifted programs to the ModelGraph: the chain of blocks, their classes, and the shared ops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from autopar.errors import CaptureError
from autopar.graph.lift import Call, Leaf, Lifted
from autopar.graph.model_graph import Arg, Block, BlockClass, Op, Ref, TensorInfo


@dataclass(frozen=True, kw_only=True)
class BlockProgram:
    """A block class with what binds it: `used_inputs` are the positions of the call's tensors that it reads."""

    cls: BlockClass
    used_inputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BoundBlock:
    """What assembling needs of one recorded call: its program and the global names of its params and buffers."""

    name: str
    program: BlockProgram
    params: tuple[str, ...]
    buffers: tuple[str, ...]


def is_random(op: Op) -> bool:
    """Whether the op draws random numbers."""
    overload = overload_of(op.target)
    return torch.Tag.nondeterministic_seeded in overload.tags


def mutates(op: Op) -> bool:
    """Whether the op writes into one of its operands (only buffers' updates are left after capture)."""
    return bool(overload_of(op.target)._schema.is_mutable)


def overload_of(target: str) -> torch._ops.OpOverload:
    """torch's operator by its name, "aten.linear.default"."""
    namespace, name, overload = target.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    assert isinstance(found, torch._ops.OpOverload)
    return found


def build_class(name: str, ops: Iterable[Op], leaves: Mapping[str, tuple[str, str]], info: Mapping[str, TensorInfo],
                outputs: tuple[str, ...]) -> tuple[BlockClass, dict[str, str]]:
    """The class of these ops, with unneeded ops dropped, and the map from the old names to the class's.

    `leaves` maps a name to (kind, local name), kind "param", "buffer" or "input", in the order that the class lists
    them. `outputs` may repeat a name or name a leaf: an alias op then makes a tensor of its own.
    """
    kept = _needed(tuple(ops), outputs)
    names: dict[str, str] = {}
    taken = {local for _, local in leaves.values()}
    read = {operand for op in kept for operand in op.operands} | {out for out in outputs if out in leaves}
    for old, (_, local) in leaves.items():
        if old in read:
            names[old] = local
    renamed = [_rename(op, names, taken) for op in kept]
    final: list[str] = []
    for number, out in enumerate(outputs):
        if out in leaves or names[out] in final:
            copy = f"%alias.{number}"
            op = Op(name="alias", target="aten.alias.default", args=(Ref(out),), outputs=(copy,))
            renamed.append(_rename(op, names, taken))
            info = {**info, copy: info[out]}
            out = copy
        final.append(names[out])
    kinds = {kind: tuple(names[old] for old, (known, _) in leaves.items() if known == kind and old in names)
             for kind in ("input", "param", "buffer")}
    seen: dict[str, TensorInfo] = {}
    for old, local in names.items():
        if old in info:
            seen.setdefault(local, replace(info[old], name=local))
    used = set(kinds["input"]) | set(kinds["param"]) | set(kinds["buffer"]) | {o for op in renamed for o in op.outputs}
    built = BlockClass(
        name=name, inputs=kinds["input"], params=kinds["param"], buffers=kinds["buffer"], outputs=tuple(final),
        ops=tuple(renamed), tensors=tuple(item for local, item in seen.items() if local in used),
    )
    return built, names


def _needed(ops: tuple[Op, ...], outputs: tuple[str, ...]) -> tuple[Op, ...]:
    """The ops whose results are read, or that update a buffer; unread outputs get the name ""."""
    read = set(outputs)
    kept: list[Op] = []
    for op in reversed(ops):
        if mutates(op) or any(out in read for out in op.outputs):
            read.update(op.operands)
            kept.append(op)
    kept.reverse()
    read = set(outputs) | {operand for op in kept for operand in op.operands}
    read |= {name for op in kept for name in op.saved}
    return tuple(replace(op, outputs=tuple(out if out in read else "" for out in op.outputs)) for op in kept)


def _rename(op: Op, names: dict[str, str], taken: set[str]) -> Op:
    base = op.name
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    outputs: list[str] = []
    for index, out in enumerate(op.outputs):
        if out:
            names[out] = name if len(op.outputs) == 1 else f"{name}.{index}"
            taken.add(names[out])
        outputs.append(names[out] if out else "")
    return replace(
        op, name=name, outputs=tuple(outputs), args=tuple(_rename_arg(arg, names) for arg in op.args),
        kwargs=tuple((key, _rename_arg(arg, names)) for key, arg in op.kwargs),
        saved=tuple(names[saved] for saved in op.saved if saved in names),
    )


def _rename_arg(arg: Arg, names: Mapping[str, str]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(names[arg.name])
    if isinstance(arg, tuple):
        return tuple(_rename_arg(item, names) for item in arg)
    return arg


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The classes and blocks of a model, its shared block and the global name of its loss."""

    classes: tuple[BlockClass, ...]
    blocks: tuple[Block, ...]
    shared: Block
    loss: str


def assemble(outer: Lifted, bound: list[BoundBlock]) -> Chain:
    """Splits the outer program at its block calls and binds everything to global names."""
    outer = _with_aliases(_without_dead_ops(outer, bound))
    elements, shared_ops = _split(outer)
    global_name: dict[str, str] = {name: leaf.name for name, leaf in outer.leaves.items()}
    classes: dict[str, BlockClass] = {}
    for element in (block.program.cls for block in bound):
        classes.setdefault(element.name, element)
    loss = outer.outputs[0]

    order: list[tuple[str, list[Op | Call]]] = [("shared", list(shared_ops)), *elements]
    later: list[set[str]] = []
    wanted = {loss}
    for _, items in reversed(order):
        later.append(set(wanted))
        wanted |= {name for item in items for name in item.operands}
    later.reverse()

    blocks: list[Block] = []
    shared: Block | None = None
    by_content: dict[object, str] = {}
    for (name, items), needed_later in zip(order, later, strict=True):
        if len(items) == 1 and isinstance(items[0], Call):
            call = items[0]
            block = bound[call.index]
            outputs = tuple(f"{block.name}/{local}" for local in block.program.cls.outputs)
            global_name.update(zip(call.outputs, outputs, strict=True))
            blocks.append(Block(
                name=block.name, cls=block.program.cls.name, params=block.params, buffers=block.buffers,
                inputs=tuple(global_name[operand] for operand in call.operands), outputs=outputs))
            continue
        ops = [item for item in items if isinstance(item, Op)]
        block_, cls = _element(name, ops, outer, needed_later, global_name)
        content = replace(cls, name="")
        cls_name = by_content.setdefault(content, name)
        if cls_name == name:
            classes[name] = cls
        block_ = replace(block_, cls=cls_name)
        if name == "shared":
            shared = block_
        elif block_.outputs or block_.params or any(mutates(op) for op in cls.ops):
            blocks.append(block_)
            _check_writes(block_, cls, outer, bound, order)
    assert shared is not None
    used_classes = {block.cls for block in blocks} | {shared.cls}
    return _without_unread_outputs(Chain(
        classes=tuple(cls for name, cls in classes.items() if name in used_classes), blocks=tuple(blocks),
        shared=shared, loss=global_name[loss]))


def _without_unread_outputs(chain: Chain) -> Chain:
    """The chain without outputs that no block of their class hands on, as attention weights that a layer returns.

    With an output go the ops that only it needs, and what only those read; that may leave more outputs unread.
    """
    while True:
        read = {chain.loss, *(name for block in chain.blocks for name in block.inputs)}
        kept: dict[str, set[int]] = {}
        for block in chain.blocks:
            kept.setdefault(block.cls, set()).update(i for i, out in enumerate(block.outputs) if out in read)
        smaller = {
            cls.name: _with_outputs(cls, kept[cls.name]) for cls in chain.classes
            if 0 < len(kept.get(cls.name, ())) < len(cls.outputs)
        }
        if not smaller:
            return chain
        classes = {cls.name: cls for cls in chain.classes}
        blocks = tuple(
            _like_class(block, classes[block.cls], smaller[block.cls]) if block.cls in smaller else block
            for block in chain.blocks
        )
        chain = replace(chain, classes=tuple(smaller.get(cls.name, cls) for cls in chain.classes), blocks=blocks)


def _with_outputs(cls: BlockClass, positions: set[int]) -> BlockClass:
    """The class with these of its outputs and what they need."""
    outputs = tuple(out for i, out in enumerate(cls.outputs) if i in positions)
    ops = _needed(cls.ops, outputs)
    read = {operand for op in ops for operand in op.operands} | set(outputs)
    used = read | {out for op in ops for out in op.outputs}
    inputs, params, buffers = (
        tuple(name for name in names if name in read) for names in (cls.inputs, cls.params, cls.buffers)
    )
    return replace(cls, inputs=inputs, params=params, buffers=buffers, outputs=outputs, ops=ops,
                   tensors=tuple(info for info in cls.tensors if info.name in used))


def _like_class(block: Block, before: BlockClass, after: BlockClass) -> Block:
    """The block with the names of what its class still has."""
    def left(own: tuple[str, ...], locals_before: tuple[str, ...], locals_after: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name, local in zip(own, locals_before, strict=True) if local in locals_after)

    return replace(
        block, inputs=left(block.inputs, before.inputs, after.inputs),
        params=left(block.params, before.params, after.params),
        buffers=left(block.buffers, before.buffers, after.buffers),
        outputs=left(block.outputs, before.outputs, after.outputs),
    )


def _check_writes(block: Block, cls: BlockClass, outer: Lifted, bound: list[BoundBlock],
                  order: list[tuple[str, list[Op | Call]]]) -> None:
    """CaptureError where another block reads a buffer that this one writes: in another stage it would have a copy."""
    name_of = dict(zip(cls.buffers, block.buffers, strict=True))
    written = {op.args[0].name: op for op in cls.ops if mutates(op) and isinstance(op.args[0], Ref)}
    for local, op in written.items():
        buffer = name_of.get(local)
        for other, items in order:
            read = {outer.leaves[name].name for item in items for name in item.operands if name in outer.leaves}
            read |= {name for item in items if isinstance(item, Call) for name in bound[item.index].buffers}
            if other != block.name and buffer in read:
                place = f" at {op.source}" if op.source else ""
                raise CaptureError(f"buffer {buffer} is written{place}, in the {block.name}, and read in the {other}; "
                                   "write it where it is read, or keep it out of the forward")


def _without_dead_ops(outer: Lifted, bound: list[BoundBlock]) -> Lifted:
    """The outer program without ops that neither the loss nor a block reads; calls keep the operands that are used."""
    read = set(outer.outputs)
    kept: list[Op | Call] = []
    for item in reversed(outer.items):
        if isinstance(item, Call):
            used = bound[item.index].program.used_inputs
            item = replace(item, operands=tuple(item.operands[position] for position in used))
            read.update(item.operands)
        elif mutates(item) or any(out in read for out in item.outputs):
            read.update(item.operands)
        else:
            continue
        kept.append(item)
    return replace(outer, items=tuple(reversed(kept)))


def _with_aliases(outer: Lifted) -> Lifted:
    """The program with an alias in the place of each parameter or buffer of the model that a block takes as an input.

    Between blocks pass activations alone, and such an alias is one.
    """
    items: list[Op | Call] = []
    info, owner, known = dict(outer.info), dict(outer.owner), dict[str, str]()
    for item in outer.items:
        if isinstance(item, Call):
            for operand in dict.fromkeys(item.operands):
                leaf = outer.leaves.get(operand)
                if leaf is None or leaf.kind == "input" or operand in known:
                    continue
                name = known[operand] = f"%leaf.{len(known)}"
                info[name], owner[name] = replace(info[operand], name=name), owner[operand]
                items.append(Op(name="alias", target="aten.alias.default", args=(Ref(operand),), outputs=(name,)))
            item = replace(item, operands=tuple(known.get(operand, operand) for operand in item.operands))
        items.append(item)
    return replace(outer, items=tuple(items), info=info, owner=owner)


def _element(name: str, ops: list[Op], outer: Lifted, needed_later: set[str],
             global_name: dict[str, str]) -> tuple[Block, BlockClass]:
    """The class and the block of outer ops; adds its outputs to `global_name`."""
    produced = {out for op in ops for out in op.outputs if out}
    arriving = {outer.owner[operand]: operand for op in ops for operand in op.operands if operand not in produced}
    ops = [replace(op, saved=tuple(name if name in produced else arriving.get(name, name) for name in op.saved))
           for op in ops]
    outputs = tuple(out for op in ops for out in op.outputs if out in needed_later)
    leaves: dict[str, tuple[str, str]] = {}
    count = 0
    for operand in dict.fromkeys(operand for op in ops for operand in op.operands if operand not in produced):
        leaf = outer.leaves.get(operand)
        kind = "input" if leaf is None or leaf.kind == "input" else "param" if leaf.kind == "param" else "buffer"
        if leaf is not None:
            leaves[operand] = (kind, leaf.name)
        else:
            leaves[operand] = (kind, f"input_{count}")
            count += 1
    cls, names = build_class(name, ops, leaves, outer.info, outputs)
    old = {local: before for before, local in names.items()}
    for out, local in zip(outputs, cls.outputs, strict=True):
        global_name[out] = f"{name}/{local}"

    def globals_of(locals_: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(global_name[old[local]] for local in locals_)

    block = Block(name=name, cls=name, inputs=globals_of(cls.inputs), params=globals_of(cls.params),
                  buffers=globals_of(cls.buffers), outputs=tuple(f"{name}/{local}" for local in cls.outputs))
    return block, cls


def _split(outer: Lifted) -> tuple[list[tuple[str, list[Op | Call]]], list[Op]]:
    """The chain's elements in order, each a name with its ops or its one call, and the shared ops."""
    num_calls = sum(isinstance(item, Call) for item in outer.items)
    place: dict[int, int] = {}  # number of an item -> 2 * (calls before it) for ops, 2 * its own number + 1 for calls
    calls = 0
    for number, item in enumerate(outer.items):
        if isinstance(item, Call):
            place[number] = 2 * calls + 1
            calls += 1
        else:
            place[number] = 2 * calls
    movable = _movable(outer)
    needs: dict[str, set[int]] = {}
    for number in range(len(outer.items) - 1, -1, -1):
        item = outer.items[number]
        if number in movable:
            readers = {where for out in item.outputs for where in needs.get(out, ())}
            if len(readers) == 1:
                place[number] = next(iter(readers))
            elif readers:
                place[number] = -1
        else:
            readers = {place[number]}
        for operand in item.operands:
            needs.setdefault(operand, set()).update(readers)
    elements: dict[int, list[Op | Call]] = {}
    shared: list[Op] = []
    for number, item in enumerate(outer.items):
        where = place[number]
        if where == -1:
            assert isinstance(item, Op)
            shared.append(item)
        elif where % 2 and isinstance(item, Op):
            shared.append(item)  # read by one block call alone, which is not the op's to join
        else:
            elements.setdefault(where, []).append(item)

    def name_of(where: int) -> str:
        if num_calls == 0:
            return "model"
        if where == 0:
            return "prologue"
        return "epilogue" if where == 2 * num_calls else f"glue.{where // 2}"

    return [(name_of(where), elements[where]) for where in sorted(elements)], shared


def _movable(outer: Lifted) -> set[int]:
    """Numbers of the ops without gradient, parameters or randomness that depend on the batch and constants alone."""
    written = {op.args[0].name for op in outer.items
               if isinstance(op, Op) and mutates(op) and isinstance(op.args[0], Ref)}
    free = {name for name, leaf in outer.leaves.items() if leaf.kind != "param" and name not in written}
    found: set[int] = set()
    for number, item in enumerate(outer.items):
        if isinstance(item, Call) or mutates(item) or is_random(item):
            continue
        if any(outer.info[out].requires_grad for out in item.outputs if out):
            continue
        if all(operand in free for operand in item.operands):
            found.add(number)
            free.update(out for out in item.outputs if out)
    return found


def leaf_bindings(leaves: Mapping[str, Leaf]) -> dict[str, tuple[str, str]]:
    """`build_class`'s leaves of a block's own program; lifted constants count as buffers."""
    return {name: ("buffer" if leaf.kind == "constant" else leaf.kind, leaf.name) for name, leaf in leaves.items()}


