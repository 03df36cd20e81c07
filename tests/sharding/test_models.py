"""Whole models as exported: every op has a proved rule, and known plans are among their strategies."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from fx_class import export_class
from op_samples import SAMPLES

from autopar.graph.model_graph import BlockClass, Op, Ref, TensorInfo
from autopar.sharding.propagate import class_strategies
from autopar.sharding.reshard import divides
from autopar.sharding.rules import has_rule
from autopar.sharding.rules.creation import creation
from autopar.sharding.rules.registry import find_rule
from autopar.sharding.state import RP, Kind, P, R, State, shard
from autopar.sharding.strategy import ClassSharding, Strategy

MODELS = ("gpt2", "llama", "bert", "resnet50", "vit")


@cache
def exported(name: str) -> BlockClass:
    torch.manual_seed(0)
    ids = torch.randint(0, 96, (5, 8))
    pixels = {"pixel_values": torch.randn(5, 3, 32, 32), "labels": torch.randint(0, 6, (5,))}
    text = {"input_ids": ids, "labels": ids}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=1, n_embd=24, n_head=6, vocab_size=96, n_positions=16, use_cache=False, **tokens
        )
        return export_class(transformers.GPT2LMHeadModel(config), text)
    if name == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=1, hidden_size=48, num_attention_heads=12, num_key_value_heads=6, intermediate_size=96,
            vocab_size=96, use_cache=False, **tokens,
        )  # fmt: skip
        return export_class(transformers.LlamaForCausalLM(config), text)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 48}
    if name == "bert":
        config = transformers.BertConfig(vocab_size=96, max_position_embeddings=16, **sizes, **tokens)
        return export_class(transformers.BertForMaskedLM(config), text)
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=6, **sizes)
        return export_class(transformers.ViTForImageClassification(config), pixels)
    config = transformers.ResNetConfig(embedding_size=6, hidden_sizes=[12, 24], depths=[1, 2], num_labels=6)
    return export_class(transformers.ResNetForImageClassification(config), pixels)


pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn of their own deprecations


@pytest.mark.parametrize("name", MODELS)
def test_every_op_of_the_model_has_a_proved_rule(name: str) -> None:
    cls = exported(name)
    sampled = {target for target, _, _ in SAMPLES}
    for op in cls.ops:
        assert has_rule(op.target), op.target
        found = find_rule(op.target)
        assert found is not None
        runs_whole = found[0] is creation
        assert op.target in sampled or runs_whole, f"{op.target} has a rule that no sample proves"
    assert class_strategies(cls, 2).unruled == ()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_strategy_fits_its_tensors(name: str, size: int) -> None:
    cls = exported(name)
    found = class_strategies(cls, size)
    for op in cls.ops:
        choices = found[op.name]
        assert choices[0].inputs == (R,) * len(op.operands)
        assert len({(s.inputs, s.outputs, s.lowering) for s in choices}) == len(choices)
        for choice in choices:
            assert (len(choice.inputs), len(choice.outputs)) == (len(op.operands), len(op.outputs))
            placed = zip((*op.operands, *op.outputs), (*choice.inputs, *choice.outputs), strict=True)
            assert all(not tensor or divides(cls.tensor[tensor].shape, state, size) for tensor, state in placed)
            for tensor, state in zip(op.operands, choice.inputs, strict=True):
                assert state != RP or cls.tensor[tensor].requires_grad


def _follow(cls: BlockClass, size: int, first: str, wanted: State, last: str) -> dict[str, Strategy]:
    """The ops from `first` on in the strategies that pass its output's state along, through `last`."""
    found = class_strategies(cls, size)
    taken: dict[str, Strategy] = {}
    states: dict[str, State] = {}
    for op in cls.ops:
        if op.name == first:
            choice = next(s for s in found[op.name] if s.outputs[0] == wanted)
        elif any(name in states for name in op.operands):
            choice = next(
                (
                    s for s in found[op.name]
                    if s.factor and all(states.get(n, i) == i for n, i in zip(op.operands, s.inputs, strict=True))
                ),
                None,
            )  # fmt: skip
            assert choice is not None, f"{op.name} breaks the chain: {states}"
        else:
            continue
        taken[op.name] = choice
        states.update((name, state) for name, state in zip(op.outputs, choice.outputs, strict=True) if name)
        if op.name == last:
            return taken
    raise AssertionError(f"{last} is not reached")


