"""What Megatron does otherwise than this trainer with a tensor axis or stages; for `simulate` with degrees.

A product whose operand is gathered along the tensor axis keeps its own part of the sequence instead, and gathers it
again in the backward while the operand's gradient is computed; that gradient is scattered while the weight's is. The
weight's gradient is added to the float32 sum by the product that computes it. So do the linears of Megatron-LM since
sequence parallelism came to it (Korthikanti et al. 2022, section 4.2.2; `--no-gradient-accumulation-fusion` turns the
last off), and those of Transformer Engine. This trainer keeps what it gathered, waits for its communication and adds in
a kernel of its own.

Whole replicas (ZeRO 0) reduce their gradients after the last backward: `--overlap-grad-reduce` is off unless it is
asked for, and NVIDIA's recipes ask for it with shared optimizer states.

A vocabulary that the axis does not divide is padded until each rank has a multiple of 128 rows
(`--make-vocab-size-divisible-by`); this trainer splits it as it is, and odd rows are slow to multiply.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.cost_models.compute import memory_bandwidth
from autopar.cost_models.memory import GRADIENT_BYTES
from autopar.cost_models.op_kinds import OpKind, op_kind
from autopar.graph.model_graph import DTYPE_BYTES, Op
from autopar.sharding.joint import Placement
from autopar.sharding.reshard import Collective
from autopar.simulate.class_costs import ClassCosts
from autopar.simulate.overlap import OVERLAP_SLOWDOWN

PADDED_TO = 128
_GATHER = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)


class AsyncProducts:
    """What the products of one block change, added up op by op in the order of the forward."""

    def __init__(self, costs: ClassCosts) -> None:
        self.costs = costs
        self.weights: dict[str, float] = {}  # parameters that products read: this rank's elements
        self.readers: dict[tuple[str, Placement, Placement], float] = {}  # gathers: seconds of their products' backward
        self.sources: dict[str, tuple[str, Placement, Placement]] = {}  # by view of what was gathered

    @property
    def any(self) -> bool:
        """Whether the block gathers a sequence for a product."""
        return bool(self.readers)

    def gathered(
        self, op: Op, wanted: tuple[Placement, ...], state: Mapping[str, Placement], backward_s: float
    ) -> dict[str, tuple[str, Placement, Placement]]:
        """The operands that a product with a weight gathers, and whose gradients it scatters, by the stored tensor.

        For each: the tensor that is gathered, its placement before and after. To be asked of every op in turn, with the
        placements of its operands and the seconds of its backward. A product may read a view of what was gathered.
        """
        costs = self.costs
        found: dict[str, tuple[str, Placement, Placement]] = {}
        for name, place in zip(op.operands, wanted, strict=True):
            source = self.sources.get(name)
            if place != state[name] and costs.root(name) not in costs.cls.params:
                steps = costs.conversions(name, state[name], place) or ()
                if [(step.forward, step.backward) for _, _, step in steps] == [_GATHER]:
                    source = name, state[name], place
            if source is not None:
                found[costs.root(name)] = source
        if op_kind(op.target) is OpKind.VIEW:
            self.sources.update((output, source) for source in found.values() for output in op.outputs if output)
            return {}
        weights = self._weights_of(op) if op_kind(op.target) is OpKind.MATMUL else []
        if not weights:
            return {}
        for operand, place in zip(op.operands, wanted, strict=True):
            if (root := costs.root(operand)) in weights:
                self.weights[root] = costs.local(operand, place).numel
        for source in dict.fromkeys(found.values()):
            self.readers[source] = self.readers.get(source, 0.0) + backward_s
        return found

    def backward(self) -> tuple[float, float, int]:
        """Seconds to add to the backward's products and to its communication, and the collectives that come new.

        The operand's gradient and the weight's take half of a product's backward each. The end of a product is not
        hidden by its loop (`cost_models.matmul`): it reads and writes a float32 sum where it wrote a narrow gradient.
        """
        communication = 0.0
        for (name, src, dst), backward_s in self.readers.items():
            time = self.costs.conversion_time(name, src, dst)
            assert time is not None
            beside = (1 - OVERLAP_SLOWDOWN) * backward_s / 2
            gather_s = time.forward_s - min((1 - OVERLAP_SLOWDOWN) * time.forward_s, beside)
            communication += gather_s - min((1 - OVERLAP_SLOWDOWN) * time.backward_s, beside)
        more_bytes = 2 * GRADIENT_BYTES - DTYPE_BYTES[self.costs.dtype]
        compute = more_bytes * sum(self.weights.values()) / memory_bandwidth(self.costs.device)
        return compute, communication, len(self.readers)

    def _weights_of(self, op: Op) -> list[str]:
        """The parameters with two dims that the op multiplies with."""
        roots = [self.costs.root(name) for name in op.operands]
        return [
            name for name in roots
            if name in self.costs.cls.params and self.costs.whole(name).requires_grad
            and len(self.costs.whole(name).shape) == 2
        ]
