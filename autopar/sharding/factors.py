"""Factors: the named loop dimensions of an op, and the strategies that follow from splitting one of them.

A dim of a tensor is an ordered tuple of factors, outermost first: a merged dim is their product, a dim of size 1 has
none. Splitting factor f of a dim (a, f, b) shards it in strides: S(dim, outer=a). A factor can itself be split below
its outermost level: the split (f, o) sees f as (o, f/o) and cuts the second part, so every tensor that has f is sharded
with its outer multiplied by o.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autopar.sharding.state import RP, Kind, P, R, State, padded_shard, shard
from autopar.sharding.strategy import Strategy

Dims = tuple[tuple[str, ...], ...]
Split = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A factor that cannot be split, and why."""

    factor: str
    size: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpFactors:
    """An op's loop factors and where they lie in its tensors.

    `operands` is parallel to Op.operands, `outputs` to Op.outputs. `reducing` factors are summed, so a split leaves the
    outputs partial. `whole` factors have a lowering that communicates and leaves the outputs whole. `blocked` factors
    must not be split, for the reason given. `rigid` ones split only at their outermost level, into parts of at least
    `least` steps (what a part's neighbours need of it). `lowerings` names the
    special program that a factor's split needs, `split_lowering` the one that any other split needs.
    `padded` factors may also be split where the axis does not divide them: each tensor that has one pads the dim that
    is this factor alone, and whatever the op computes from padding is padding again, its gradient zero.
    `linear` lists the sets of operand positions in which the op is jointly linear. `joint` names splits of several
    factors by one axis, also of factors that are blocked alone; the first may be split below its outermost level.
    `is_opaque`: nothing is known of how the op loops, and all is blocked.
    """

    sizes: Mapping[str, int]
    operands: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    reducing: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    blocked: Mapping[str, str] = field(default_factory=dict)
    rigid: frozenset[str] = frozenset()
    least: Mapping[str, int] = field(default_factory=dict)
    lowerings: Mapping[str, str] = field(default_factory=dict)
    split_lowering: str = ""
    padded: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    joint: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_opaque: bool = False

    def problem(self, operands: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...] | None]) -> str | None:
        """What contradicts the tensors' shapes, or None. An output shape of None is not checked."""
        if (len(operands), len(outputs)) != (len(self.operands), len(self.outputs)):
            return f"the rule has {len(self.operands)} operands and {len(self.outputs)} outputs"
        names = [*(f"operand {i}" for i in range(len(operands))), *(f"output {i}" for i in range(len(outputs)))]
        for what, shape, dims in zip(names, [*operands, *outputs], [*self.operands, *self.outputs], strict=True):
            if shape is None:
                continue
            sizes = tuple(math.prod(self.sizes[name] for name in factors) for factors in dims)
            if sizes != shape:
                return f"{what} has shape {list(shape)} and the rule says {list(sizes)}"
            flat = [name for factors in dims for name in factors]
            if any(flat.count(name) > 1 and name not in self.blocked for name in flat):
                return f"{what} has a factor twice"
        produced = {name for dims in self.outputs for factors in dims for name in factors}
        loose = self.sizes.keys() - produced - self.reducing - self.whole - self.blocked.keys()
        return f"factor {sorted(loose)[0]} is in no output and does not reduce" if loose else None

    def default_splits(self) -> tuple[Split, ...]:
        return tuple((name, 1) for name in (*self.sizes, *self.joint))

    def with_joint(self, split: Split) -> tuple[Split, ...]:
        """The split, and the joint ones that split the same factor in the same way."""
        name, inner = split
        return (split, *((other, inner) for other, members in self.joint.items() if members[0] == name))

    def split_for(self, dims: Dims, state: State) -> Split | None:
        """The split that puts a tensor with these dims into this sharded state, or None."""
        if state.kind is not Kind.SHARDED or state.dim >= len(dims):
            return None
        if state.length:
            (name, *more) = dims[state.dim] or ("",)
            return (name, 1) if not more and self.sizes.get(name) == state.length else None
        before = 1
        for name in dims[state.dim]:
            inner, remainder = divmod(state.outer, before)
            if remainder:
                return None
            if inner < self.sizes[name]:
                return (name, inner) if self.sizes[name] % inner == 0 else None
            before *= self.sizes[name]
        return None

    def refusal(self, split: Split, size: int, *, may_pad: bool = False) -> Refusal | None:
        """Why an axis of this size cannot make this split, or None where it can.

        `may_pad`: shards may be padded, where the rule allows it.
        """
        name, _ = split
        if name in self.joint:
            found = (self._size_refusal(part, size, may_pad=False) for part in self.parts(split))
            return next((refusal for refusal in found if refusal), None)
        if name in self.blocked:
            return Refusal(factor=name, size=self.sizes[name], reason=self.blocked[name])
        return self._size_refusal(split, size, may_pad=may_pad)

    def _size_refusal(self, split: Split, size: int, *, may_pad: bool) -> Refusal | None:
        name, inner = split
        length = self.sizes[name]
        if not length:
            return Refusal(factor=name, size=0, reason="the dim is empty")
        if inner > 1 and name in self.rigid:
            return Refusal(factor=name, size=length, reason="splits at its outermost level only")
        if length % (inner * size) and not (may_pad and inner == 1 and self._can_pad(name)):
            seen = f"{length}" if inner == 1 else f"{length} in {inner} parts"
            return Refusal(factor=name, size=length, reason=f"size {seen} does not divide by {size}")
        least = self.least.get(name, 0)
        if length // size < least:
            reason = f"a part of {length // size} is shorter than the {least} that its neighbours need"
            return Refusal(factor=name, size=length, reason=reason)
        return None

    def _can_pad(self, name: str) -> bool:
        """Whether the factor may be padded, and makes up whole dims of every tensor that has it."""
        return name in self.padded and all(
            names == (name,) for dims in (*self.operands, *self.outputs) for names in dims if name in names
        )

    def lowering(self, name: str) -> str:
        return self.lowerings.get(name, self.split_lowering)

    def parts(self, split: Split) -> tuple[Split, ...]:
        """The splits of single factors that make up a split; only the first may be below its outermost level."""
        name, inner = split
        first, *rest = self.joint.get(name, (name,))
        return ((first, inner), *((other, 1) for other in rest))

    def _state(self, dims: Dims, split: Split, size: int) -> State | None:
        for name, inner in self.parts(split):
            for dim, names in enumerate(dims):
                if name in names:
                    if self.sizes[name] % (inner * size):
                        return padded_shard(dim, self.sizes[name])
                    outer = math.prod(self.sizes[before] for before in names[: names.index(name)])
                    return shard(dim, outer * inner)
        return None

    def strategy(self, split: Split, differentiable: Sequence[bool], size: int = 1) -> Strategy:
        """The strategy of one split, padded where an axis of `size` ranks does not divide the factor.

        `differentiable` says for each operand whether a gradient flows back to it.

        An operand without the factor serves every part of the loop, so its gradient is a sum over the ranks.
        """
        name, inner = split
        inputs = tuple(
            self._state(dims, split, size) or (RP if gradient else R)
            for dims, gradient in zip(self.operands, differentiable, strict=True)
        )
        absent = P if name in self.reducing else R
        outputs = tuple(self._state(dims, split, size) or absent for dims in self.outputs)
        label = name if inner == 1 else f"{name}.{inner}"
        return Strategy(factor=label, inputs=inputs, outputs=outputs, lowering=self.lowering(name))


