"""From an exported program to Ops: cleaned of what only tracing needed, free of in-place writes, and measured.

Every op runs once on fake tensors with gradients on, in order; that gives shapes, which tensors carry a gradient,
FLOPs and what autograd keeps. What is cleaned on the way: assertions, aliases, `to` and `dropout` that do nothing,
no_grad regions (their inputs are detached), autocast regions (their casts become ops), in-place ops (their functional
twin where no other name of the memory is read later; a write into a slice becomes a scatter into its base).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from autopar.errors import CaptureError
from autopar.graph.autocast import cast_before, is_cast
from autopar.graph.explain import NO_TRANSFORMS, short_source
from autopar.graph.measure import Measured, measure, storage_key
from autopar.graph.model_graph import Arg, Literal, Op, Ref, TensorInfo
from autopar.graph.record import BlockCall
from autopar.graph.stretches import Stretch

_ASSERTIONS = ("aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default",
               "aten.sym_constrain_range_for_size.default", "aten.sym_constrain_range.default")
_ALIASES = ("aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default",
            "aten.detach_.default", "aten.detach.default")
_LITERALS = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout",
             torch.memory_format: "memory_format"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A tensor that a program starts from: kind "param", "buffer", "constant" or "input"."""

    kind: str
    name: str
    requires_grad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A block's call inside the outer program; `index` is its number in the recording."""

    index: int
    operands: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Lifted:
    """Ops (and block calls) in order. Names are unique inside; `leaves` maps names to what they stand for.

    `owner` maps a tensor's name to the name of the first tensor that lies in the same memory.
    """

    items: tuple[Op | Call, ...]
    leaves: dict[str, Leaf]
    info: dict[str, TensorInfo]
    owner: dict[str, str]
    outputs: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Value:
    name: str
    fake: Tensor
    slice_of: tuple[_Value, Any, tuple[Any, ...]] | None = None  # base, target, the args after the base


@dataclass(slots=True)
class _Step:
    """One instruction of the flattened program: an op node, or the binding of a node to others' values."""

    node: fx.Node
    bind: tuple[fx.Node, ...] | None = None
    detach: bool = False
    packs: bool = False
    autocasts: bool = False
    uses: list[fx.Node] = field(default_factory=list)


def lift(program: ExportedProgram, leaves: list[Leaf], mode: FakeTensorMode, *, calls: list[BlockCall] | None = None,
         stretches: Mapping[int, Stretch] | None = None, prefix: str = "model", where: str = "") -> Lifted:
    """The program's ops. `leaves` describes its placeholders in order; `prefix` is stripped from module paths.

    `calls` are the model's block calls; those inside of `stretches` are put in before the last one of each. `where` is
    the FQN of the block that the program is, for messages.
    """
    return _Lifter(program, leaves, mode, calls or [], stretches or {}, prefix, where).run()


