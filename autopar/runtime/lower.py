"""Block classes as callable local programs: one Python function for each class, shared by all its blocks.

The source is generated from the ops: every op runs on this rank's part of its tensors, with a conversion wherever a
tensor is in another state than the op wants, and each tensor is dropped after its last use. The source can be read:
`LoweredClass.source`.
"""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import autopar.graph.kernels  # noqa: F401  # registers its ops
from autopar.graph.expert_params import num_experts
from autopar.graph.experts import EXPERTS_OP
from autopar.graph.model_graph import Arg, BlockClass, Literal, Op, Ref
from autopar.runtime.collectives import Axis, converter
from autopar.runtime.expert_exchange import expert_exchange
from autopar.runtime.loss import Term, ignored_index
from autopar.runtime.lowerings import MEAN, SUM, group_norm, special_program, sum_over_count
from autopar.runtime.recompute import OpGroup, op_groups, recompute
from autopar.sharding.joint import WRAPPING, JointStrategy, Placement, local_joint_op, placement_text
from autopar.sharding.local_args import bias_operand
from autopar.sharding.lowering import Lowering
from autopar.sharding.route import steps, summed_at_once
from autopar.sharding.rules.windows import halo_of
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.attention_core import AttentionCore

Code = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredClass:
    """The program of a class: `code(*params, *buffers, *inputs, *factors)` gives the class's outputs.

    `factors` names the ops whose factor (a 0-dim tensor) the caller passes: what terms of the loss are multiplied with.
    """

    name: str
    code: Code
    source: str
    factors: tuple[str, ...] = ()
    uncompiled: Code | None = None  # where `code` is by torch.compile

    @property
    def eager(self) -> Code:
        """The program as it is written."""
        return self.uncompiled or self.code


def resolve_target(target: str) -> Any:
    """The torch op of "aten.linear.default"."""
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def resolve_literal(literal: Literal, device: torch.device) -> Any:
    """Torch's object for a literal; the captured device gives way to the one that the program runs on."""
    if literal.kind == "device":
        return device
    return getattr(torch, literal.value.removeprefix("torch."))


def _value(arg: Arg, variables: Iterator[str], device: torch.device, constants: dict[str, Any]) -> str:
    """Source text of an argument; `variables` gives those of the operands in their order."""
    if isinstance(arg, Ref):
        return next(variables)
    if isinstance(arg, Literal):
        constants[f"{arg.kind}_{len(constants)}"] = resolve_literal(arg, device)
        return next(reversed(constants))
    if isinstance(arg, tuple):
        return "[" + ", ".join(_value(item, variables, device, constants) for item in arg) + "]"
    if isinstance(arg, float) and repr(arg) in ("inf", "-inf", "nan"):
        return f'float("{arg!r}")'
    return repr(arg)


def _is_single(op: Op) -> bool:
    """Whether the call gives one tensor rather than a tuple or list of them."""
    returns = resolve_target(op.target)._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"


