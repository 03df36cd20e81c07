"""The sharding of every block class for one size of the tensor axis and one boundary state, chosen once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from autopar.cluster.cluster import Cluster, DeviceType, GroupShape
from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.plan.plan import is_layer
from autopar.search.block_problem import is_hidden, is_image
from autopar.search.intra_op import joint_of_one, shard_class, shard_class_jointly
from autopar.search.rewriting import Variants, Weighed, best_rewrites
from autopar.search.ties import Options, TieSearch
from autopar.sharding.coupled_rows import needs_whole_batch
from autopar.sharding.joint import JointStrategy, Placement, joint_strategies
from autopar.sharding.propagate import ClassStrategies, class_strategies
from autopar.sharding.rewrite import Rewrite
from autopar.sharding.rewrites import rewrite_notes, rewritten
from autopar.sharding.state import Kind, R, State, shard
from autopar.sharding.strategy import ClassSharding, Strategy
from autopar.simulate.block_cost import block_cost
from autopar.simulate.class_costs import ClassCosts, CostAxis
from autopar.simulate.stage_cost import inner_axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sharding a class that occurs in the chain, in the chain's order, and what a reader should know of them."""

    shardings: tuple[ClassSharding, ...]
    notes: tuple[str, ...]
    rewrites: tuple[Rewrite, ...] = ()  # of the classes that the shardings are of

    @property
    def splits(self) -> bool:
        """Whether any op is split at all; else the axis only repeats work."""
        return any(strategy.factor for choice in self.shardings for _, strategy in choice.ops)


