"""Time and bytes of one block on one device: compute, tensor-axis communication, saved activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.cluster.cluster import DeviceType, GroupShape
from autopar.cost_models.compute import (
    OpTime,
    checkpoint_dispatch_s,
    collective_dispatch_s,
    is_joined,
    lowering_dispatch_s,
)
from autopar.cost_models.op_kinds import OpKind, op_kind
from autopar.graph.expert_params import expert_params
from autopar.graph.experts import EXPERTS_OP
from autopar.graph.loss_terms import base_name
from autopar.graph.model_graph import BlockClass, ModelGraph, Op
from autopar.sharding.joint import JointStrategy, Placement, held_share, placement_text, replicated
from autopar.sharding.reshard import Collective, Conversion, LocalAction
from autopar.sharding.state import Kind
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.async_products import PADDED_TO, AsyncProducts
from autopar.simulate.attention_core import AttentionCore, attention_cores
from autopar.simulate.class_costs import RUNS_AS_IT_IS, ClassCosts, CostAxis
from autopar.simulate.expert_costs import costs_at_all_rows, with_expert_axis
from autopar.simulate.fused_groups import FusedGroups
from autopar.simulate.lowering_costs import LoweringCost
from autopar.simulate.recomputed import Stop, early_stop


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """One micro-batch through one block on one device of its tensor axis.

    `saved_bytes` is what autograd keeps from forward to backward; `boundary_bytes` is what is kept instead where the
    block is recomputed (its inputs that carry gradients). Under selective recomputation `selective_saved_bytes` are
    kept, and `selective_recompute_s` with its communication `selective_recompute_tp_s` is added to the backward.
    `transient_bytes`: the most that one op's results and gradients take beside what is kept.
    """

    forward_compute_s: float
    backward_compute_s: float
    forward_tp_comm_s: float
    backward_tp_comm_s: float
    saved_bytes: float
    boundary_bytes: float
    transient_bytes: float
    recompute_s: float
    recompute_tp_s: float
    selective_saved_bytes: float
    selective_recompute_s: float
    selective_recompute_tp_s: float
    weight_backward_s: float  # the part of backward_compute_s that computes gradients of parameters alone
    forward_flops: float  # of the whole block at these rows, over all ranks of the tensor axis
    key_value_bytes: float  # keys and values on this rank, before heads are repeated
    param_numel_local: float
    params: tuple[float, ...]  # this rank's elements of each of the class's parameters
    by_experts: tuple[bool, ...]  # whether the expert axis has it by parts
    summed_in_place: tuple[bool, ...]  # whether the product that computes the parameter's gradient adds it to the sum
    partial_params: tuple[bool, ...]  # whether the parameter's gradient is a sum over the tensor axis
    buffer_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One collective that a block is charged with.

    `subject` is the tensor that is converted from placement `src` to `dst`, or the op whose special program
    (`lowering`) communicates. `axis` is the position of the axis among the block's; `size_bytes` is what the whole
    group holds, as `Collective` says.
    """

    subject: str
    axis: int
    collective: Collective
    size_bytes: float
    time_s: float
    is_backward: bool
    src: str = ""
    dst: str = ""
    lowering: str = ""


_cache: dict[tuple[object, ...], tuple[tuple[object, ...], BlockCost]] = {}
_CACHE_SIZE = 8192