class _Writer:
    """Lines of one program, with the objects that they name."""

    def __init__(self, cls: BlockClass, axes: Sequence[Axis], device: torch.device) -> None:
        self.cls, self.axes, self.device = cls, tuple(axes), device
        self.globals: dict[str, Any] = {}
        self.lines: list[str] = []
        self.functions: list[str] = []  # source texts of what is recomputed
        self.where: dict[tuple[str, Placement], str] = {}  # variable that holds a tensor in a placement
        self.state: dict[str, Placement] = {}
        self.identifiers: dict[str, str] = {}

    def identifier(self, name: str) -> str:
        """A name of Python's for a name of the graph's, one for each."""
        if name not in self.identifiers:
            plain = re.sub(r"\W", "_", name)
            taken = set(self.identifiers.values())
            self.identifiers[name] = plain if plain not in taken else f"{plain}__{len(taken)}"
        return self.identifiers[name]

    def define(self, name: str, variable: str, state: Placement) -> None:
        self.where[name, state] = variable
        self.state[name] = state

    def in_state(self, name: str, wanted: Placement) -> str:
        """The variable that holds the tensor in the wanted placement, converted at first demand."""
        found = self.where.get((name, wanted))
        if found is not None:
            return found
        differentiable = self.cls.tensor[name].requires_grad
        is_large = summed_at_once(self.cls.tensor[name].numel)
        path = steps(self.state[name], wanted, differentiable, is_large)
        assert path is not None, f"no conversion of {name} to {placement_text(wanted)}"
        variable = first = self.where[name, self.state[name]]
        words = ""
        for step in path:
            axes = [self.axes[i] for i in step.axes]
            word = "_".join([axis.name for axis in axes if len(self.axes) > 1] + [str(step.dst)])
            words += "_" + re.sub(r"\W+", "_", word).strip("_")
            convert = converter(step.src, step.dst, axes[0], axes[1:], differentiable=differentiable)
            if convert is None:
                continue
            function, before = f"{step.src.kind}_to{words}_{len(self.globals)}", variable
            variable = first + words
            self.globals[function] = convert
            self.lines.append(f"{variable} = {function}({before})")
        self.where[name, wanted] = variable
        return variable

    def call(self, op: Op, program: Any, inputs: Sequence[Placement], outputs: Sequence[Placement]) -> None:
        variables = iter([self.in_state(name, state) for name, state in zip(op.operands, inputs, strict=True)])
        function = f"op_{self.identifier(op.name)}"
        self.globals[function] = program
        arguments = [_value(arg, variables, self.device, self.globals) for arg in op.args]
        arguments += [f"{key}={_value(arg, variables, self.device, self.globals)}" for key, arg in op.kwargs]
        call = f"{function}({', '.join(arguments)})"
        results = [f"v_{self.identifier(output)}" if output else "" for output in op.outputs]
        comment = f"  # {op.target}" + (f", {op.source}" if op.source else "")
        if _is_single(op):
            self.lines.append(f"{results[0] or '_'} = {call}{comment}")
        else:
            self.lines.append(f"many = {call}{comment}")
            self.lines += [f"{result} = many[{i}]" for i, result in enumerate(results) if result]
            self.lines.append("del many")
        for output, result, state in zip(op.outputs, results, outputs, strict=True):
            if output:
                self.define(output, result, state)


    @contextmanager
    def recomputed(self, group: OpGroup, wanted: Callable[[Op], Sequence[Placement]]) -> Iterator[None]:
        """Makes what is written meanwhile a function that runs again in the backward; its inputs alone are kept.

        Conversions of tensors from outside stay outside, so that no communication of theirs runs again.
        """
        produced = {output for op in group.ops for output in op.outputs if output}
        for op in group.ops:
            for name, state in zip(op.operands, wanted(op), strict=True):
                if name not in produced:
                    self.in_state(name, state)
        outer, before = self.lines, dict(self.where)
        self.lines = []
        yield
        inner, self.lines = self.lines, outer
        results = {name: self.where[name, self.state[name]] for name in group.leaving}
        words = {word for line in inner for word in re.findall(r"\w+", line.split("  # ")[0])}
        arguments = [variable for variable in dict.fromkeys(before.values()) if variable in words]
        self.where = {**before, **{(name, self.state[name]): variable for name, variable in results.items()}}
        function = f"attention_core_{len(self.functions)}"
        lines = _drop_early(inner, arguments, tuple(results.values()))
        self.functions.append(_function(function, arguments, lines, tuple(results.values())))
        self.globals["recompute"] = recompute
        self.lines.append(f"many = recompute({', '.join([function, *arguments])})")
        self.lines += [f"{variable} = many[{i}]" for i, variable in enumerate(results.values())]
        self.lines.append("del many")


def lower_class(
    cls: BlockClass, sharding: ClassSharding | Sequence[ClassSharding] | None, axis: Axis | Sequence[Axis] | None,
    device: torch.device, terms: Mapping[str, Term] | None = None, cores: Sequence[AttentionCore] = (),
    expert_axis: Axis | None = None,
) -> LoweredClass:
    """The program of a class on one rank of the mesh axes inside its stage (none: whole tensors, no sharding).

    There is one sharding an axis, outermost first. `terms` are the loss's terms in this class: a counted cross-entropy
    sums, and terms that are counted or shared are multiplied with the factor that the caller passes under the op's
    name. `cores` are computed again in the backward. `expert_axis`: ranks with other rows, that have
    the class's experts between them.
    """
    terms = terms or {}
    axes = (axis,) if isinstance(axis, Axis) else tuple(axis or ())
    shardings = (sharding,) if isinstance(sharding, ClassSharding) else tuple(sharding or ())
    if math.prod(one.size for one in axes) == 1:
        axes = shardings = ()
    assert len(axes) == len(shardings), f"{len(shardings)} shardings of {cls.name} for {len(axes)} axes"
    writer = _Writer(cls, axes, device)

    def places(word: str) -> list[Placement]:
        if not shardings:
            return [()] * len(getattr(cls, word))
        return list(zip(*(getattr(own, word) for own in shardings), strict=True))

    arguments = []
    for word in ("params", "buffers", "inputs"):
        for name, place in zip(getattr(cls, word), places(word), strict=True):
            arguments.append(f"v_{writer.identifier(name)}")
            writer.define(name, arguments[-1], place)
    factors = tuple(op.name for op in cls.ops if terms.get(op.name) in (Term.COUNT, Term.SHARE))
    arguments += [f"factor_{writer.identifier(name)}" for name in factors]

    def joint(op: Op) -> JointStrategy:
        return tuple(own.strategy[op.name] for own in shardings)

    def wanted(op: Op) -> list[Placement]:
        return list(zip(*(own.inputs for own in joint(op)), strict=True)) if shardings else [()] * len(op.operands)

    def left(op: Op) -> list[Placement]:
        return list(zip(*(own.outputs for own in joint(op)), strict=True)) if shardings else [()] * len(op.outputs)

    for group in op_groups(cls, cores):
        with writer.recomputed(group, wanted) if group.is_core else nullcontext():
            for op in group.ops:
                counted = terms.get(op.name) is Term.COUNT
                called, program = _program(cls, op, joint(op), axes, counted)
                if expert_axis is not None and op.target == EXPERTS_OP:
                    program = partial(
                        expert_exchange, expert_axis, num_experts=num_experts(cls, op), inside=program
                    )
                writer.call(called, program, wanted(op), left(op))
                if op.name in factors:
                    variable = writer.where[op.outputs[0], left(op)[0]]
                    writer.lines.append(f"{variable} = {variable} * factor_{writer.identifier(op.name)}")
    results = [writer.in_state(name, place) for name, place in zip(cls.outputs, places("outputs"), strict=True)]
    lines = _drop_early(writer.lines, arguments, results)
    source = "\n\n".join([*writer.functions, _function(_identifier(cls.name), arguments, lines, results)])
    code = make_function(cls.name, source, writer.globals)
    return LoweredClass(name=cls.name, code=code, source=source, factors=factors)