class _Lifter:
    def __init__(self, program: ExportedProgram, leaves: list[Leaf], mode: FakeTensorMode, calls: list[BlockCall],
                 stretches: Mapping[int, Stretch], prefix: str, where: str):
        self.program, self.given, self.mode, self.calls, self.stretches = program, leaves, mode, calls, stretches
        self.prefix, self.where = prefix, where
        self.env: dict[fx.Node, Any] = {}
        self.items: list[Op | Call] = []
        self.leaves: dict[str, Leaf] = {}
        self.info: dict[str, TensorInfo] = {}
        self.owner: dict[int, str] = {}  # storage -> name of the first tensor in it
        self.owner_of: dict[str, str] = {}
        self.alive: list[Tensor] = []  # keeps storages from being reused
        self.count = 0
        self.last_use: dict[fx.Node, int] = {}
        self.position = 0

    def run(self) -> Lifted:
        graph = self.program.graph_module.graph
        steps = list(self._flatten(graph, self.program.graph_module))
        for number, step in enumerate(steps):
            for used in step.uses:
                self.last_use[used] = number
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(self.given)
        with self.mode:
            for node, leaf in zip(placeholders, self.given, strict=True):
                self._leaf(node, leaf)
            for number, step in enumerate(steps):
                self.position = number
                if step.bind is not None:
                    self._bind(step)
                elif step.node.op != "output":
                    self._node(step.node, step.autocasts)
        (result,) = (node for node in graph.nodes if node.op == "output")
        outputs = tuple(self.env[node].name for node in result.args[0])
        return Lifted(items=tuple(self.items), leaves=self.leaves, info=self.info, owner=self.owner_of,
                      outputs=outputs)

    # -- the flat program ------------------------------------------------------------------------------------------

    def _flatten(self, graph: fx.Graph, owner: torch.nn.Module, autocasts: bool = False) -> Iterator[_Step]:
        """The nodes in order with the bodies of grad-mode and autocast regions in the place of their calls."""
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr", "call_module"):
                continue
            name = getattr(node.target, "_name", "") if not isinstance(node.target, str) else ""
            if node.op == "call_function" and name.startswith("wrap_with_"):
                yield from self._flatten_region(node, name, owner, autocasts)
                continue
            yield _Step(node, autocasts=autocasts, uses=list(node.all_input_nodes))

    def _flatten_region(self, node: fx.Node, name: str, owner: torch.nn.Module, autocasts: bool) -> Iterator[_Step]:
        enabled, body = node.args[0], node.args[1]
        if name == "wrap_with_autocast":
            enabled, body = node.args[2], node.args[4]
            autocasts = bool(enabled)
        assert isinstance(body, fx.Node)
        region = getattr(owner, str(body.target))
        operands = node.args[5 if name == "wrap_with_autocast" else 2:]
        detach = name == "wrap_with_set_grad_enabled" and not enabled
        inside = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        for inner, outer in zip(inside, operands, strict=True):
            assert isinstance(outer, fx.Node)
            yield _Step(inner, bind=(outer,), detach=detach, uses=[outer])
        for step in self._flatten(region.graph, region, autocasts):
            if step.node.op != "output" or step.node.graph is not region.graph:
                yield step
                continue
            results = tuple(cast("tuple[fx.Node, ...]", step.node.args[0]))
            yield _Step(node, bind=results, packs=True, uses=list(results))

    def _bind(self, step: _Step) -> None:
        assert step.bind is not None
        if step.packs:
            self.env[step.node] = [self.env[node] for node in step.bind]
            return
        value = self.env[step.bind[0]]
        if step.detach and value.fake.requires_grad:
            value = self._emit(step.bind[0], torch.ops.aten.detach.default, (value,), {})
        self.env[step.node] = value

    # -- values ----------------------------------------------------------------------------------------------------

    def _leaf(self, node: fx.Node, leaf: Leaf) -> None:
        traced = node.meta["val"]
        if not isinstance(traced, Tensor):
            return  # a number among the inputs is a constant of the program
        fake = torch.empty_strided(tuple(traced.shape), traced.stride(), dtype=traced.dtype, device=traced.device)
        value = self._value(fake.requires_grad_(leaf.requires_grad))
        self.leaves[value.name] = leaf
        self.env[node] = value

    def _value(self, fake: Tensor) -> _Value:
        name = f"%{self.count}"
        self.count += 1
        self.alive.append(fake)
        self.owner_of[name] = self.owner.setdefault(storage_key(fake), name)
        self.info[name] = TensorInfo(name=name, shape=tuple(fake.shape), dtype=str(fake.dtype).removeprefix("torch."),
                                     requires_grad=fake.requires_grad)
        return _Value(name, fake)

    def _node(self, node: fx.Node, autocasts: bool) -> None:
        target = node.target
        if target is operator.getitem:
            container, index = cast("tuple[fx.Node, int]", node.args)
            self.env[node] = self.env[container][index]
            return
        if "functorch" in str(getattr(target, "__module__", "")):
            raise CaptureError(f"{self._place(node)}: {NO_TRANSFORMS}")
        if not isinstance(target, torch._ops.OpOverload):
            raise CaptureError(f"{self._place(node)}: {getattr(target, '__name__', target)} cannot be captured; "
                               "rewrite it with plain tensor ops")
        name = str(target)
        if name == "autopar.block.default":
            self._call(node)
            return
        if name in _ASSERTIONS:
            return
        args = self._resolve(node.args)
        kwargs = self._resolve(dict(node.kwargs))
        if self._does_nothing(name, args):
            self.env[node] = args[0]
        elif target._schema.is_mutable:
            self._in_place(node, target, args, kwargs)
        else:
            if autocasts:
                args, kwargs = self._autocast(node, target, args, kwargs)
            value = self._emit_view(node, target, args) if name == "aten.view.default" else self._emit(
                node, target, args, kwargs)
            if name.startswith("aten.to.") and value.fake is args[0].fake and not value.fake.is_floating_point():
                self.items.pop()
                value = args[0]
            self.env[node] = value

    def _autocast(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The operands as autocast casts them before this op."""
        dtype = cast_before(target, _fakes(args), _fakes(kwargs), node.meta.get("val"))

        def as_cast(tree: Any) -> Any:
            if isinstance(tree, _Value):
                if not is_cast(tree.fake) or tree.fake.dtype == dtype:
                    return tree
                return self._emit(node, torch.ops.aten.to.dtype, (tree, dtype), {})
            if isinstance(tree, (tuple, list)):
                return type(tree)(as_cast(item) for item in tree)
            return tree

        if dtype is None:
            return args, kwargs
        return as_cast(args), {key: as_cast(value) for key, value in kwargs.items()}

    @staticmethod
    def _does_nothing(name: str, args: tuple[Any, ...]) -> bool:
        if name == "aten.dropout.default":
            return not args[2] or args[1] == 0
        return name in _ALIASES and not (name.startswith("aten.detach") and args[0].fake.requires_grad)

    def _resolve(self, tree: Any) -> Any:
        if isinstance(tree, fx.Node):
            return self.env[tree]
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._resolve(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._resolve(item) for key, item in tree.items()}
        return tree

    def _emit_view(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> Any:
        """A view; a reshape where the tensor is laid out in another way than in the trace.

        A contiguous() before it is not recorded inside of torch's own Python functions, where it changed nothing.
        """
        try:
            return self._emit(node, target, args, {})
        except (RuntimeError, ValueError):
            return self._emit(node, torch.ops.aten.reshape.default, args, {})

    def _emit(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the op, writes it down, and returns its value or values."""
        measured = measure(target, _fakes(args), _fakes(kwargs))
        result = measured.result
        many = isinstance(result, (tuple, list))
        values = [self._value(out) if isinstance(out, Tensor) else None for out in (result if many else [result])]
        saved, extra = self._saved(measured)
        self.items.append(Op(
            name=target._schema.name.split("::")[-1], target=str(target), args=tuple(self._arg(arg) for arg in args),
            kwargs=tuple((key, self._arg(value)) for key, value in kwargs.items()),
            outputs=tuple(value.name if value is not None else "" for value in values),
            module=self._module(node), source=short_source(node.meta.get("stack_trace")),
            flops=measured.flops, backward_flops=measured.backward_flops, saved=saved, saved_extra_bytes=extra,
        ))
        if not many and values[0] is not None and str(target) in ("aten.slice.Tensor", "aten.select.int"):
            values[0].slice_of = (args[0], target, args[1:])
        return values if many else values[0]

    def _saved(self, measured: Measured) -> tuple[tuple[str, ...], int]:
        names: dict[str, None] = {}
        unknown: dict[int, int] = {}
        for tensor in measured.saved:
            key = storage_key(tensor)
            owner = self.owner.get(key)
            if owner is None:
                unknown[key] = tensor.untyped_storage().nbytes()
            elif owner not in self.leaves or self.leaves[owner].kind == "input":
                names[owner] = None
        self.alive.extend(measured.saved)
        return tuple(names), measured.extra_bytes + sum(unknown.values())

    def _arg(self, value: Any) -> Arg:
        if isinstance(value, _Value):
            return Ref(value.name)
        if isinstance(value, (tuple, list)):
            return tuple(self._arg(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        for kind, word in _LITERALS.items():
            if isinstance(value, kind):
                return Literal(word, str(value).removeprefix("torch."))
        raise CaptureError(f"{self.where or 'the model'}: an op takes a {type(value).__name__}, which cannot be "
                           "captured")

    # -- blocks and in-place ops -----------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        operands, last = self._resolve(node.args)
        stretch = self.stretches.get(last)
        taken = operands
        for index in range(stretch.first + 1 if stretch is not None else last, last + 1):
            values = [self._value(meta.make()) for meta in self.calls[index].outputs]
            self.items.append(Call(index=index, operands=tuple(value.name for value in taken),
                                   outputs=tuple(value.name for value in values)))
            taken = stretch.inputs(operands, values) if stretch is not None else ()
        self.env[node] = values

    def _in_place(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "out" in kwargs and _without_out(target) is not None:  # what is written is copied into what `out` is
            given = {key: value for key, value in kwargs.items() if key != "out"}
            copied = self._emit(node, _without_out(target), args, given)
            self._in_place(node, torch.ops.aten.copy_.default, (kwargs["out"], copied), {})
            return
        written = args[0]
        leaf = self.leaves.get(self.owner[storage_key(written.fake)])
        if leaf is not None and leaf.kind == "buffer":
            # A buffer keeps its new value after the step; the op stays in place. Its twin gives the result's shape.
            self._emit(node, target, args, kwargs)
            self.env[node] = written
            return
        if leaf is not None:
            raise CaptureError(f"{self._place(node)}: {target} writes into the {leaf.kind} {leaf.name!r}; "
                               "write into a copy (clone) of it")
        if target._schema.name == "aten::copy_":
            value = self._copied(node, written, args[1])
            self._replace(node, written, value)
            self.env[node] = value
            return
        twin = _functional(target)
        if twin is None:
            raise CaptureError(f"{self._place(node)}: the in-place {target} has no functional twin; rewrite the line")
        value = self._emit(node, twin, args, kwargs)
        if value.fake.shape != written.fake.shape or value.fake.dtype != written.fake.dtype:
            value = self._emit(node, torch.ops.aten.to.dtype, (value, written.fake.dtype), {})
            if value.fake.shape != written.fake.shape:
                raise CaptureError(f"{self._place(node)}: the in-place {target} changes its target's shape")
        self._replace(node, written, value)
        self.env[node] = value

    def _copied(self, node: fx.Node, written: _Value, source: _Value) -> _Value:
        """What `written` holds after `written.copy_(source)` (aten.copy itself has no derivative)."""
        value: _Value = source
        if value.fake.dtype != written.fake.dtype:
            value = self._emit(node, torch.ops.aten.to.dtype, (value, written.fake.dtype), {})
        if value.fake.shape != written.fake.shape:
            value = self._emit(node, torch.ops.aten.expand.default, (value, list(written.fake.shape)), {})
        return self._emit(node, torch.ops.aten.clone.default, (value,), {}) if value is source else value

    def _replace(self, node: fx.Node, written: _Value, value: _Value) -> None:
        """Lets every later reader of `written` see `value`, and every slice's base the written slice."""
        key = storage_key(written.fake)
        bases = [written]
        while bases[-1].slice_of is not None:
            bases.append(bases[-1].slice_of[0])
        for other in self._live():
            if other not in bases and other is not value and storage_key(other.fake) == key:
                raise CaptureError(f"{self._place(node)}: an in-place write to memory that is also read through a "
                                   "view; use the out-of-place op")
        live = self._live()
        for view in bases:
            for known, bound in self.env.items():
                if bound is view:
                    self.env[known] = value
            if view.slice_of is None or not any(base in live for base in bases[bases.index(view) + 1:]):
                break
            base, target, rest = view.slice_of
            scatter = {"aten.slice.Tensor": torch.ops.aten.slice_scatter.default,
                       "aten.select.int": torch.ops.aten.select_scatter.default}[str(target)]
            value = self._emit(node, scatter, (base, value, *rest), {})

    def _live(self) -> list[_Value]:
        """The values that a later step reads."""
        live: list[_Value] = []
        for node, bound in self.env.items():
            if self.last_use.get(node, -1) > self.position:
                live.extend(bound if isinstance(bound, list) else [bound])
        return [value for value in live if value is not None]

    # -- places ----------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        return str(path).removeprefix(self.prefix).lstrip(".")

    def _place(self, node: fx.Node) -> str:
        module = ".".join(part for part in (self.where, self._module(node)) if part) or "the model"
        source = short_source(node.meta.get("stack_trace"))
        return f"{module} ({source})" if source else module


def _fakes(tree: Any) -> Any:
    if isinstance(tree, _Value):
        return tree.fake
    if isinstance(tree, (tuple, list)):
        return type(tree)(_fakes(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _fakes(item) for key, item in tree.items()}
    return tree


def _without_out(target: Any) -> Any:
    """The overload that returns what this one writes into its `out`: div.out -> div.Tensor; None if there is none."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    wanted = [(arg.name, str(arg.type)) for arg in target._schema.arguments if arg.name != "out"]
    found = (getattr(packet, overload) for overload in packet.overloads())
    return next((one for one in found if not one._schema.is_mutable
                 and [(arg.name, str(arg.type)) for arg in one._schema.arguments] == wanted), None)


def _functional(target: Any) -> Any:
    """The out-of-place overload of an in-place op, or None: add_.Tensor -> add.Tensor, zero_ -> zeros_like."""
    namespace, _, name = target._schema.name.partition("::")
    if name == "zero_":
        return torch.ops.aten.zeros_like.default
    if str(target) == "aten.bernoulli_.float":
        return torch.ops.aten.bernoulli.p
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = target._overloadname
    found = getattr(packet, overload, None) if packet is not None else None
    return None if found is None or found._schema.is_mutable else found
