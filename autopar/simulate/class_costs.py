"""What each op and each conversion of a block class costs at given rows, tensor axis and device.

`block_cost` sums these over a chosen sharding; a search over shardings weighs the same numbers one by one.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from autopar.cluster.cluster import DeviceType, GroupShape
from autopar.cost_models.collectives import collective_time_s
from autopar.cost_models.compute import LocalTensor, OpTime, is_identity_cast, memory_bandwidth, op_time_s
from autopar.cost_models.memory import GRADIENT_BYTES, OPTIMIZER_STEP_BYTES
from autopar.cost_models.op_kinds import OpKind, base_name, element_bytes, op_kind
from autopar.graph.model_graph import BlockClass, ModelGraph, Op
from autopar.sharding.lowering import busiest_share
from autopar.sharding.reshard import Collective, Conversion, conversion
from autopar.sharding.state import Kind, R, State
from autopar.sharding.strategy import Strategy
from autopar.simulate.lowering_costs import NOTHING, LoweringCost, lowering_cost

# Views that reorder memory, so that a later reshape or contiguous() has to copy. Swapping twice restores the order.
_SWAPS = {"transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T"}
_REORDERS = {"permute", "movedim", "expand", "expand_as"}
_MAY_COPY = {"reshape", "contiguous", "flatten", "reshape_as"}


def captured_dtype(graph: ModelGraph) -> str:
    """The dtype that most parameters were captured in (float32 for a model without parameters)."""
    counts = Counter(info.dtype for info in graph.params)
    return counts.most_common(1)[0][0] if counts else "float32"


class ClassCosts:
    """Times and bytes of one class's ops for `rows` rows on one device of a tensor axis of `tp` ranks.

    `dtype` is the compute dtype. Every tensor's bytes are those of `element_bytes`, whatever the capture's dtype.
    """

    def __init__(
        self, graph: ModelGraph, cls: BlockClass, *, tp: int, rows: float, device: DeviceType,
        tp_group: GroupShape | None, dtype: str, tp_groups_per_node: int = 1,
    ) -> None:
        assert graph.rows_are_tagged or rows == graph.rows, "only a graph with tagged rows can be rescaled"
        self.graph, self.cls, self.tp, self.rows, self.device = graph, cls, tp, rows, device
        self.tp_group, self.dtype, self.tp_groups_per_node = tp_group, dtype, tp_groups_per_node
        width = element_bytes(cls, captured_dtype(graph), dtype)
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
        self._times: dict[tuple[str, tuple[State, ...], tuple[State, ...]], OpTime] = {}

    def whole(self, name: str) -> LocalTensor:
        """The whole tensor at these rows."""
        return self._whole[name]

    def local(self, name: str, state: State) -> LocalTensor:
        """What one rank holds of a tensor in a state."""
        whole = self._whole[name]
        if state.kind is not Kind.SHARDED or self.tp == 1:
            return whole
        shape = tuple(dim / self.tp if i == state.dim else dim for i, dim in enumerate(whole.shape))
        return LocalTensor(shape, whole.element_bytes, whole.requires_grad)

    def scale(self, op: Op) -> float:
        """What to multiply the op's captured FLOPs with, to have them at these rows."""
        names = (*op.operands, *(output for output in op.outputs if output))
        return self._ratio if any(self._by_rows[name] for name in names) else 1.0

    def saved_extra_bytes(self, op: Op, strategy: Strategy | None) -> float:
        """What the op keeps on this rank besides tensors of the graph."""
        return self._own_extra_bytes(op, strategy) + self.lowering(op, strategy).saved_bytes

    def _own_extra_bytes(self, op: Op, strategy: Strategy | None) -> float:
        return op.saved_extra_bytes * self.scale(op) / (self.tp if _splits(strategy) else 1)

    def lowering(self, op: Op, strategy: Strategy | None) -> LoweringCost:
        """What the special program of a strategy adds to the op."""
        if strategy is None or not strategy.lowering or self.tp == 1:
            return NOTHING
        return lowering_cost(self.cls, op, strategy, self.tp, self.whole)

    def lowering_comm(self, op: Op, strategy: Strategy | None) -> OpTime:
        """Seconds of the collectives of the op's special program, forward and backward."""
        found = self.lowering(op, strategy)
        return OpTime(*(
            sum(
                collective_time_s(
                    item.collective, item.size_bytes, self.tp_group, groups_per_node=self.tp_groups_per_node
                )
                for item in exchanges
            )
            for exchanges in (found.forward, found.backward)
        ))

    def op_time(self, op: Op, strategy: Strategy | None = None) -> OpTime:
        """Seconds of the op on this rank, forward and backward; without a strategy it runs whole."""
        inputs = strategy.inputs if strategy is not None else (R,) * len(op.operands)
        outputs = strategy.outputs if strategy is not None else (R,) * len(op.outputs)
        key = (op.name, inputs, outputs)
        found = self._times.get(key)
        if found is not None:
            return found
        share = self.scale(op)
        if strategy is not None and strategy.factor:
            share *= busiest_share(strategy.lowering, self.tp)
        operands = [self.local(name, state) for name, state in zip(op.operands, inputs, strict=True)]
        results = [self.local(name, state) for name, state in zip(op.outputs, outputs, strict=False) if name]
        saved = sum(
            self._whole[name].size_bytes / (self.tp if _splits(strategy) else 1)
            for name in op.saved if name in self._whole
        )
        found = op_time_s(
            op, operands, results, self.device, self.dtype, flops=op.flops * share,
            backward_flops=op.backward_flops * share, saved_bytes=saved,
            extra_bytes=self._own_extra_bytes(op, strategy), is_copy=op.name in self.copies,
        )
        moved = self.lowering(op, strategy)
        if moved.forward_moved_bytes or moved.backward_moved_bytes:
            bandwidth = memory_bandwidth(self.device)
            found = OpTime(
                found.forward_s + moved.forward_moved_bytes / bandwidth,
                found.backward_s + moved.backward_moved_bytes / bandwidth,
            )
        self._times[key] = found
        return found

    def conversion_time(self, name: str, src: State, dst: State) -> OpTime | None:
        """Seconds that turning a tensor from one state into another takes; None where no conversion exists."""
        found = conversion(src, dst, self._whole[name].requires_grad)
        return None if found is None else self.step_time(name, found)

    def step_time(self, name: str, step: Conversion) -> OpTime:
        """Seconds of a conversion's collectives on a tensor, forward and backward."""
        size = self._whole[name].size_bytes
        return OpTime(*(
            collective_time_s(kind, size, self.tp_group, groups_per_node=self.tp_groups_per_node) if kind else 0.0
            for kind in (step.forward, step.backward)
        ))

    def param_time_s(self, name: str, state: State, num_micro_batches: int = 8) -> float:
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
            if state.kind is Kind.REPLICATED_PARTIAL_GRAD:
                step_s += collective_time_s(
                    Collective.ALL_REDUCE, gradient_bytes, self.tp_group, groups_per_node=self.tp_groups_per_node
                )
        return accumulate_s + step_s / num_micro_batches

    def fan_out_s(self, name: str, state: State) -> float:
        """Seconds of adding up a tensor's gradients from all its consumers."""
        tensor = self.local(name, state)
        if not tensor.requires_grad or self.num_consumers[name] < 2 or name in self._static:
            return 0.0
        bandwidth = memory_bandwidth(self.device)
        return (self.num_consumers[name] - 1) * 3 * tensor.size_bytes / bandwidth

    @cached_property
    def _static(self) -> frozenset[str]:
        return frozenset(self.cls.params) | frozenset(self.cls.buffers)

    @cached_property
    def num_consumers(self) -> Counter[str]:
        """How many ops read each tensor."""
        return Counter(name for op in self.cls.ops for name in set(op.operands))

    @cached_property
    def copies(self) -> frozenset[str]:
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
            if name in _MAY_COPY and is_reordered and self.shape_changes(op):
                found.add(op.name)
            elif name in _REORDERS or (name in _SWAPS) != is_reordered:
                reordered.update(output for output in op.outputs if output)
        return frozenset(found)

    def shape_changes(self, op: Op) -> bool:
        """Whether a view op gives another shape than it takes (contiguous() always may copy)."""
        given, got = self.cls.tensor[op.operands[0]].shape, self.cls.tensor[op.outputs[0]].shape
        return given != got or base_name(op.target) == "contiguous"

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


def _splits(strategy: Strategy | None) -> bool:
    """Whether the strategy gives each rank a part of the work."""
    return strategy is not None and strategy.factor != ""
