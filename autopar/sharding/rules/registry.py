"""The table of rules, and the view of one op that rules are written against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from autopar.errors import InputError
from autopar.graph.model_graph import Arg, Op, Ref, TensorInfo, refs_in
from autopar.sharding.factors import Dims, OpFactors

Factor = tuple[str, ...]  # one factor, or none for a loop of a single step
Shape = tuple[int, ...]


class Call:
    """An op with its arguments by name, which collects the factors that a rule declares.

    `signature` names the positional arguments. Shapes are those of the captured tensors.
    """

    def __init__(self, op: Op, tensors: Mapping[str, TensorInfo], signature: Sequence[str] = ()) -> None:
        self.op = op
        self.tensors = tensors
        self.sizes: dict[str, int] = {}
        self.blocked: dict[str, str] = {}
        names = [*signature, *(f"arg{i}" for i in range(len(signature), len(op.args)))]
        self.args: dict[str, Arg] = {**dict(zip(names, op.args, strict=False)), **dict(op.kwargs)}

    def has(self, name: str) -> bool:
        return self.args.get(name) is not None

    def get(self, name: str, default: Arg = None) -> Arg:
        value = self.args.get(name)
        return default if value is None else value

    def number(self, name: str, default: int) -> int:
        value = self.get(name, default)
        assert isinstance(value, int), f"{self.op.target}: {name} is {value!r}"
        return value

    def ints(self, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = self.get(name, tuple(default))
        if isinstance(value, int):
            return (value,)
        assert isinstance(value, tuple), f"{self.op.target}: {name} is {value!r}"
        return tuple(item for item in value if isinstance(item, int))

    def info(self, name: str) -> TensorInfo:
        value = self.args[name]
        assert isinstance(value, Ref), f"{self.op.target}: {name} is {value!r}"
        return self.tensors[value.name]

    def is_tensor(self, name: str) -> bool:
        return isinstance(self.args.get(name), Ref)

    def shape(self, name: str) -> Shape:
        return self.info(name).shape

    def operand_shapes(self) -> tuple[Shape, ...]:
        return tuple(self.tensors[name].shape for name in self.op.operands)

    def output_shape(self, index: int = 0) -> Shape:
        return self.tensors[self.op.outputs[index]].shape

    def factor(self, name: str, size: int, blocked: str = "") -> Factor:
        """Declares a factor; one of size 1 is none. `blocked` is the reason why it must not be split."""
        assert self.sizes.get(name, size) == size, f"{self.op.target}: factor {name} is {self.sizes[name]} and {size}"
        if size == 1:
            return ()
        self.sizes[name] = size
        if blocked:
            self.blocked[name] = blocked
        return (name,)

    def factors(self, prefix: str, shape: Sequence[int], blocked: str = "") -> Dims:
        """One factor for each dim: prefix0, prefix1, ..."""
        return tuple(self.factor(f"{prefix}{dim}", size, blocked) for dim, size in enumerate(shape))

    def build(
        self,
        operands: Mapping[str, Dims | Sequence[Dims]],
        outputs: Sequence[Dims],
        *,
        reducing: Sequence[Factor] = (),
        whole: Sequence[Factor] = (),
        rigid: Sequence[Factor] = (),
        padded: Sequence[Factor] = (),
        least: Mapping[str, int] | None = None,
        lowerings: Mapping[str, str] | None = None,
        split_lowering: str = "",
        linear: Sequence[Sequence[int]] = (),
        joint: Mapping[str, Factor] | None = None,
    ) -> OpFactors:
        """The OpFactors, with `operands` by argument name; an argument that is a list of tensors has a list of Dims."""
        ordered: list[Dims] = []
        for name, value in self.args.items():
            count = sum(1 for _ in refs_in(value))
            if isinstance(value, Ref):
                ordered.append(operands[name])  # type: ignore[arg-type]
            elif count:
                items = operands[name]
                assert len(items) == count, f"{self.op.target}: {name} has {count} tensors"
                ordered.extend(items)  # type: ignore[arg-type]
        return OpFactors(
            sizes=self.sizes,
            operands=tuple(ordered),
            outputs=tuple(outputs),
            reducing=frozenset(name for names in reducing for name in names),
            whole=frozenset(name for names in whole for name in names),
            blocked=self.blocked,
            rigid=frozenset(name for names in rigid for name in names),
            least=dict(least or {}),
            lowerings={
                name: low for name, low in (lowerings or {}).items() if name in self.sizes or name in (joint or {})
            },
            padded=frozenset(name for names in padded for name in names),
            split_lowering=split_lowering,
            linear=tuple(tuple(positions) for positions in linear),
            joint=joint or {},
        )

    def unsplit(self, reason: str) -> OpFactors:
        """An op that runs whole: every dim is blocked for the reason given."""
        operands = [self.factors(f"x{i}_", shape, reason) for i, shape in enumerate(self.operand_shapes())]
        outputs = [
            self.factors(f"y{i}_", self.tensors[name].shape, reason) if name else ()
            for i, name in enumerate(self.op.outputs)
        ]
        return OpFactors(
            sizes=self.sizes, operands=tuple(operands), outputs=tuple(outputs), blocked=self.blocked, is_opaque=True
        )


def aligned(shape: Sequence[int], dims: Dims) -> Dims:
    """The dims of an operand of this shape that broadcasts against `dims` from the right."""
    matching = dims[len(dims) - len(shape) :]
    return tuple(names if size != 1 else () for size, names in zip(shape, matching, strict=True))


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that these shapes broadcast to."""
    rank = max((len(shape) for shape in shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def normal_dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def product(sizes: Sequence[int]) -> int:
    return math.prod(sizes)


def slice_range(size: int, start: int, length: int) -> tuple[int, int]:
    """The positions that a slice of this length takes from a dim of `size`."""
    start = min(max(start + size if start < 0 else start, 0), size)
    return start, start + length


def split_lengths(call: Call, shape: Shape, dim: int) -> list[int]:
    """The lengths of the pieces, from the op's arguments (an unused output has no shape to read)."""
    size, how = shape[dim], call.args.get("how", call.args.get("split_size_or_sections"))
    name = call.op.target.split(".")[1]
    if isinstance(how, tuple):
        lengths = [length for length in how if isinstance(length, int)]
        return lengths if name != "tensor_split" else []
    if not isinstance(how, int) or how <= 0:
        return []
    if name == "tensor_split":
        return [size // how + (i < size % how) for i in range(how)]
    step = how if name in ("split", "unsafe_split") else -(-size // how)
    return [min(step, size - start) for start in range(0, size, step)] if step else []


Rule = Callable[[Call], OpFactors]
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {}


def rule(*targets: str, signature: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for targets, with an overload ("aten.max.dim") or for all of them ("aten.add")."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in _RULES, f"{target} has two rules"
            _RULES[target] = (function, tuple(signature.split()))
        return function

    return register


def find_rule(target: str) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule of the overload, or else of all overloads."""
    return _RULES.get(target) or _RULES.get(target.rpartition(".")[0])


def registered_targets() -> tuple[str, ...]:
    """Every target that has a rule, an op's name standing for all of its overloads."""
    return tuple(sorted(_RULES))


def register_rule(target: str, equation: str) -> None:
    """Gives an op of the user's own a rule, as an einsum over its tensors.

    `register_rule("my.op.default", "b n, n k -> b k")`: a factor that is in no output is a sum. "(h d)" is a merged dim
    and "1" a dim of size 1; outputs are separated by commas too. The op must be a loop over its factors: what it
    computes at one index depends on no other index of a factor that may be split; write such a factor with a "!"
    ("b n!") to keep it whole. Replaces an earlier rule. InputError for an equation that is none.
    """
    left, arrow, right = equation.partition("->")
    if not arrow:
        raise InputError(f"rule of {target}: {equation!r} has no '->'")
    operands = [_parse_dims(target, text) for text in left.split(",")] if left.strip() else []
    outputs = [_parse_dims(target, text) for text in right.split(",")]

    def apply(call: Call) -> OpFactors:
        shapes = call.operand_shapes()
        if len(shapes) != len(operands) or len(call.op.outputs) != len(outputs):
            raise InputError(
                f"rule of {target}: {equation!r} has {len(operands)} operands and {len(outputs)} outputs, "
                f"the op has {len(shapes)} and {len(call.op.outputs)}"
            )
        out_shapes = [call.tensors[name].shape if name else None for name in call.op.outputs]
        _declare(call, target, [*operands, *outputs], [*shapes, *out_shapes])
        produced = {name for dims in outputs for names in dims for name, _ in names}
        return OpFactors(
            sizes=call.sizes,
            operands=tuple(_without_ones(dims, call) for dims in operands),
            outputs=tuple(_without_ones(dims, call) for dims in outputs),
            reducing=frozenset(call.sizes.keys() - produced - call.blocked.keys()),
            blocked=call.blocked,
        )

    _RULES[target] = (apply, ())


def _parse_dims(target: str, text: str) -> list[list[tuple[str, bool]]]:
    """Dims as lists of (factor, blocked)."""
    dims: list[list[tuple[str, bool]]] = []
    merged: list[tuple[str, bool]] | None = None
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            if (word == "(") == (merged is not None):
                raise InputError(f"rule of {target}: unbalanced brackets in {text.strip()!r}")
            merged = [] if word == "(" else None
            if merged is not None:
                dims.append(merged)
            continue
        name = word.rstrip("!")
        if name != "1" and not name.isidentifier():
            raise InputError(f"rule of {target}: {word!r} is not a factor name")
        factor = [] if name == "1" else [(name, word.endswith("!"))]
        if merged is None:
            dims.append(factor)
        else:
            merged.extend(factor)
    if merged is not None:
        raise InputError(f"rule of {target}: unbalanced brackets in {text.strip()!r}")
    return dims


def _declare(
    call: Call, target: str, tensors: Sequence[list[list[tuple[str, bool]]]], shapes: Sequence[Shape | None]
) -> None:
    """Reads the factors' sizes off the shapes, single factors first, then the one unknown of each merged dim."""
    known: dict[str, int] = {}
    kept_whole: set[str] = set()
    dims: list[tuple[list[str], int]] = []
    for names_of_dims, shape in zip(tensors, shapes, strict=True):
        if shape is None:
            continue
        if len(names_of_dims) != len(shape):
            raise InputError(f"rule of {target}: {len(names_of_dims)} dims for a tensor of shape {list(shape)}")
        dims += [([name for name, _ in names], size) for names, size in zip(names_of_dims, shape, strict=True)]
        kept_whole |= {name for names in names_of_dims for name, blocked in names if blocked}
    for _ in range(len(dims) + 1):
        for names, size in dims:
            unknown = [name for name in names if name not in known]
            rest = product([known[name] for name in names if name in known])
            if len(unknown) == 1 and rest and size % rest == 0:
                known[unknown[0]] = size // rest
    for names, size in dims:
        missing = [name for name in names if name not in known]
        if missing:
            raise InputError(f"rule of {target}: the size of factor {missing[0]!r} does not follow from the shapes")
        if product([known[name] for name in names]) != size:
            raise InputError(f"rule of {target}: dim {' '.join(names) or '1'} is {size} here, elsewhere otherwise")
    for name, size in known.items():
        call.factor(name, size, "the rule keeps it whole" if name in kept_whole else "")


def _without_ones(dims: Sequence[Sequence[tuple[str, bool]]], call: Call) -> Dims:
    return tuple(tuple(name for name, _ in names if name in call.sizes) for names in dims)
