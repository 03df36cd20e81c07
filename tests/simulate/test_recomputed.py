"""Where recomputation stops, op by op."""

from __future__ import annotations

from autopar.graph.model_graph import Op
from autopar.simulate.recomputed import Stop, early_stop


def op(name: str, *saved: str, target: str = "aten.mul.Tensor", extra: int = 0) -> Op:
    """An op that gives a tensor of its own name."""
    return Op(name=name, target=target, args=(), outputs=(name,), saved=saved, saved_extra_bytes=extra)


def stop(*ops: Op, special: str = "") -> Stop:
    return early_stop(ops, lambda own: own.name != special)


def test_what_an_op_reads_is_kept_before_it_computes() -> None:
    assert stop(op("a", "x"), op("b", "a"), op("c")) == Stop(op="b", runs=False)


def test_what_an_op_gives_is_kept_after_it_computed() -> None:
    assert stop(op("a", "x"), op("b", "a", "b"), op("c")) == Stop(op="b", runs=True)
    assert stop(op("a", "x"), op("b", "a", extra=4), op("c")) == Stop(op="b", runs=True)


def test_copies_of_a_products_operands_are_made_before_it() -> None:
    assert stop(op("a", "x", target="aten.matmul.default", extra=4)) == Stop(op="a", runs=False)


def test_programs_of_ours_keep_at_their_end() -> None:
    assert stop(op("a", "x", target="autopar.linears.default")) == Stop(op="a", runs=True)
    assert stop(op("a", "x"), special="a") == Stop(op="a", runs=True)


def test_nothing_kept_is_nothing_run() -> None:
    assert stop(op("a"), op("b")) == Stop()
