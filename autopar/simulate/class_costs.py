"""What each op and each conversion of a block class costs at given rows, tensor axis and device.

`block_cost` sums these over a chosen sharding; a search over shardings weighs the same numbers one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import DeviceType, GroupShape
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.compute import LocalTensor, OpTime, dispatch_s, is_identity_cast, memory_bandwidth, op_time_s
from autopar.cost_models.measured import Found, Source, measured_pass_s, op_table
from autopar.cost_models.memory import GRADIENT_BYTES, OPTIMIZER_STEP_BYTES
from autopar.cost_models.op_kinds import OpKind, base_name, element_bytes, op_kind
from autopar.graph.model_graph import BlockClass, ModelGraph, Op
from autopar.sharding.joint import JointStrategy, Placement, replicated
from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import Collective, Conversion
from autopar.sharding.route import conversions, summed_at_once
from autopar.sharding.state import Kind, R, State
from autopar.sharding.strategy import Strategy
from autopar.simulate.lowering_costs import Exchange, LoweringCost, lowering_cost
from autopar.simulate.overlap import OVERLAP_SLOWDOWN

# Views that reorder memory, so that a later reshape or contiguous() has to copy. Swapping twice restores the order.
_SWAPS = {"transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T"}
_REORDERS = {"permute", "movedim", "expand", "expand_as"}
_MAY_COPY = {"reshape", "contiguous", "flatten", "reshape_as"}
# Lowerings whose op runs on its local operands as it is, so that its measured time holds.
RUNS_AS_IT_IS = ("", Lowering.BIAS_ON_FIRST_RANK, Lowering.SUM_OVER_COUNT, Lowering.SCALED_MEAN)


@dataclass(frozen=True, slots=True)
class CostAxis:
    """A mesh axis inside a stage: its size, the shape of its groups, and how many of them share a node's network."""

    size: int
    group: GroupShape | None
    groups_per_node: int = 1


class _Memo:
    """Times by what they depend on, for all `ClassCosts` of the same device, dtype and axes."""

    def __init__(self) -> None:
        # An op at the sizes of its tensors, under the placements of operands and outputs.
        self.times: dict[tuple[int, tuple[Placement, ...], tuple[Placement, ...]], OpTime] = {}
        self.found: dict[tuple[int, tuple[Placement, ...], tuple[Placement, ...]], Found | None] = {}
        self.ops: dict[tuple[object, ...], tuple[int, Op]] = {}  # ops are kept: their ids are in the keys
        self.conversions: dict[tuple[float, float, bool, Placement, Placement], OpTime | None] = {}
        self.collectives: dict[tuple[Collective, float, int], float] = {}
        self.price_rows: dict[tuple[object, ...], dict[Placement, NDArray[np.float64]]] = {}


_memos: dict[tuple[object, ...], tuple[DeviceType, _Memo]] = {}
_MANY_MEMOS, _MANY_TIMES = 256, 1 << 17


def _memo(device: DeviceType, dtype: str, axes: tuple[CostAxis, ...], pad: int) -> _Memo:
    """The memo of this device (by identity), dtype and axes; begun anew where it or the number of memos gets large."""
    key = (id(device), dtype, axes, pad)
    kept = _memos.get(key)
    if kept is None or len(kept[1].times) > _MANY_TIMES:
        if len(_memos) >= _MANY_MEMOS:
            _memos.clear()
        kept = _memos[key] = device, _Memo()
    return kept[1]


class _Facts:
    """What costs ask of a class whatever the rows and axes."""

    def __init__(self, cls: BlockClass) -> None:
        self.cls = cls
        self.static = frozenset(cls.params) | frozenset(cls.buffers)
        self.num_consumers = Counter(name for op in cls.ops for name in set(op.operands))
        self.copies = self._copies()
        self._widths: dict[tuple[str, str], dict[str, int]] = {}

    def element_bytes(self, captured_dtype: str, dtype: str) -> dict[str, int]:
        """Bytes an element of each tensor where the class computes in this dtype."""
        key = captured_dtype, dtype
        if key not in self._widths:
            self._widths[key] = element_bytes(self.cls, captured_dtype, dtype)
        return self._widths[key]

    def _copies(self) -> frozenset[str]:
        """Names of reshape-like ops whose operand is not contiguous, so that they copy.

        Fused attention leaves its result as (batch, sequence, heads, features): out of order until it is transposed.
        """
        reordered: set[str] = set()
        found = set()
        for op in self.cls.ops:
            name, kind = base_name(op.target), op_kind(op.target)
            if kind is OpKind.ATTENTION:
                reordered.add(op.outputs[0])
            if kind is not OpKind.VIEW or not op.operands:
                continue
            is_reordered = op.operands[0] in reordered
            if name in _MAY_COPY and is_reordered and self._shape_changes(op):
                found.add(op.name)
            elif name in _REORDERS or (name in _SWAPS) != is_reordered:
                reordered.update(output for output in op.outputs if output)
        return frozenset(found)

    def _shape_changes(self, op: Op) -> bool:
        """Whether a view op gives another shape than it takes (contiguous() always may copy)."""
        given, got = self.cls.tensor[op.operands[0]].shape, self.cls.tensor[op.outputs[0]].shape
        return given != got or base_name(op.target) == "contiguous"