def test_a_fused_projection_shards_in_strides_through_to_the_output_projection() -> None:
    cls = exported("gpt2")
    taken = _follow(cls, 2, "addmm", shard(1, 3), "addmm_1")
    assert taken["addmm"].inputs == (shard(0, 3), RP, shard(1, 3))
    assert taken["split"].outputs == (shard(2),) * 3
    assert taken["scaled_dot_product_attention"].inputs[:3] == (shard(1),) * 3
    assert taken["addmm_1"].inputs == (RP, shard(1), shard(0))
    assert taken["addmm_1"].outputs == (P,)


def test_the_sequence_shards_in_strides_where_it_is_flattened_with_the_batch() -> None:
    cls = exported("gpt2")
    found = class_strategies(cls, 2)
    assert any(s.inputs == (RP, shard(0, 5), RP) for s in found["addmm"])  # 5 rows of the batch lie outside
    loss = next(op for op in cls.ops if "cross_entropy" in op.target)
    assert any(s.inputs == (shard(0, 5), shard(0, 5)) and s.outputs == (P,) for s in found[loss.name])
    assert any(s.inputs == (shard(1), R) and s.outputs == (R,) for s in found[loss.name])


def test_repeated_key_heads_shard_with_their_queries() -> None:
    cls = exported("llama")
    attention = next(op for op in cls.ops if "attention" in op.target)
    by_output = {op.outputs[0]: op.name for op in cls.ops}
    found = class_strategies(cls, 3)
    for operand in attention.operands[1:3]:
        reshape = found[by_output[operand]]
        assert any(s.outputs == (shard(1),) for s in reshape), (
            "6 key heads repeated twice split by 3 with their queries"
        )
    assert any(s.inputs[:3] == (shard(1),) * 3 for s in found[attention.name])


def test_masks_and_positions_are_pinned() -> None:
    cls = exported("gpt2")
    found = class_strategies(cls, 2)
    for op in cls.ops:
        if "cumsum" in op.target or "arange" in op.target or "__and__" in op.target:
            assert [s.inputs for s in found[op.name]] == [(R,) * len(op.operands)]


def test_what_reads_a_tensor_with_gradient_is_not_pinned() -> None:
    info = [TensorInfo(name="x", shape=(4, 6), dtype="float32", requires_grad=True)]
    info += [TensorInfo(name=name, shape=(4, 6), dtype="bool") for name in ("m", "n")]
    ops = (
        Op(name="gt", target="aten.gt.Scalar", args=(Ref("x"), 0), outputs=("m",)),
        Op(name="not", target="aten.logical_not.default", args=(Ref("m"),), outputs=("n",)),
        Op(name="odd", target="mine.unknown.default", args=(Ref("n"),), outputs=("",)),
    )
    cls = BlockClass(name="c", inputs=("x",), params=(), buffers=(), outputs=("n",), ops=ops, tensors=tuple(info))
    found = class_strategies(cls, 2)
    assert [s.inputs for s in found["not"]] == [(R,), (shard(0),), (shard(1),)]
    assert found.unruled == ("odd",)
    assert [s.inputs for s in found["odd"]] == [(R,)]


def test_the_result_is_the_same_every_time() -> None:
    cls = exported("gpt2")
    assert class_strategies(cls, 2).strategies == class_strategies(cls, 2).strategies


def test_a_sharding_follows_the_rows() -> None:
    strided, plain = shard(0, 1009), shard(1)
    choice = Strategy(factor="m", inputs=(strided, RP), outputs=(strided,))
    sharding = ClassSharding(
        cls="c", inputs=(plain,), params=(shard(0, 3),), buffers=(), outputs=(plain,), ops=(("mm", choice),)
    )
    at_four = sharding.at_rows(1009, 4)
    assert at_four.strategy["mm"].inputs == (shard(0, 4), RP)
    assert at_four.params == (shard(0, 3),)
    assert at_four.inputs == (plain,)
    assert all(state.kind is Kind.SHARDED for state in at_four.strategy["mm"].outputs)
