"""Block classes as a model in evaluation runs them: nothing is dropped, and norms use their running statistics.

A model is captured in training. What else of its forward asks `self.training` in Python is captured as it was then, and
`autopar.graph.own_evaluation` finds it.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.graph.model_graph import Arg, BlockClass, Op, Ref

# Where an op says that it trains, and what it says in evaluation: (position, keyword, value).
_SWITCHES: dict[str, tuple[int, str, Arg]] = {
    "aten.dropout.default": (2, "train", False),
    "aten.native_dropout.default": (2, "train", False),
    "aten.feature_dropout.default": (2, "train", False),
    "aten.alpha_dropout.default": (2, "train", False),
    "aten.scaled_dot_product_attention.default": (4, "dropout_p", 0.0),
    "aten.batch_norm.default": (5, "training", False),
    "aten.native_batch_norm.default": (5, "training", False),
    "aten.instance_norm.default": (5, "use_input_stats", False),
    "aten.rrelu.default": (3, "training", False),
    "aten.lstm.input": (6, "train", False),
    "aten.gru.input": (6, "train", False),
    "aten.rnn_tanh.input": (6, "train", False),
    "aten.rnn_relu.input": (6, "train", False),
}


def evaluated(cls: BlockClass) -> BlockClass:
    """The class in evaluation; the same object where it computes the same in training."""
    ops = tuple(_switched(op) for op in cls.ops if not _counts_batches(op))
    return cls if ops == cls.ops else replace(cls, ops=ops)


def _counts_batches(op: Op) -> bool:
    """Whether this is the count that a norm keeps of its training batches."""
    return op.target == "aten.add_.Tensor" and isinstance(op.args[0], Ref) and op.args[0].name.endswith(
        "num_batches_tracked")


def _switched(op: Op) -> Op:
    if op.target not in _SWITCHES:
        return op
    if op.target == "aten.instance_norm.default" and op.args[3] is None:  # without running statistics
        return op
    position, keyword, value = _SWITCHES[op.target]
    if keyword in dict(op.kwargs):
        return replace(op, kwargs=tuple((key, value if key == keyword else arg) for key, arg in op.kwargs))
    if len(op.args) <= position:  # left out: every default is that of evaluation
        return op
    return replace(op, args=(*op.args[:position], value, *op.args[position + 1 :]))
