"""Rewrites of a block class: the same results and gradients from the same parameters, on random tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.graph.interpret import problem_of, run_block
from autopar.graph.model_graph import Arg, Block, BlockClass, ModelGraph, Op, Ref, TensorInfo
from autopar.graph.rows import at_rows
from autopar.graph.source import capture_source, load_source
from autopar.sharding.rewrite import Rewrite, RewriteKind
from autopar.sharding.rewrites import apply_rewrite, candidates_of, rewrite_notes, rewritten

T = torch.Tensor
LINEAR = "aten.linear.default"
MERGE, SHARE, SPLIT = RewriteKind.MERGE_LINEARS, RewriteKind.SHARE_INPUT, RewriteKind.SPLIT_LINEAR


def values_of(cls: BlockClass, given: dict[str, T], weights: list[T]) -> dict[str, T]:
    """The outputs of a class, and the gradients of all that it is given, by name."""
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point() and cls.tensor[name].requires_grad)
        for name, value in given.items()
    }
    block = Block(
        name="block", cls=cls.name, inputs=cls.inputs, params=cls.params, buffers=cls.buffers,
        outputs=tuple(f"out.{name}" for name in cls.outputs),
    )
    values = {name: leaves[name] for name in cls.inputs}
    run_block(cls, block, values, leaves, leaves, torch.device("cpu"))
    outputs = [values[name] for name in block.outputs]
    torch.autograd.backward([out for out in outputs if out.requires_grad], weights)
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**{name: values[name].detach() for name in block.outputs}, **grads}


def assert_same(cls: BlockClass, changed: BlockClass) -> None:
    """Both classes give the same results and the same gradients."""
    assert (cls.inputs, cls.params, cls.buffers, cls.outputs) == (
        changed.inputs, changed.params, changed.buffers, changed.outputs,
    )
    names = [op.name for op in changed.ops]
    assert len(set(names)) == len(names)
    named = {name for op in changed.ops for name in (*op.operands, *op.outputs, *op.saved)}
    assert named <= changed.tensor.keys() | {""}
    assert problem_of(changed) is None
    assert sum(op.flops for op in changed.ops) == pytest.approx(sum(op.flops for op in cls.ops))
    assert sum(op.backward_flops for op in changed.ops) == pytest.approx(sum(op.backward_flops for op in cls.ops))
    generator = torch.Generator().manual_seed(0)

    def random(info: TensorInfo) -> T:
        if info.dtype == "bool":
            return torch.ones(info.shape, dtype=torch.bool)
        return torch.randn(info.shape, dtype=getattr(torch, info.dtype), generator=generator)

    given = {name: random(cls.tensor[name]) for name in (*cls.inputs, *cls.params, *cls.buffers)}
    weights = [random(cls.tensor[name]) for name in cls.outputs if cls.tensor[name].requires_grad]
    wanted, found = values_of(cls, given, weights), values_of(changed, given, weights)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def linears_class(rows: tuple[int, ...], k: int, sizes: list[int], *, biased: bool, extra: bool = False) -> BlockClass:
    """y_i = x w_i + b_i, each then squared; `extra`: x goes on as it is too."""
    infos = [TensorInfo(name="x", shape=(*rows, k), dtype="float64", requires_grad=True)]
    ops: list[Op] = []
    params: list[str] = []
    for i, n in enumerate(sizes):
        own = [f"w{i}", *([f"b{i}"] if biased else [])]
        params += own
        infos += [TensorInfo(name=name, shape=(n, k)[: 2 if name[0] == "w" else 1], dtype="float64", requires_grad=True)
                  for name in own]
        infos += [TensorInfo(name=f"{p}{i}", shape=(*rows, n), dtype="float64", requires_grad=True) for p in "yz"]
        ops += [
            Op(name=f"y{i}", target=LINEAR, args=(Ref("x"), *map(Ref, own)), outputs=(f"y{i}",), flops=2.0 * n,
               backward_flops=4.0 * n, saved=("x",), module=f"attn.p{i}"),
            Op(name=f"z{i}", target="aten.mul.Tensor", args=(Ref(f"y{i}"), Ref(f"y{i}")), outputs=(f"z{i}",),
               saved=(f"y{i}",)),
        ]
    outputs = tuple(f"z{i}" for i in range(len(sizes)))
    return BlockClass(
        name="block", inputs=("x",), params=tuple(params), buffers=(), outputs=(*outputs, "x") if extra else outputs,
        ops=tuple(ops), tensors=tuple(infos),
    )


def fused_class(rows: tuple[int, ...], k: int, sizes: list[int], *, biased: bool, how: str) -> BlockClass:
    """One linear of which parts are squared, taken by split, chunk or slices."""
    n, rank = sum(sizes), len(rows)
    infos = [TensorInfo(name=name, shape=shape, dtype="float64", requires_grad=True) for name, shape in (
        ("x", (*rows, k)), ("w", (n, k)), ("b", (n,)), ("y", (*rows, n)))]
    own = ("w", "b") if biased else ("w",)
    ops = [Op(name="y", target=LINEAR, args=(Ref("x"), *map(Ref, own)), outputs=("y",), flops=2.0 * n,
              backward_flops=4.0 * n, saved=("x",), module="attn.qkv")]
    parts = tuple(f"p{i}" for i in range(len(sizes)))
    if how == "slice":
        at = 0
        for part, size in zip(parts, sizes, strict=True):
            end = at + size if at + size < n else 2**63 - 1
            ops.append(Op(name=part, target="aten.slice.Tensor", args=(Ref("y"), rank, at, end), outputs=(part,)))
            at += size
    else:
        target, word = {
            "sizes": ("aten.split_with_sizes.default", tuple(sizes)), "split": ("aten.split.Tensor", sizes[0]),
            "chunk": ("aten.chunk.default", len(sizes)),
        }[how]
        ops.append(Op(name="cut", target=target, args=(Ref("y"), word, -1), outputs=parts))
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        infos += [TensorInfo(name=name, shape=(*rows, size), dtype="float64", requires_grad=True)
                  for name in (part, f"z{i}")]
        ops.append(Op(name=f"z{i}", target="aten.mul.Tensor", args=(Ref(part), Ref(part)), outputs=(f"z{i}",),
                      saved=("y",)))
    return BlockClass(
        name="block", inputs=("x",), params=own, buffers=(), outputs=tuple(f"z{i}" for i in range(len(sizes))),
        ops=tuple(ops), tensors=tuple(infos),
    )


SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=4)
ROWS = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS, k=st.integers(1, 4), sizes=SIZES, biased=st.booleans(), extra=st.booleans(),
    kind=st.sampled_from([MERGE, SHARE]),
)
def test_linears_of_one_input_are_one_op(
    rows: tuple[int, ...], k: int, sizes: list[int], biased: bool, extra: bool, kind: RewriteKind
) -> None:
    cls = linears_class(rows, k, sizes, biased=biased, extra=extra)
    assert [item.kind for item in candidates_of(cls)] == [MERGE, SHARE]
    names = tuple(f"y{i}" for i in range(len(sizes)))
    changed = apply_rewrite(cls, Rewrite(kind=kind, cls="block", ops=names))
    assert [op.target for op in changed.ops].count(LINEAR) == 0
    assert_same(cls, changed)


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS, k=st.integers(1, 4), sizes=SIZES, biased=st.booleans(),
    how=st.sampled_from(["sizes", "split", "chunk", "slice"]),
)
def test_a_linear_is_split_into_what_is_read_of_it(
    rows: tuple[int, ...], k: int, sizes: list[int], biased: bool, how: str
) -> None:
    if how in ("split", "chunk"):
        sizes = [sizes[0]] * len(sizes)
    cls = fused_class(rows, k, sizes, biased=biased, how=how)
    (rewrite,) = candidates_of(cls)
    assert rewrite == Rewrite(kind=SPLIT, cls="block", ops=("y",))
    changed = apply_rewrite(cls, rewrite)
    assert [op.target for op in changed.ops].count(LINEAR) == len(sizes)
    assert [op.saved for op in changed.ops if op.name[0] == "z"] == [(f"p{i}",) for i in range(len(sizes))]
    assert_same(cls, changed)


def test_whoever_keeps_one_result_of_a_merged_product_keeps_all() -> None:
    cls = linears_class((3,), 2, [4, 2], biased=False)
    names = ("y0", "y1")
    merged, shared = (apply_rewrite(cls, Rewrite(kind=kind, cls="block", ops=names)) for kind in (MERGE, SHARE))
    assert merged.producer["y0"].saved == ("x", "y0", "y1")
    assert shared.producer["y0"].saved == ("x",)
    assert (merged.ops[0].name, merged.ops[0].outputs, merged.ops[0].module) == ("linears", names, "attn")


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}


@cache
def captured(name: str) -> ModelGraph:
    config = {"model_type": name, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 8}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**config, **CONFIGS[name]}))
        return capture_source(load_source(folder, seq_len=8, dtype="float32"))


def layer_of(name: str, rows: int = 2) -> BlockClass:
    graph = at_rows(captured(name), rows)
    cls = graph.block_class[graph.blocks[1].cls]

    def wide(arg: Arg) -> Arg:
        if getattr(arg, "value", "") == "float32":
            return replace(arg, value="float64")  # type: ignore[type-var]
        return tuple(wide(item) for item in arg) if isinstance(arg, tuple) else arg

    return replace(
        cls, tensors=tuple(replace(i, dtype=i.dtype.replace("float32", "float64")) for i in cls.tensors),
        ops=tuple(replace(op, args=tuple(map(wide, op.args)),
                          kwargs=tuple((key, wide(arg)) for key, arg in op.kwargs)) for op in cls.ops),
    )


WANTED = {
    "llama": [(MERGE, 3), (SHARE, 3), (MERGE, 2), (SHARE, 2)], "phi3": [(SPLIT, 1), (SPLIT, 1)],
    "bert": [(MERGE, 3), (SHARE, 3)],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_rewrite_of_a_real_block_and_every_two_of_them(name: str) -> None:
    cls = layer_of(name)
    found = candidates_of(cls)
    assert [(item.kind, len(item.ops)) for item in found] == WANTED[name]
    for first in found:
        once = apply_rewrite(cls, first)
        assert_same(cls, once)
        for second in candidates_of(once):
            assert_same(cls, apply_rewrite(once, second))


def test_the_parts_of_a_split_linear_may_share_their_input() -> None:
    cls = layer_of("phi3")
    split = apply_rewrite(cls, candidates_of(cls)[1])
    assert any(item.kind is SHARE and item.ops == ("linear_2.0", "linear_2.1") for item in candidates_of(split))


def test_a_graph_is_rewritten_once_and_told() -> None:
    graph = captured("llama")
    layer = graph.block_class[graph.blocks[1].cls]
    rewrites = candidates_of(layer)[2:3]
    changed = rewritten(graph, rewrites)
    assert changed is rewritten(graph, rewrites) and rewritten(graph, ()) is graph
    assert changed.blocks == graph.blocks and changed.params == graph.params
    assert [op.target for op in changed.block_class[layer.name].ops].count("autopar.linears.default") == 1
    (note,) = rewrite_notes(graph, rewrites)
    assert "mlp.gate_proj, mlp.up_proj of LlamaDecoderLayer" in note


def other_input(cls: BlockClass) -> BlockClass:
    """The second linear reads something else."""
    ops = [replace(op, args=(Ref("z0"), *op.args[1:])) if op.name == "y1" else op for op in cls.ops]
    return replace(cls, ops=tuple(ops))


def late_weight(cls: BlockClass) -> BlockClass:
    """The second weight is computed from what the first linear gives."""
    late = Op(name="late", target="aten.matmul.default", args=(Ref("z0"), Ref("w1")), outputs=("late",))
    ops = [replace(op, args=(Ref("x"), Ref("late"))) if op.name == "y1" else op for op in cls.ops]
    info = replace(cls.tensor["w1"], name="late")
    return replace(cls, ops=(*ops[:2], late, *ops[2:]), tensors=(*cls.tensors, info))


@pytest.mark.parametrize("changed", [other_input, late_weight])
def test_linears_that_cannot_run_as_one_are_left(changed: Any) -> None:
    cls = changed(linears_class((2,), 2, [2, 2], biased=False))
    assert candidates_of(cls) == ()
    with pytest.raises(InputError, match="not linears of one input"):
        apply_rewrite(cls, Rewrite(kind=MERGE, cls="block", ops=("y0", "y1")))


def test_a_linear_of_which_more_is_read_is_not_split() -> None:
    cls = fused_class((2,), 2, [2, 3], biased=False, how="slice")
    whole = replace(cls, outputs=(*cls.outputs, "y"))
    overlapping = replace(cls, ops=tuple(
        replace(op, args=(Ref("y"), 1, 0, 3)) if op.name == "p1" else op for op in cls.ops
    ))
    for found in (whole, overlapping):
        assert candidates_of(found) == ()
        with pytest.raises(InputError, match="more is read of it than its parts"):
            apply_rewrite(found, Rewrite(kind=SPLIT, cls="block", ops=("y",)))


def test_a_view_that_needs_a_contiguous_result_keeps_linears_apart() -> None:
    cls = linears_class((2, 3), 4, [4, 4], biased=False)
    flat = Op(name="flat", target="aten.view.default", args=(Ref("y0"), (24,)), outputs=("flat",))
    info = TensorInfo(name="flat", shape=(24,), dtype="float64", requires_grad=True)
    viewed = replace(cls, ops=(*cls.ops, flat), tensors=(*cls.tensors, info), outputs=(*cls.outputs, "flat"))
    assert [item.kind for item in candidates_of(viewed)] == [SHARE]


def test_a_rewrite_of_other_ops_is_refused() -> None:
    graph = captured("llama")
    name = graph.blocks[1].cls
    for rewrite, words in (
        (Rewrite(kind=MERGE, cls="none", ops=("a", "b")), "no such block class"),
        (Rewrite(kind=MERGE, cls=name, ops=("a", "b")), "has no such ops"),
        (Rewrite(kind=MERGE, cls=name, ops=("linear", "mul")), "not all plain linears"),
        (Rewrite(kind=SPLIT, cls=name, ops=("linear", "linear_1")), "more is read"),
    ):
        with pytest.raises(InputError, match=words):
            rewritten(graph, (rewrite,))