def block_cost(
    graph: ModelGraph, cls: BlockClass, sharding: ClassSharding | Sequence[ClassSharding] | None, *, tp: int,
    rows: float, device: DeviceType, tp_group: GroupShape | None, dtype: str, compile: bool = False,  # noqa: A002
    outer: Sequence[CostAxis] = (), expert_axis: CostAxis | None = None, as_megatron: bool = False,
    recomputes_all: bool = False,
) -> BlockCost:
    """The cost of a block of class `cls` under a sharding (None: nothing is split). Results are cached.

    With `outer` axes before the tensor axis there is a sharding for each of them, and then that of the tensor axis.
    `expert_axis`: ranks with as many other rows each, that have the block's experts between them. `as_megatron`:
    as Megatron runs it (`autopar.simulate.async_products`). `recomputes_all`: recomputation does not stop early.
    """
    each = () if sharding is None else (sharding,) if isinstance(sharding, ClassSharding) else tuple(sharding)
    kept = (graph, cls, *each, device)
    key = (*map(id, kept), tp_group, tp, rows, dtype, compile, expert_axis, as_megatron, recomputes_all, *outer)
    found = _cache.get(key)
    if found is None:
        if len(_cache) >= _CACHE_SIZE:
            _cache.clear()
        costs = ClassCosts(
            graph, cls, tp=tp, rows=rows, device=device, tp_group=tp_group, dtype=dtype, outer=outer,
            pad=PADDED_TO if as_megatron else 1,
        )
        # The key holds ids: what they stand for is kept with the result, so that no id is used again.
        split = math.prod(costs.sizes) > 1
        assert not each or not split or len(each) == len(costs.sizes), "one sharding an axis"
        summation = _Summation(
            costs, each if split else (), compile, expert_axis, as_megatron=as_megatron, recomputes_all=recomputes_all
        )
        found = _cache[key] = (kept, summation.total())
    return found[1]


def block_charges(costs: ClassCosts, shardings: Sequence[ClassSharding]) -> tuple[Charge, ...]:
    """Every collective that `block_cost` charges a block with under these shardings, one an axis; forward order.

    Their seconds, forward and backward, add up to the cost's `forward_tp_comm_s` and `backward_tp_comm_s`.
    """
    summation = _Summation(costs, tuple(shardings), compile_=False)
    summation.total()
    return tuple(summation.charges)


class _Again(NamedTuple):
    """What the device, its communication and the host need to run a block's forward again."""

    compute_s: float
    tp_s: float
    host_s: float