def unsplit_strategies(
    differentiable: Sequence[bool], output_gradient: Sequence[bool], linear: Iterable[Sequence[int]] = ()
) -> tuple[Strategy, ...]:
    """The strategies that split nothing: R, RP (a backward is linear in the gradient), and P where the op is linear."""
    found = [Strategy(factor="", inputs=(R,) * len(differentiable), outputs=(R,) * len(output_gradient))]
    if not any(output_gradient):
        return tuple(found)
    partial_gradient = tuple(RP if gradient else R for gradient in differentiable)
    outputs = tuple(RP if gradient else R for gradient in output_gradient)
    found.append(Strategy(factor="", inputs=partial_gradient, outputs=outputs))
    for positions in linear:
        inputs = tuple(P if i in positions else state for i, state in enumerate(partial_gradient))
        found.append(Strategy(factor="", inputs=inputs, outputs=tuple(P if g else R for g in output_gradient)))
    return tuple(found)


def distinct(strategies: Iterable[Strategy]) -> tuple[Strategy, ...]:
    """The strategies in order, each choice of states and lowering once."""
    kept: dict[tuple[object, ...], Strategy] = {}
    for strategy in strategies:
        kept.setdefault((strategy.inputs, strategy.outputs, strategy.lowering), strategy)
    return tuple(kept.values())