class ShardingChooser:
    """Chooses with the exact intra-op search, for the slowest device of the cluster and `rows` rows a micro-batch.

    Shardings are weighed without recomputation; a block's cost under them is then taken at the true rows.
    With `rewrites` a layer's ops are rewritten where that is faster; `compile` says how blocks are then run.
    """

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, dtype: str, *, rows: float = 1, rewrites: bool = False,
        compile: bool = False,  # noqa: A002
    ) -> None:
        self._graph, self._cluster, self._dtype = graph, cluster, dtype
        self._rows = rows if graph.rows_are_tagged else graph.rows
        self._rewrites, self._compile, self._variants = rewrites, compile, Variants()
        # The same without rewrites.
        self.plain: ShardingChooser = self if not rewrites else ShardingChooser(
            graph, cluster, dtype, rows=rows, compile=compile
        )
        # By a variant's id, which is kept.
        self._of_variants: dict[tuple[int, tuple[int, ...]], Mapping[str, Sequence[JointStrategy]]] = {}
        self._costs_of_variants: dict[tuple[int, tuple[int, ...], tuple[CostAxis, ...]], ClassCosts] = {}
        self._kept: dict[tuple[int, int, bool, bool, bool], Choice | None] = {}
        self._at_rows: dict[tuple[int, int, bool, bool, bool, int], tuple[ClassSharding, ...]] = {}
        self._strategies: dict[tuple[str, int], ClassStrategies] = {}
        self._joint: dict[tuple[str, int], Mapping[str, Sequence[JointStrategy]]] = {}
        self._costs: dict[tuple[str, int], ClassCosts] = {}
        self.classes: tuple[BlockClass, ...] = tuple(
            graph.block_class[name] for name in dict.fromkeys(block.cls for block in graph.blocks)
        )

    @cached_property
    def needs_whole_batch(self) -> str:
        """Why numbers are only right where the global batch is computed in one part; "" where it is not so."""
        return needs_whole_batch(self._graph)

    @property
    def num_choices(self) -> int:
        """How many choices were made."""
        return len(self._kept)

    @property
    def has_hidden_states(self) -> bool:
        """Whether anything passes between blocks that sequence parallelism could split."""
        crossing = (cls.tensor[name] for cls in self.classes for name in cls.outputs)
        return any(is_hidden(info) or is_image(info) for info in crossing)

    def splits_sequence(self, ranks: int) -> bool:
        """Whether the hidden states that pass between blocks can be split by sequence over so many ranks."""
        crossing = (cls.tensor[name] for cls in self.classes for name in cls.outputs)
        return all(info.shape[1] % ranks == 0 for info in crossing if is_hidden(info))

    def choose(
        self, tp: int, *, sequence_parallel: bool, split_weights: bool = True, split_products: bool = False, cp: int = 1
    ) -> Choice | None:
        """The shardings under an axis of `tp` ranks; None where a block allows no such boundary.

        `split_weights`: what a rank stores is charged as in a step of one micro-batch; else it is free.
        `split_products`: where the fastest choice repeats every product of every layer, the fastest that splits them.
        `cp`: ranks of an axis before the tensor axis, over which hidden states pass between blocks split by sequence.
        """
        key = (cp, tp, sequence_parallel, split_weights, split_products)
        if key not in self._kept:
            if cp > 1:
                self._kept[key] = self._choose_jointly(*key)
            else:
                self._kept[key] = self._choose(*key[1:]) if tp > 1 else self._with_rewrites(
                    Choice(shardings=(), notes=()))
        return self._kept[key]

    def graph(
        self, tp: int, *, sequence_parallel: bool, split_weights: bool = True, cp: int = 1
    ) -> ModelGraph:
        """The graph whose classes the chosen shardings are of; the same object each time."""
        choice = self.choose(tp, sequence_parallel=sequence_parallel, split_weights=split_weights, cp=cp)
        assert choice is not None, "only for an axis that has shardings"
        return rewritten(self._graph, choice.rewrites)

    def shardings(
        self, tp: int, rows: int, *, sequence_parallel: bool, split_weights: bool = True, split_products: bool = False,
        cp: int = 1,
    ) -> tuple[ClassSharding, ...]:
        """The chosen shardings as a plan with micro-batches of `rows` rows holds them; the same objects each time."""
        key = (cp, tp, sequence_parallel, split_weights, split_products, rows)
        if key not in self._at_rows:
            choice = self.choose(
                tp, sequence_parallel=sequence_parallel, split_weights=split_weights, split_products=split_products,
                cp=cp,
            )
            assert choice is not None, "only for an axis that has shardings"
            self._at_rows[key] = at_rows(choice.shardings, self._graph, rows)
        return self._at_rows[key]

    def _choose_jointly(
        self, cp: int, tp: int, sequence_parallel: bool, split_weights: bool, split_products: bool
    ) -> Choice | None:
        """Both axes at once. None where nothing passes between blocks that the first one could split.

        Of rewrites those that pay without the context axis are tried beside it.
        """
        if not self.has_hidden_states:
            return None
        outer = inner_axis(self._cluster, tuple(i * tp for i in range(cp)))
        sizes = (cp, tp) if tp > 1 else (cp,)
        boundary = (shard(1), shard(1) if sequence_parallel else R)[: len(sizes)]
        if self.plain is not self and not split_products:
            choice = self.plain.choose(tp, sequence_parallel=sequence_parallel, split_weights=split_weights, cp=cp)
            alone = self.choose(tp, sequence_parallel=sequence_parallel, split_weights=split_weights)
            if choice is None or alone is None:
                return choice
            return self._with_rewrites(
                choice, sizes=sizes, outer=(outer,), boundary=boundary, weight=float(split_weights),
                tried=alone.rewrites,
            )
        weight, device = float(split_weights), slowest_device(self._cluster)
        group = tp_group(self._cluster, tp) if tp > 1 else None
        costs = {
            cls.name: ClassCosts(
                self._graph, cls, tp=tp, rows=self._rows, device=device, tp_group=group, dtype=self._dtype,
                outer=(outer,),
            ) for cls in self.classes
        }

        def solve(cls: BlockClass, options: Options) -> tuple[ClassSharding, ...] | None:
            return shard_class_jointly(
                cls, options, boundary, costs[cls.name], parameter_weight=weight,
                whole_params=(True, False)[: len(sizes)],
            )

        def time_s(cls: BlockClass, shardings: tuple[ClassSharding, ...]) -> float:
            cost = block_cost(
                self._graph, cls, shardings, tp=tp, rows=self._rows, device=device, tp_group=group, dtype=self._dtype,
                outer=(outer,),
            )
            return (cost.forward_compute_s + cost.backward_compute_s
                    + cost.forward_tp_comm_s + cost.backward_tp_comm_s)

        def charge_s(cls: BlockClass, param: str, place: Placement) -> float:
            return weight * costs[cls.name].param_time_s(param, place, num_micro_batches=1)

        chosen: dict[str, tuple[ClassSharding, ...]] = {}
        shared: dict[str, Options] = {}
        notes: list[str] = []
        for cls in self.classes:
            strategies = joint_strategies(cls, sizes)
            shardings = solve(cls, strategies)
            if shardings is None:
                return None
            is_asked = split_products and tp > 1 and cls.name in self._layer_classes and _products(cls)
            if is_asked and not _splits_products(cls, shardings[-1]):
                shardings = solve(cls, _without_repetition(cls, strategies)) or shardings
                notes.append(
                    f"tp {tp} splits {cls.name} as asked; repeating the work is faster here"
                    if _splits_products(cls, shardings[-1]) else
                    f"tp {tp} can split no product of {cls.name}: each tensor rank repeats them"
                )
            chosen[cls.name] = shardings
            if cls.name in self._sharing_classes:
                shared[cls.name] = strategies
        if tp > 1:
            ties = TieSearch(graph=self._graph, solve=solve, time_s=time_s, charge_s=charge_s)
            chosen = ties.settle(chosen, shared)
        found = [
            replace(own, axis=axis) for shardings in chosen.values()
            for own, axis in zip(shardings, ("cp", "tp"), strict=False)
        ]
        return Choice(shardings=tuple(found), notes=tuple(notes))

    def _choose(self, tp: int, sequence_parallel: bool, split_weights: bool, split_products: bool) -> Choice | None:
        boundary, weight = shard(1) if sequence_parallel else R, float(split_weights)
        found: dict[str, ClassSharding] = {}
        for cls in self.classes:
            strategies, costs = self._of_class(cls, tp)
            if (key := (cls.name, tp)) not in self._joint:  # the same objects each time, of which problems are kept
                self._joint[key] = joint_of_one(strategies)
            own = shard_class_jointly(cls, self._joint[key], (boundary,), costs, parameter_weight=weight)
            if own is None:
                return None
            found[cls.name] = own[0]
        found = self._with_ties_settled(found, tp, boundary, weight)
        notes: list[str] = []
        layers = [cls for cls in self.classes if cls.name in self._layer_classes and _products(cls)]
        if split_products and layers and not any(_splits_products(cls, found[cls.name]) for cls in layers):
            names = {True: list[str](), False: list[str]()}
            for cls in layers:
                strategies, costs = self._of_class(cls, tp)
                split = shard_class(cls, _without_repetition(cls, strategies), boundary, costs, parameter_weight=weight)
                found[cls.name] = split or found[cls.name]
                names[_splits_products(cls, found[cls.name])].append(cls.name)
            if names[True]:
                notes.append(f"tp {tp} splits {', '.join(names[True])} as asked; repeating the work is faster here")
            if names[False]:
                notes.append(
                    f"tp {tp} can split no product of {', '.join(names[False])}: each tensor rank repeats them"
                )
        unruled: set[str] = set()
        whole: list[str] = []
        for cls in self.classes:
            strategies, _ = self._of_class(cls, tp)
            unruled |= {op.target for op in cls.ops if op.name in strategies.unruled}
            if cls.params and not any(state.kind is Kind.SHARDED for state in found[cls.name].params):
                whole.append(cls.name)
        if unruled:
            notes.append(f"ops without a sharding rule run whole on every tensor rank: {', '.join(sorted(unruled))}")
        if whole:
            notes.append(f"tp {tp} splits no parameter of {', '.join(whole)}: each tensor rank stores all of them")
        choice = Choice(shardings=tuple(found.values()), notes=tuple(notes))
        return choice if split_products else self._with_rewrites(
            choice, sizes=(tp,), boundary=(boundary,), weight=weight
        )

    def _with_rewrites(
        self, choice: Choice, *, sizes: tuple[int, ...] = (), outer: tuple[CostAxis, ...] = (),
        boundary: Placement = (), weight: float = 1.0, tried: Sequence[Rewrite] | None = None,
    ) -> Choice:
        """The choice with the layers rewritten wherever that is faster and keeps no more; only as `tried`, if given.

        The axes have `sizes`; of the first ones `outer` says more. A class that shares a parameter with another is left
        as it is, for its sharding was settled with the other's.
        """
        if not self._rewrites:
            return choice
        tp = sizes[-1] if len(sizes) > len(outer) else 1
        device, group = slowest_device(self._cluster), tp_group(self._cluster, tp) if tp > 1 else None
        whole_params = (True,) * len(outer) + (False,) * (len(sizes) - len(outer))
        rewrites: list[Rewrite] = []
        changed: dict[str, tuple[ClassSharding, ...]] = {}
        for cls in self.classes:
            if cls.name not in self._layer_classes or cls.name in self._sharing_classes:
                continue

            def weigh(cls: BlockClass, shardings: tuple[ClassSharding, ...] | None = None) -> Weighed | None:
                costs = self._costs_of_variant(cls, sizes, outer)
                if sizes and shardings is None:
                    strategies = self._strategies_of_variant(cls, sizes)
                    shardings = shard_class_jointly(
                        cls, strategies, boundary, costs, parameter_weight=weight, whole_params=whole_params
                    )
                    if shardings is None:
                        return None
                each = shardings or ()
                cost = block_cost(
                    self._graph, cls, each, tp=tp, rows=self._rows, device=device, tp_group=group, dtype=self._dtype,
                    compile=self._compile, outer=outer,
                )
                places = zip(*(own.params for own in each), strict=True) if each else ()
                charge_s = sum(
                    weight * costs.param_time_s(param, place, num_micro_batches=1)
                    for param, place in zip(cls.params, places, strict=False)
                )
                return Weighed(
                    shardings=each, saved_bytes=cost.saved_bytes, selective_saved_bytes=cost.selective_saved_bytes,
                    time_s=cost.forward_compute_s + cost.backward_compute_s + cost.forward_tp_comm_s
                    + cost.backward_tp_comm_s + charge_s,
                )

            captured = weigh(cls, tuple(own for own in choice.shardings if own.cls == cls.name))
            assert captured is not None
            found, best = best_rewrites(cls, captured, self._variants, weigh, tried)
            rewrites += found
            if found:
                axes = ("cp", "tp") if outer else ("tp",)
                changed[cls.name] = tuple(
                    replace(own, axis=axis) for own, axis in zip(best.shardings, axes, strict=False)
                )
        if not rewrites:
            return choice
        of_axis = {(own.cls, own.axis): own for shardings in changed.values() for own in shardings}
        return Choice(
            shardings=tuple(of_axis.get((own.cls, own.axis), own) for own in choice.shardings),
            notes=(*choice.notes, *rewrite_notes(self._graph, rewrites)), rewrites=tuple(rewrites),
        )

    def _costs_of_variant(self, cls: BlockClass, sizes: tuple[int, ...], outer: tuple[CostAxis, ...]) -> ClassCosts:
        """A class's costs over axes of these sizes, made once."""
        key = id(cls), sizes, outer
        if key not in self._costs_of_variants:
            tp = sizes[-1] if len(sizes) > len(outer) else 1
            self._costs_of_variants[key] = ClassCosts(
                self._graph, cls, tp=tp, rows=self._rows, device=slowest_device(self._cluster), dtype=self._dtype,
                tp_group=tp_group(self._cluster, tp) if tp > 1 else None, outer=outer,
            )
        return self._costs_of_variants[key]

    def _strategies_of_variant(
        self, cls: BlockClass, sizes: tuple[int, ...]
    ) -> Mapping[str, Sequence[JointStrategy]]:
        """A class's strategies over axes of these sizes, made once."""
        key = id(cls), sizes
        if key not in self._of_variants:
            self._of_variants[key] = joint_strategies(cls, sizes)
        return self._of_variants[key]

    @cached_property
    def _sharing_classes(self) -> frozenset[str]:
        """The classes with a parameter that blocks of another class use too."""
        users: dict[str, set[str]] = {}
        for block in self._graph.blocks:
            for name in block.params:
                users.setdefault(name, set()).add(block.cls)
        return frozenset(name for own in users.values() if len(own) > 1 for name in own)

    def _with_ties_settled(
        self, found: dict[str, ClassSharding], tp: int, boundary: State, weight: float
    ) -> dict[str, ClassSharding]:
        device, group = slowest_device(self._cluster), tp_group(self._cluster, tp)

        def solve(cls: BlockClass, options: Options) -> tuple[ClassSharding] | None:
            alone = {name: [own for (own,) in each] for name, each in options.items()}
            choice = shard_class(cls, alone, boundary, self._of_class(cls, tp)[1], parameter_weight=weight)
            return None if choice is None else (choice,)

        def time_s(cls: BlockClass, choice: tuple[ClassSharding, ...]) -> float:
            cost = block_cost(
                self._graph, cls, choice, tp=tp, rows=self._rows, device=device, tp_group=group, dtype=self._dtype
            )
            return (cost.forward_compute_s + cost.backward_compute_s
                    + cost.forward_tp_comm_s + cost.backward_tp_comm_s)

        def charge_s(cls: BlockClass, param: str, state: Placement) -> float:
            return weight * self._of_class(cls, tp)[1].param_time_s(param, state, num_micro_batches=1)

        options = {
            cls.name: {name: [(own,) for own in each] for name, each in self._of_class(cls, tp)[0].items()}
            for cls in self.classes if cls.name in self._sharing_classes
        }
        search = TieSearch(graph=self._graph, solve=solve, time_s=time_s, charge_s=charge_s)
        settled = search.settle({name: (choice,) for name, choice in found.items()}, options)
        return {name: choice for name, (choice,) in settled.items()}

    @property
    def _layer_classes(self) -> set[str]:
        return {block.cls for block in self._graph.blocks if is_layer(block.name)}

    def _of_class(self, cls: BlockClass, tp: int) -> tuple[ClassStrategies, ClassCosts]:
        key = (cls.name, tp)
        if key not in self._strategies:
            self._strategies[key] = class_strategies(cls, tp)
            self._costs[key] = ClassCosts(
                self._graph, cls, tp=tp, rows=self._rows, device=slowest_device(self._cluster),
                tp_group=tp_group(self._cluster, tp), dtype=self._dtype,
            )
        return self._strategies[key], self._costs[key]