class _Summation:
    """One pass over the ops of a class in execution order, as the lowered block would run them."""

    def __init__(
        self, costs: ClassCosts, shardings: Sequence[ClassSharding], compile_: bool,
        expert_axis: CostAxis | None = None, *, as_megatron: bool = False, recomputes_all: bool = False,
    ) -> None:
        self.costs, self.cls, self.shardings, self.compile = costs, costs.cls, tuple(shardings), compile_
        self.whole = replicated(len(costs.axes))
        self.state: dict[str, Placement] = {}
        self.storage: dict[str, str] = {}  # where the tensor as produced lies
        self.converted: dict[tuple[str, Placement], str] = {}
        self.comm = [0.0, 0.0]
        self.charges: list[Charge] = []
        self.host = [0.0, 0.0]  # what the host needs to issue the ops and the collectives
        self.products = AsyncProducts(costs) if as_megatron else None
        self.recomputes_all = recomputes_all
        held = expert_params(costs.cls) if expert_axis is not None else frozenset[str]()
        self.expert_axis, self.by_experts = expert_axis, tuple(name in held for name in costs.cls.params)
        self.at_all_rows: ClassCosts | None = None  # of all ranks of the expert axis
        if expert_axis is not None and held:
            self.at_all_rows = costs_at_all_rows(costs, expert_axis)

    def total(self) -> BlockCost:
        costs, cls = self.costs, self.cls
        for word in ("inputs", "params", "buffers"):
            for name, place in zip(getattr(cls, word), self.places(word), strict=True):
                self.state[name], self.storage[name] = place, name
        cores = attention_cores(cls)
        core_of = {name: core for core in cores for name in core.ops}
        fused = FusedGroups(costs) if self.compile else None
        stop = self.stop(cls.ops) if fused is None else None
        passed = {op.name for core in cores for op in self.not_again(core)}
        again = _Again(0.0, 0.0, 0.0) if stop is not None and not stop.op else None
        forward = backward = weights = flops = recompute = again_tp = transient = 0.0
        saved: dict[tuple[str, str], float] = {}
        dropped: set[tuple[str, str]] = set()
        kept_anyway: set[tuple[str, str]] = set()
        extra = selective_extra = 0.0
        for op in cls.ops:
            strategy = self.strategy(op)
            wanted, left = costs.placements(op, strategy)
            core, before = core_of.get(op.name), self.comm[0]
            reads = {name: self.read(name, state) for name, state in zip(op.operands, wanted, strict=True)}
            for i, output in enumerate(op.outputs):
                if output:
                    self.state[output] = left[i]
                    source = costs.view_of.get(output)
                    self.storage[output] = reads.get(source or "", output)
            if core is not None and core.internal.intersection(op.operands):
                again_tp += self.comm[0] - before
            if stop is not None and stop.op == op.name and not stop.runs:
                again = _Again(forward, self.comm[0], self.host[0])
            own, exact = costs, strategy
            if self.at_all_rows is not None and op.target == EXPERTS_OP:
                own, exact = self.at_all_rows, with_expert_axis(costs, op, strategy)
            time = own.op_time(op, exact)
            lowered = self.add_lowering(own, op, exact)
            if fused is None or op.name not in fused.group_of:
                forward += time.forward_s
                backward += time.backward_s
            issue = own.issue_time(op, exact)
            self.host[0] += issue.forward_s
            self.host[1] += issue.backward_s
            if stop is not None and stop.op == op.name and stop.runs:
                again = _Again(forward, self.comm[0], self.host[0])
            weights += _weight_share(costs, op) * time.backward_s
            flops += op.flops * costs.scale(op)
            if core is not None and op.name not in passed:
                recompute += time.forward_s
                again_tp += lowered.forward_s
            op_extra = own.saved_extra_bytes(op, exact) + (own.in_steps_bytes(op, exact) if fused is None else 0.0)
            extra += op_extra
            # A product's own copies of queries, keys and values stay: recomputation starts from them.
            dropped_extra = core is not None and op_kind(op.target) is not OpKind.MATMUL
            selective_extra += 0.0 if dropped_extra else op_extra
            gathered = {}
            if self.products is not None:
                gathered = self.products.gathered(op, wanted, self.state, time.backward_s)
            for name in op.saved:
                key, size = self.saved_storage(op, strategy, name, reads)
                shard_of = gathered.get(costs.root(name))
                if key is not None and shard_of is not None:  # its shard stays, and is gathered again
                    key = shard_of[0], self.storage[shard_of[0]]
                    size = costs.local(shard_of[0], shard_of[1]).size_bytes
                if key is None:
                    continue
                if fused is not None and fused.is_internal(name):
                    continue
                saved[key] = size
                if core is not None and name in core.internal:
                    dropped.add(key)
                else:
                    kept_anyway.add(key)
            out_bytes = sum(costs.local(o, self.state[o]).size_bytes for o in op.outputs if o)
            grads = sum(
                local.size_bytes for name, state in zip(op.operands, wanted, strict=True)
                if (local := costs.local(name, state)).requires_grad and name not in cls.params
            )
            if fused is None and base_name(op) == "cross_entropy_loss":  # the gradient of its log-softmax is a tensor
                grads += costs.local(op.operands[0], wanted[0]).size_bytes
            if is_joined(op):  # the copy of the weights
                grads += sum(costs.local(name, state).size_bytes
                             for name, state in zip(op.operands[1:], wanted[1:], strict=True))
            if out_bytes and op_kind(op.target) is not OpKind.VIEW:
                again_bytes = sum(costs.local(name, place).size_bytes for name, _, place in gathered.values())
                transient = max(transient, out_bytes + grads + again_bytes)
        for name, place in zip(cls.outputs, self.places("outputs"), strict=True):
            if name in self.state:
                self.read(name, place)
        if fused is None:
            backward += sum(costs.fan_out_s(name, state) for name, state in self.state.items())
        else:
            more_forward, more_backward = fused.times(self.state)
            forward, backward = forward + more_forward, backward + more_backward
            for name in fused.kept_inputs():
                if name not in cls.params and name not in cls.buffers:
                    saved.setdefault((name, self.storage[name]), costs.local(name, self.state[name]).size_bytes)
        if self.products is not None and self.products.any:
            more, more_comm, calls = self.products.backward()
            backward, weights = backward + more, weights + more
            self.comm[1] += more_comm
            self.host[1] += calls * collective_dispatch_s(costs.device)
        again = again or _Again(forward, self.comm[0], self.host[0])
        again_s = again.compute_s
        if not self.compile and not costs.device.name.startswith("CPU"):
            again_s = max(again_s, again.host_s + checkpoint_dispatch_s(costs.device) - again.tp_s)
            forward = max(forward, self.host[0] - self.comm[0])
            backward = max(backward, self.host[1] - self.comm[1])
        saved_bytes = sum(saved.values()) + extra
        experts = self.expert_axis.size if self.expert_axis is not None else 1
        local_params = [
            costs.local(name, self.state[name]).numel / (experts if by_experts else 1)
            for name, by_experts in zip(cls.params, self.by_experts, strict=True)
        ]
        return BlockCost(
            forward_compute_s=forward, backward_compute_s=backward,
            forward_tp_comm_s=self.comm[0], backward_tp_comm_s=self.comm[1],
            saved_bytes=saved_bytes,
            boundary_bytes=sum(
                costs.local(name, self.state[name]).size_bytes
                for name in cls.inputs if costs.whole(name).requires_grad
            ),
            transient_bytes=transient, recompute_s=again_s, recompute_tp_s=again.tp_s,
            selective_saved_bytes=sum(size for key, size in saved.items() if key not in dropped - kept_anyway)
            + selective_extra,
            selective_recompute_s=recompute, selective_recompute_tp_s=again_tp,
            weight_backward_s=min(weights, backward),
            forward_flops=flops,
            key_value_bytes=sum(self.smallest_view_bytes(name) for core in cores for name in core.keys_and_values),
            param_numel_local=sum(local_params),
            params=tuple(local_params), by_experts=self.by_experts,
            summed_in_place=tuple(
                self.products is not None and self.products.any and name in self.products.weights for name in cls.params
            ),
            partial_params=tuple(
                costs.tp > 1 and self.state[name][-1].kind is Kind.REPLICATED_PARTIAL_GRAD for name in cls.params
            ),
            buffer_bytes=sum(costs.local(name, self.state[name]).size_bytes for name in cls.buffers),
        )

    def stop(self, ops: Sequence[Op]) -> Stop | None:
        """Where running these ops again stops; None where all run."""
        if self.recomputes_all:
            return None
        each = {op.name: self.strategy(op) or () for op in ops}
        return early_stop(ops, lambda op: all(own.lowering in RUNS_AS_IT_IS for own in each[op.name]))

    def not_again(self, core: AttentionCore) -> list[Op]:
        """The ops at the end of a core that recomputing it does not run."""
        ops = [op for op in self.cls.ops if op.name in core.ops]
        stop = self.stop(ops)
        if stop is None:
            return []
        names = [op.name for op in ops]
        return ops[names.index(stop.op) + stop.runs:] if stop.op else ops

    def add_lowering(self, costs: ClassCosts, op: Op, strategy: JointStrategy | None) -> OpTime:
        """Adds the collectives of the op's special programs, and gives their times."""
        time = costs.lowering_comm(op, strategy)
        self.comm[0] += time.forward_s
        self.comm[1] += time.backward_s
        for axis, found in costs.lowerings(op, strategy):
            self.charges += self.of_lowering(costs, op, strategy, axis, found)
            self.host[0] += lowering_dispatch_s(costs.device, len(found.forward), found.forward_calls)
            self.host[1] += lowering_dispatch_s(costs.device, len(found.backward), found.backward_calls)
        return time

    def places(self, word: str) -> tuple[Placement, ...]:
        """The placements of the class's inputs, params, buffers or outputs."""
        if not self.shardings:
            return (self.whole,) * len(getattr(self.cls, word))
        return tuple(zip(*(getattr(own, word) for own in self.shardings), strict=True))

    def strategy(self, op: Op) -> JointStrategy | None:
        if any(op.name not in own.strategy for own in self.shardings):
            return None
        return tuple(own.strategy[op.name] for own in self.shardings) or None

    def read(self, name: str, wanted: Placement) -> str:
        """The storage of a tensor in the wanted state; a conversion is paid for the first time that it is needed."""
        current = self.state[name]
        if current == wanted:
            return self.storage[name]
        found = self.converted.get((name, wanted))
        if found is not None:
            return found
        made = self.costs.conversions(name, current, wanted)
        time = self.costs.conversion_time(name, current, wanted)
        assert made is not None, f"no conversion of {name} from {placement_text(current)} to {placement_text(wanted)}"
        assert time is not None
        self.comm[0] += time.forward_s
        self.comm[1] += time.backward_s
        self.charges += self.of_conversion(name, current, wanted, made)
        self.host[0] += collective_dispatch_s(self.costs.device) * sum(step.forward is not None for _, _, step in made)
        self.host[1] += collective_dispatch_s(self.costs.device) * sum(step.backward is not None for _, _, step in made)
        moves = any(_moves(step) for _, _, step in made)
        storage = f"{name}|{placement_text(wanted)}" if moves else self.storage[name]
        self.converted[name, wanted] = storage
        return storage

    def of_conversion(
        self, name: str, src: Placement, dst: Placement, made: Sequence[tuple[int, float, Conversion]]
    ) -> Iterator[Charge]:
        """The collectives of a tensor's conversion."""
        for axis, share, step in made:
            time = self.costs.step_time(name, step, axis=axis, share=share)
            each = ((step.forward, time.forward_s, False), (step.backward, time.backward_s, True))
            for collective, time_s, is_backward in each:
                if collective is not None:
                    yield Charge(
                        subject=name, axis=axis, collective=collective, time_s=time_s, is_backward=is_backward,
                        size_bytes=self.costs.whole(name).size_bytes * share, src=placement_text(src),
                        dst=placement_text(dst),
                    )

    def of_lowering(
        self, costs: ClassCosts, op: Op, strategy: JointStrategy | None, axis: CostAxis, found: LoweringCost
    ) -> Iterator[Charge]:
        """The collectives of an op's special program on an axis."""
        at = next(i for i, own in enumerate(costs.axes) if own is axis)
        time = costs.op_time(op, strategy)
        for exchanges, compute_s, is_backward in (
            (found.forward, time.forward_s, False), (found.backward, time.backward_s, True)
        ):
            for item in exchanges:
                yield Charge(
                    subject=op.name, axis=at, collective=item.collective, size_bytes=item.size_bytes,
                    is_backward=is_backward, lowering=strategy[at].lowering if strategy else "",
                    time_s=costs.exchange_time_s(item, axis, compute_s),
                )

    def saved_storage(
        self, op: Op, strategy: JointStrategy | None, name: str, reads: dict[str, str]
    ) -> tuple[tuple[str, str] | None, float]:
        """The key and local bytes of a storage that the op saves; no key for what is held anyway."""
        costs = self.costs
        if name not in self.storage or costs.root(name) in (*self.cls.params, *self.cls.buffers):
            return None, 0.0
        if name in self.cls.inputs and not costs.whole(name).requires_grad:
            return None, 0.0  # masks, positions and labels, which every stage holds once
        root = costs.root(name)
        size = costs.whole(name).size_bytes
        wanted, _ = costs.placements(op, strategy)
        for operand, place in zip(op.operands, wanted, strict=True):
            if costs.root(operand) == root:
                return (name, reads[operand]), size * held_share(place, costs.sizes)
        return (name, self.storage[name]), size * held_share(self.state[name], costs.sizes)

    def smallest_view_bytes(self, name: str) -> float:
        """Bytes of the smallest tensor on the way back through views: keys before heads are repeated."""
        size = self.costs.local(name, self.state.get(name, self.whole)).size_bytes
        while True:
            op = self.cls.producer.get(name)
            if op is None or op_kind(op.target) is not OpKind.VIEW or not op.operands:
                return size
            name = op.operands[0]
            size = min(size, self.costs.local(name, self.state.get(name, self.whole)).size_bytes)


def _moves(step: Conversion) -> bool:
    """Whether a conversion gives a tensor of its own in the forward."""
    return step.forward is not None or step.forward_local not in (LocalAction.NONE, LocalAction.DIVIDE)


def _weight_share(costs: ClassCosts, op: Op) -> float:
    """The share of an op's backward that computes gradients of parameters: half of a product with a weight."""
    params = [name for name in op.operands if costs.root(name) in costs.cls.params and costs.whole(name).requires_grad]
    others = [
        name for name in op.operands if costs.root(name) not in costs.cls.params and costs.whole(name).requires_grad
    ]
    if not params:
        return 0.0
    if not others:
        return 1.0
    return 0.5 if op_kind(op.target) in (OpKind.MATMUL, OpKind.CONVOLUTION, OpKind.EXPERTS) else 0.0
