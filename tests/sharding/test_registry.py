"""Rules that users add for ops of their own, and ops that have none."""

from __future__ import annotations

import pytest

from autopar.errors import InputError
from autopar.graph.model_graph import Op, Ref, TensorInfo
from autopar.sharding.rules import has_rule, refusals, register_rule, strategies
from autopar.sharding.rules import registry as rules
from autopar.sharding.state import RP, P, R, shard


@pytest.fixture(autouse=True)
def _table_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def _op(*shapes: tuple[int, ...], out: tuple[int, ...]) -> tuple[Op, dict[str, TensorInfo]]:
    names = [f"x{i}" for i in range(len(shapes))]
    op = Op(name="op", target="mine.op.default", args=tuple(Ref(name) for name in names), outputs=("y",))
    described = zip([*names, "y"], [*shapes, out], strict=True)
    return op, {
        name: TensorInfo(name=name, shape=shape, dtype="float32", requires_grad=True) for name, shape in described
    }


def test_one_line_gives_an_op_a_rule() -> None:
    register_rule("mine.op.default", "b n, n k -> b k")
    assert has_rule("mine.op.default")
    found = {s.factor: (s.inputs, s.outputs) for s in strategies(*_op((4, 6), (6, 8), out=(4, 8)), 2)}
    assert found["b"] == ((shard(0), RP), (shard(0),))
    assert found["n"] == ((shard(1), shard(0)), (P,))
    assert found["k"] == ((RP, shard(1)), (shard(1),))


def test_merged_dims_ones_and_whole_factors() -> None:
    register_rule("mine.op.default", "b 1 (h d!) -> b h d")
    op, tensors = _op((4, 1, 24), out=(4, 6, 4))
    found = {s.factor: (s.inputs, s.outputs) for s in strategies(op, tensors, 2)}
    assert found["h"] == ((shard(2),), (shard(1),))
    assert "d" not in found
    assert {r.factor: r.reason for r in refusals(op, tensors, 2)} == {"d": "the rule keeps it whole"}


@pytest.mark.parametrize(
    ("equation", "words"),
    [
        ("b n, n k", "no '->'"),
        ("b (n -> b", "unbalanced"),
        ("b n-x -> b", "not a factor name"),
        ("b n -> b n", "1 operands"),
        ("b n k, n k -> b k", "3 dims"),
        ("b n, b k -> b k", "dim b is 6 here"),
        ("b (n m), l k -> b k", "does not follow"),
    ],
)
def test_a_wrong_equation_is_told_in_one_line(equation: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:  # noqa: PT012  (either the text or the shapes are wrong)
        register_rule("mine.op.default", equation)
        strategies(*_op((4, 6), (6, 8), out=(4, 8)), 2)
    assert "mine.op.default" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_op_without_a_rule_runs_whole() -> None:
    op, tensors = _op((4, 6), out=(4, 6))
    assert not has_rule(op.target)
    assert [(s.inputs, s.outputs) for s in strategies(op, tensors, 2)] == [((R,), (R,)), ((RP,), (RP,))]
    assert "has no rule" in refusals(op, tensors, 2)[0].reason