def _products(cls: BlockClass) -> list[str]:
    """The ops of matrix products, attention and the like that a gradient passes."""
    return [
        op.name for op in cls.ops if op.flops and any(cls.tensor[name].requires_grad for name in op.outputs if name)
    ]


def _splits_products(cls: BlockClass, sharding: ClassSharding) -> bool:
    return any(sharding.strategy[name].factor for name in _products(cls))


Option = TypeVar("Option", Strategy, JointStrategy)


def _without_repetition(
    cls: BlockClass, strategies: Mapping[str, Sequence[Option]]
) -> Mapping[str, Sequence[Option]]:
    """The strategies, less those that run a product whole on every rank of the (last) axis where it has others."""
    kept = dict(strategies)
    for name in _products(cls):
        split = [own for own in kept[name] if (own if isinstance(own, Strategy) else own[-1]).factor]
        kept[name] = split or kept[name]
    return kept


def at_rows(shardings: tuple[ClassSharding, ...], graph: ModelGraph, rows: int) -> tuple[ClassSharding, ...]:
    """The shardings for a graph of `rows` rows: a shard that lies inside the batch dim is strided over its rows.

    A view that merges batch and sequence makes a split sequence S(0, outer=rows); a graph with tagged rows shows its
    own prime there.
    """
    if not graph.rows_are_tagged:
        return shardings
    changed = tuple(choice.at_rows(graph.rows, rows) for choice in shardings)
    return shardings if changed == shardings else changed


def slowest_device(cluster: Cluster) -> DeviceType:
    """The type with the smallest peak of the cluster's devices; the first of equals."""
    distinct = {id(node.device): node.device for node in cluster.nodes}
    return min(distinct.values(), key=lambda device: device.peak("bfloat16"))


def tp_group(cluster: Cluster, tp: int) -> GroupShape:
    """The shape of the tensor group of the first `tp` ranks."""
    return cluster.group(tuple(range(tp)))