_kept_facts: dict[int, _Facts] = {}
_MANY_CLASSES = 1024


def _facts_of(cls: BlockClass) -> _Facts:
    """The facts of this class, by identity; they keep it."""
    found = _kept_facts.get(id(cls))
    if found is None:
        if len(_kept_facts) >= _MANY_CLASSES:
            _kept_facts.clear()
        found = _kept_facts[id(cls)] = _Facts(cls)
    return found


class ClassCosts:
    """Times and bytes of one class's ops for `rows` rows on one device of a tensor axis of `tp` ranks.

    `dtype` is the compute dtype. Every tensor's bytes are those of `element_bytes`, whatever the capture's dtype.
    With `outer` axes before the tensor axis, states and strategies are tuples of one an axis, outermost first; a tensor
    axis of one rank is then left out. A rank's part of a dim that an axis does not divide is a multiple of `pad`.
    """

    def __init__(
        self, graph: ModelGraph, cls: BlockClass, *, tp: int, rows: float, device: DeviceType,
        tp_group: GroupShape | None, dtype: str, tp_groups_per_node: int = 1, outer: Sequence[CostAxis] = (),
        pad: int = 1,
    ) -> None:
        assert graph.rows_are_tagged or rows == graph.rows, "only a graph with tagged rows can be rescaled"
        self.graph, self.cls, self.tp, self.rows, self.device = graph, cls, tp, rows, device
        self.tp_group, self.dtype, self.tp_groups_per_node = tp_group, dtype, tp_groups_per_node
        self.outer, self.pad = tuple(outer), pad
        self.axes = (*outer, CostAxis(tp, tp_group, tp_groups_per_node)) if tp > 1 or not outer else self.outer
        self.sizes = tuple(axis.size for axis in self.axes)
        self._memo, self._facts = _memo(device, dtype, self.axes, pad), _facts_of(cls)
        width = self._facts.element_bytes(graph.captured_dtype, dtype)
        ratio = rows / graph.rows
        tagged = graph.rows_are_tagged
        self._whole = {
            info.name: LocalTensor(
                tuple(dim * ratio if tagged and dim and dim % graph.rows == 0 else float(dim) for dim in info.shape),
                width[info.name], info.requires_grad,
            )
            for info in cls.tensors
        }
        self._by_rows = {info.name: tagged and graph.depends_on_rows(info.numel) for info in cls.tensors}
        self._ratio = ratio
        self._table = op_table(device)
        self._op_numbers: dict[str, int] = {}

    @property
    def price_rows(self) -> dict[tuple[object, ...], dict[Placement, NDArray[np.float64]]]:
        """Kept for a search's tables of conversions, by all that tells a tensor's, whatever the class."""
        return self._memo.price_rows

    def on_axes(self, axes: Sequence[CostAxis]) -> ClassCosts:
        """The costs on these axes instead, outermost first."""
        last = axes[-1]
        return ClassCosts(
            self.graph, self.cls, tp=last.size, rows=self.rows, device=self.device, tp_group=last.group,
            dtype=self.dtype, tp_groups_per_node=last.groups_per_node, outer=axes[:-1], pad=self.pad,
        )

    def whole(self, name: str) -> LocalTensor:
        """The whole tensor at these rows."""
        return self._whole[name]

    def local(self, name: str, state: State | Placement) -> LocalTensor:
        """What one rank holds of a tensor in a state."""
        whole = self._whole[name]
        shape: list[float] | None = None
        for own, size in zip(_each(state), self.sizes, strict=True):
            if own.kind is Kind.SHARDED and size > 1:
                shape = shape or list(whole.shape)
                shape[own.dim] = self._part(own.length, size) if own.length else shape[own.dim] / size
        return LocalTensor(tuple(shape), whole.element_bytes, whole.requires_grad) if shape else whole

    def _part(self, length: int, size: int) -> int:
        """What a rank has of a dim of a length that the axis does not divide."""
        return -(-length // (size * self.pad)) * self.pad

    def scale(self, op: Op) -> float:
        """What to multiply the op's captured FLOPs with, to have them at these rows."""
        names = (*op.operands, *(output for output in op.outputs if output))
        return self._ratio if any(self._by_rows[name] for name in names) else 1.0

    def parts(self, strategy: Strategy | JointStrategy | None) -> int:
        """Into how many parts the strategy cuts the op's work."""
        return math.prod(size for own, size in zip(_strategies(strategy), self.sizes, strict=False) if own.factor)

    def _padding(self, strategy: Strategy | JointStrategy | None) -> float:
        """How much more than its even part of the work a rank does, padding included."""
        ratio = 1.0
        for own, size in zip(_strategies(strategy), self.sizes, strict=False):
            length = max((state.length for state in (*own.inputs, *own.outputs)), default=0)
            ratio *= self._part(length, size) * size / length if length else 1.0
        return ratio

    def saved_extra_bytes(self, op: Op, strategy: Strategy | JointStrategy | None) -> float:
        """What the op keeps on this rank besides tensors of the graph."""
        return self._own_extra_bytes(op, strategy) + sum(cost.saved_bytes for _, cost in self.lowerings(op, strategy))

    def in_steps_bytes(self, op: Op, strategy: Strategy | JointStrategy | None) -> float:
        """What else the op keeps where torch has no kernel for it and does it in steps: a CPU's norms by mean squares.

        Those keep what they have divided in float32, and their input in float32 where it is narrower.
        """
        if base_name(op.target) != "rms_norm" or not self.device.name.startswith("CPU"):
            return 0.0
        whole = self._whole[op.operands[0]]
        wide = 4 * (1 if whole.element_bytes >= 4 else 2)
        return wide * whole.size_bytes / whole.element_bytes / self.parts(strategy)

    def _own_extra_bytes(self, op: Op, strategy: Strategy | JointStrategy | None) -> float:
        return op.saved_extra_bytes * self.scale(op) / self.parts(strategy)

    def lowerings(self, op: Op, strategy: Strategy | JointStrategy | None) -> list[tuple[CostAxis, LoweringCost]]:
        """What the special program of each axis's strategy adds to the op."""
        each = _strategies(strategy)
        found = []
        for at, (own, axis) in enumerate(zip(each, self.axes, strict=False)):
            if not own.lowering or axis.size == 1:
                continue
            # A tensor as the other axes leave it to this one.
            places = {
                name: tuple(R if i == at else state for i, state in enumerate(place))
                for names, placed in zip((op.operands, op.outputs), self.placements(op, strategy), strict=True)
                for name, place in zip(names, placed, strict=True) if name
            }

            def whole(name: str, places: dict[str, Placement] = places) -> LocalTensor:
                return self.local(name, places[name])

            found.append((axis, lowering_cost(self.cls, op, own, axis.size, whole)))
        return found

    def lowering_comm(self, op: Op, strategy: Strategy | JointStrategy | None) -> OpTime:
        """Seconds of the collectives of the op's special programs, forward and backward."""
        forward = backward = 0.0
        for axis, found in self.lowerings(op, strategy):
            own = self.op_time(op, strategy)
            forward += sum(self.exchange_time_s(item, axis, own.forward_s) for item in found.forward)
            backward += sum(self.exchange_time_s(item, axis, own.backward_s) for item in found.backward)
        return OpTime(forward, backward)

    def exchange_time_s(self, item: Exchange, axis: CostAxis, compute_s: float) -> float:
        """Seconds that a lowering's collective adds to an op that computes for `compute_s` in the same direction."""
        time_s = collective_time_s(item.collective, item.size_bytes, axis.group, groups_per_node=axis.groups_per_node)
        hidden_s = min(time_s, item.behind * compute_s)
        return time_s - (1 - OVERLAP_SLOWDOWN) * hidden_s

    def op_time(self, op: Op, strategy: Strategy | JointStrategy | None = None) -> OpTime:
        """Seconds of the op on this rank, forward and backward; without a strategy it runs whole."""
        inputs, outputs = self.placements(op, strategy)
        key = (self._number(op), inputs, outputs)
        found = self._memo.times.get(key)
        if found is not None:
            return found
        measured = self._measured(op, strategy)
        if measured is not None:
            self._memo.times[key] = measured.time
            return measured.time
        parts = self.parts(strategy)
        share = self.scale(op) / parts * self._padding(strategy)
        operands = [self.local(name, state) for name, state in zip(op.operands, inputs, strict=True)]
        results = [self.local(name, state) for name, state in zip(op.outputs, outputs, strict=False) if name]
        saved = sum(self._whole[name].size_bytes / parts for name in op.saved if name in self._whole)
        found = op_time_s(
            op, operands, results, self.device, self.dtype, flops=op.flops * share,
            backward_flops=op.backward_flops * share, saved_bytes=saved,
            extra_bytes=self._own_extra_bytes(op, strategy), is_copy=op.name in self.copies,
        )
        bandwidth = memory_bandwidth(self.device)
        for _, moved in self.lowerings(op, strategy):
            launch_s = self.device.kernel_launch_s
            found = OpTime(
                found.forward_s + max(moved.forward_moved_bytes / bandwidth, moved.forward_calls * launch_s),
                found.backward_s + max(moved.backward_moved_bytes / bandwidth, moved.backward_calls * launch_s),
            )
        self._memo.times[key] = found
        return found

    def _number(self, op: Op) -> int:
        """Stands for the op at these rows: for its arguments, its tensors at their sizes, and whether it copies."""
        number = self._op_numbers.get(op.name)
        if number is None:
            names = (*op.operands, *op.outputs, *op.saved)
            key = (id(op), op.name in self.copies, self.scale(op), *(self._whole.get(name) for name in names))
            number, _ = self._memo.ops.setdefault(key, (len(self._memo.ops), op))
            self._op_numbers[op.name] = number
        return number

    def _measured(self, op: Op, strategy: Strategy | JointStrategy | None) -> Found | None:
        """What the device's profile says of the op on this rank; None where it says nothing."""
        if self._table is None or any(own.lowering not in RUNS_AS_IT_IS for own in _strategies(strategy)):
            return None
        inputs, outputs = self.placements(op, strategy)
        key = (self._number(op), inputs, outputs)
        if key not in self._memo.found:
            self._memo.found[key] = self._table.find(
                op, [self.local(name, state) for name, state in zip(op.operands, inputs, strict=True)],
                [self.local(name, state) for name, state in zip(op.outputs, outputs, strict=False) if name],
                self.dtype, is_copy=op.name in self.copies,
            )
        return self._memo.found[key]

    def source(self, op: Op, strategy: Strategy | JointStrategy | None = None) -> Source:
        """Where the op's time comes from."""
        found = self._measured(op, strategy)
        return found.source if found is not None else Source.MODELLED

    def issue_time(self, op: Op, strategy: Strategy | JointStrategy | None = None) -> OpTime:
        """Seconds that the host needs to issue the op, forward and backward, where it runs ahead of the device."""
        found = self._measured(op, strategy)
        if found is not None:
            return found.host
        return dispatch_s(op, self.device, any(self._whole[name].requires_grad for name in op.outputs if name))

    def placements(
        self, op: Op, strategy: Strategy | JointStrategy | None
    ) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        """The placements of the op's operands and outputs."""
        if strategy is None:
            whole = replicated(len(self.axes))
            return (whole,) * len(op.operands), (whole,) * len(op.outputs)
        each = _strategies(strategy)
        inputs = tuple(zip(*(own.inputs for own in each), strict=True))
        return inputs, tuple(zip(*(own.outputs for own in each), strict=True))

    def conversions(
        self, name: str, src: State | Placement, dst: State | Placement
    ) -> tuple[tuple[int, float, Conversion], ...] | None:
        """The conversions, (axis, share of the tensor that its group holds, what is done), from one to another."""
        whole = self._whole[name]
        return conversions(
            _each(src), _each(dst), whole.requires_grad, self.sizes, summed_at_once(whole.numel)
        )

    def conversion_time(self, name: str, src: State | Placement, dst: State | Placement) -> OpTime | None:
        """Seconds that turning a tensor from one state into another takes; None where no conversion exists."""
        whole = self._whole[name]
        key = (whole.size_bytes, whole.element_bytes, whole.requires_grad, _each(src), _each(dst))
        known = self._memo.conversions
        if key not in known:
            found = self.conversions(name, src, dst)
            times = None if found is None else [
                self.step_time(name, step, axis=axis, share=share) for axis, share, step in found
            ]
            known[key] = None if times is None else OpTime(
                sum(time.forward_s for time in times), sum(time.backward_s for time in times)
            )
        return known[key]

    def step_time(self, name: str, step: Conversion, *, axis: int = -1, share: float = 1.0) -> OpTime:
        """Seconds of a conversion's collectives on an axis whose groups hold a share of the tensor."""
        size = self._whole[name].size_bytes * share
        return OpTime(*(
            self._collective_s(kind, size, axis) if kind else 0.0 for kind in (step.forward, step.backward)
        ))

    def _collective_s(self, kind: Collective, size_bytes: float, axis: int) -> float:
        key = (kind, size_bytes, axis)
        found = self._memo.collectives.get(key)
        if found is None:
            own = self.axes[axis]
            found = collective_time_s(kind, size_bytes, own.group, groups_per_node=own.groups_per_node)
            self._memo.collectives[key] = found
        return found

    def param_time_s(self, name: str, state: State | Placement, num_micro_batches: int = 8) -> float:
        """Seconds that storing a parameter in a state costs a micro-batch: what a step does with it, shared out.

        Its gradient is accumulated in float32 in every micro-batch; once a step it is summed over the tensor axis if
        it is partial, reduced over data ranks (counted at the tensor axis's link, the fastest that this can be), and
        the optimizer moves 28 bytes an element (AdamW). A step of 8 micro-batches is assumed.
        """
        local = self.local(name, state)
        if not local.requires_grad:
            return 0.0
        bandwidth = memory_bandwidth(self.device)
        gradient_bytes = GRADIENT_BYTES * local.numel
        accumulate_s = (local.element_bytes + 2 * GRADIENT_BYTES) * local.numel / bandwidth
        step_s = OPTIMIZER_STEP_BYTES["adamw"] * local.numel / bandwidth
        if self.tp_group is not None:
            step_s += 2 * gradient_bytes / self.tp_group.link.bandwidth_bytes_per_s
            if _each(state)[-1].kind is Kind.REPLICATED_PARTIAL_GRAD:  # a tensor axis is the last
                step_s += collective_time_s(
                    Collective.ALL_REDUCE, gradient_bytes, self.tp_group, groups_per_node=self.tp_groups_per_node
                )
        for axis, own in zip(self.outer, _each(state), strict=False):
            if axis.group is not None and own.kind is not Kind.SHARDED:
                step_s += collective_time_s(
                    Collective.REDUCE_SCATTER, gradient_bytes, axis.group, groups_per_node=axis.groups_per_node
                )
        return accumulate_s + step_s / num_micro_batches

    def fan_out_s(self, name: str, state: State | Placement) -> float:
        """Seconds of adding up a tensor's gradients from all its consumers."""
        tensor = self.local(name, state)
        if not tensor.requires_grad or self.num_consumers[name] < 2 or name in self._facts.static:
            return 0.0
        again = self.num_consumers[name] - 1
        measured = measured_pass_s(self.device, "accumulate", tensor.numel, self.dtype)
        if measured is not None:
            return again * measured
        return again * 3 * tensor.size_bytes / memory_bandwidth(self.device)

    @property
    def num_consumers(self) -> Counter[str]:
        """How many ops read each tensor."""
        return self._facts.num_consumers

    @property
    def copies(self) -> frozenset[str]:
        """Names of reshape-like ops whose operand is not contiguous, so that they copy."""
        return self._facts.copies

    @cached_property
    def view_of(self) -> dict[str, str]:
        """For each output of a view that does not copy, and of a cast that changes nothing: what it is a view of."""
        return {
            output: op.operands[place if len(op.outputs) == len(op.operands) else 0]
            for op in self.cls.ops
            if op.operands and op.name not in self.copies and (op_kind(op.target) is OpKind.VIEW or self._is_same(op))
            for place, output in enumerate(op.outputs) if output
        }

    def _is_same(self, op: Op) -> bool:
        outputs = [self._whole[name] for name in op.outputs if name]
        return is_identity_cast(op, [self._whole[name] for name in op.operands], outputs)

    def root(self, name: str) -> str:
        """The tensor whose storage holds this one."""
        while name in self.view_of:
            name = self.view_of[name]
        return name


def _strategies(strategy: Strategy | JointStrategy | None) -> JointStrategy:
    """One strategy an axis."""
    return () if strategy is None else (strategy,) if isinstance(strategy, Strategy) else strategy


def _each(state: State | Placement) -> Placement:
    """One state an axis."""
    return (state,) if isinstance(state, State) else state
