"""Where recomputation stops: when the last tensor that autograd keeps of a function is there again.

torch.utils.checkpoint without reentrance, which runs recomputed blocks and attention cores, ends the second forward
there (`set_checkpoint_early_stop`, on by default since PyTorch 2.1). An ATen op hands autograd what it reads before it
computes and what it gives after that; other ops, autograd functions of their own, hand over everything at their end.
A transformer layer's last product is then not computed again, nor is its result summed over a tensor axis: a third of
GPT-2's products. A compiled block is one autograd function and runs to its end. So does what Megatron-LM and DeepSpeed
recompute, in functions of their own: counted where degrees are simulated and parameters are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.cost_models.op_kinds import OpKind, op_kind
from autopar.graph.model_graph import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The last op of which something is kept (none where nothing is), and whether it is computed again itself."""

    op: str = ""
    runs: bool = False


def early_stop(ops: Sequence[Op], as_it_is: Callable[[Op], bool]) -> Stop:
    """Where running these ops again stops. `as_it_is`: whether an op runs as one ATen call and not by a program."""
    for op in reversed(ops):
        if op.saved or op.saved_extra_bytes:
            copies = op_kind(op.target) is OpKind.MATMUL  # what a product keeps besides are copies of what it reads
            keeps_own = (op.saved_extra_bytes > 0 and not copies) or not set(op.saved).isdisjoint(op.outputs)
            return Stop(op=op.name, runs=keeps_own or not op.target.startswith("aten.") or not as_it_is(op))
    return Stop()