def _function(name: str, arguments: Sequence[str], lines: Sequence[str], results: Sequence[str]) -> str:
    """The source text of a function."""
    text = "\n    ".join([f"def {name}({', '.join(arguments)}):", *lines])
    return f"{text}\n    return ({''.join(result + ', ' for result in results)})\n"


def _program(
    cls: BlockClass, op: Op, choice: JointStrategy, axes: Sequence[Axis], counted: bool
) -> tuple[Op, Any]:
    """The op as it is called on this rank, and the function to call: the axes' special programs around one another."""
    whole = op
    sums = any(own.lowering == Lowering.SUM_OVER_COUNT for own in choice)
    if counted or sums:
        op = _with_sum(op)
    op = local_joint_op(op, choice, cls.tensor, [axis.size for axis in axes]) if choice else op
    program = group_norm if op.target == "aten.group_norm.default" else resolve_target(op.target)
    lowered = [(own, axis) for own, axis in zip(choice, axes, strict=True) if own.lowering]
    # What depends on the rank's part is nearest to the op; wrappers go around it, the first axis outermost.
    lowered.sort(key=lambda item: item[0].lowering not in WRAPPING)
    counting: list[Axis] = []
    for own, axis in reversed(lowered):
        match own.lowering:
            case Lowering.SUM_OVER_COUNT:
                counting.append(axis)
            case Lowering.BIAS_ON_FIRST_RANK:
                program = special_program(own.lowering, program, axis, bias_position=bias_operand(op))
            case Lowering.VOCAB_PARALLEL_CROSS_ENTROPY:
                program = special_program(own.lowering, program, axis, num_classes=own.inputs[0].length)
            case Lowering.SPATIAL_HALO:
                halo = halo_of(whole, own, cls.tensor, axis.size)
                program = special_program(own.lowering, program, axis, halo=halo)
            case _:
                program = special_program(own.lowering, program, axis)
    if counting and not counted:
        program = partial(sum_over_count, tuple(counting), program, ignored_index(op))
    return op, program


def _with_sum(op: Op) -> Op:
    """A cross-entropy, or the negative log-likelihood in its place, with reduction "sum"."""
    keywords = ["self", "target", "weight", "reduction", "ignore_index", "label_smoothing"]
    defaults: tuple[Arg, ...] = (None, None, None, MEAN, -100, 0.0)
    if op.target.startswith("aten.nll_loss"):
        keywords.pop()
    named = dict(op.kwargs)
    args = [
        op.args[i] if len(op.args) > i else named.get(keyword, defaults[i]) for i, keyword in enumerate(keywords)
    ]
    args[3] = SUM
    return Op(
        name=op.name, target=op.target, args=tuple(args), outputs=op.outputs, module=op.module, source=op.source
    )


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", f"block_{name}")


def _drop_early(lines: Sequence[str], arguments: Sequence[str], results: Sequence[str]) -> list[str]:
    """The lines with `del` of every variable after its last use."""
    kept = set(results)
    seen: set[str] = set()
    out: list[str] = []
    known = set(arguments) | {line.split(" = ")[0] for line in lines if " = " in line}
    for line in reversed(lines):
        words = [word for word in dict.fromkeys(re.findall(r"\w+", line.split("  # ")[0])) if word in known]
        dead = [word for word in words if word not in seen and word not in kept and word not in ("_", "many")]
        seen.update(words)
        if dead:
            out.append(f"del {', '.join(dead)}")
        out.append(line)
    return out[::-1]


def make_function(name: str, source: str, names: dict[str, Any]) -> Code:
    """The function `block_NAME` of a source text that uses `names`, with the text where tracebacks find it."""
    filename = f"<autopar block {name} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), names)
    code: Code = names[_identifier(name)]
    return code


def run_ops(ops: Sequence[Op], values: dict[str, Tensor], device: torch.device) -> None:
    """Run ops on whole tensors by name, adding their outputs to `values`."""

    def resolve(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, Literal):
            return resolve_literal(arg, device)
        return [resolve(item) for item in arg] if isinstance(arg, tuple) else arg

    for op in ops:
        result = resolve_target(op.target)(
            *(resolve(arg) for arg in op.args), **{key: resolve(arg) for key, arg in op.kwargs}
        )
        parts = (result,) if _is_single(op) else tuple(result)
        values.update({name: part for name, part in zip(op.outputs, parts, strict=False) if name})
