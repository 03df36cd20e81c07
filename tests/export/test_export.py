"""Settings for other systems say what the plan says, in their own words, and name what they leave out."""

import itertools
import re
import shlex
import tomllib
from dataclasses import replace

import pytest

from autopar.errors import InputError
from autopar.export.megatron import to_megatron
from autopar.export.torchtitan import to_torchtitan
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage, Variant


def make_plan(
    splits: tuple[int, ...] = (0, 3, 6), *, mesh: Mesh | None = None, zero: int = 3, **changes: object
) -> Plan:
    """A pipeline over a model of four layers, cut before the given blocks."""
    mesh = mesh or Mesh(dp_shard=2, tp=2)
    stages = tuple(
        Stage(first=first, last=last, devices=tuple(range(i * mesh.size, (i + 1) * mesh.size)), mesh=mesh, zero=zero,
              recompute=Recompute.FULL)
        for i, (first, last) in enumerate(itertools.pairwise(splits))
    )
    plan = Plan(
        model_name="llama", model_fingerprint="m", cluster_name="1x8xH100-80GB", cluster_fingerprint="c",
        num_devices=mesh.size * len(stages), global_batch=16, seq_len=128, dtype="bfloat16", param_dtype="float32",
        optimizer="adamw", micro_batch=2, num_micro_batches=4, schedule=Schedule.ONE_F_ONE_B, sequence_parallel=True,
        stages=stages, blocks=("prologue", *(f"model.layers.{i}" for i in range(4)), "epilogue"),
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def test_layers_are_counted_without_embedding_and_head() -> None:
    plan = make_plan((0, 2, 6))
    assert [plan.layers(stage) for stage in plan.stages] == [(0, 1), (1, 4)]


def test_torchtitan_settings_are_toml_and_say_every_degree() -> None:
    settings = to_torchtitan(make_plan())
    read = tomllib.loads(settings.text)
    assert read["parallelism"] == {
        "data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 2, "fsdp_reshard_after_forward": "always",
        "tensor_parallel_degree": 2, "context_parallel_degree": 1, "expert_parallel_degree": 1,
        "pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1B", "pipeline_parallel_microbatch_size": 2,
        "module_fqns_per_model_part": [["tok_embeddings", "layers.0", "layers.1"],
                                       ["layers.2", "layers.3", "norm", "output"]],
    }
    assert read["training"] == {"local_batch_size": 8, "global_batch_size": 16, "seq_len": 128,
                                "mixed_precision_param": "bfloat16"}
    assert read["activation_checkpoint"] == {"mode": "full"}
    assert settings.not_expressed == ()


def test_torchtitan_says_what_it_leaves_out() -> None:
    gaps = " ".join(to_torchtitan(make_plan(zero=1, sequence_parallel=False, dtype="float16")).not_expressed)
    assert "ZeRO-1" in gaps
    assert "without sequence parallelism" in gaps
    assert "float16" in gaps


def test_megatron_arguments() -> None:
    words = shlex.split(to_megatron(make_plan(zero=1)).text.replace("\\\n", " "))
    assert words[words.index("--tensor-model-parallel-size") + 1] == "2"
    assert words[words.index("--pipeline-model-parallel-size") + 1] == "2"
    assert {"--sequence-parallel", "--bf16", "--use-distributed-optimizer"} <= set(words)
    assert words[words.index("--recompute-granularity") + 1] == "full"
    assert "--pipeline-model-parallel-layout" not in words


@pytest.mark.parametrize(("micro_batches", "size", "rounds_alike"), [(4, None, True), (5, "5", False), (9, "3", False)])
def test_rounds_of_interleaved_micro_batches(micro_batches: int, size: str | None, rounds_alike: bool) -> None:
    plan = make_plan((0, 2, 3, 4, 6), schedule=Schedule.INTERLEAVED, num_micro_batches=micro_batches)
    stages = tuple(
        replace(stage, devices=plan.stages[i % 2].devices, virtual=i // 2) for i, stage in enumerate(plan.stages)
    )
    plan = replace(plan, stages=stages, num_devices=8, global_batch=4 * micro_batches)
    words = shlex.split(to_megatron(plan).text.replace("\\\n", " "))
    option = "--microbatch-group-size-per-virtual-pipeline-stage"
    assert (words[words.index(option) + 1] if option in words else None) == size
    assert any("interleaved ranks" in gap for gap in to_torchtitan(plan).not_expressed) is not rounds_alike


def mixed_plan() -> Plan:
    plan = make_plan(zero=1)
    full, none = Variant(recompute=Recompute.FULL), Variant()
    stages = plan.stages[0].with_variants([full, none]), plan.stages[1].with_variants([none, Variant(offload=True)])
    return replace(plan, stages=(replace(stages[0], offload_optimizer=True), stages[1]))


def test_layers_that_recompute_differently() -> None:
    """Megatron-LM's block method recomputes the first layers of a stage, as a mixed plan does."""
    settings = to_megatron(mixed_plan())
    words = shlex.split(settings.text.replace("\\\n", " "))
    assert words[words.index("--recompute-method") + 1] == "block"
    assert words[words.index("--recompute-num-layers") + 1] == "1"
    gaps = " ".join(settings.not_expressed)
    assert "stages that recompute [1, 0] layers" in gaps
    assert "activations in host memory" in gaps
    assert "optimizer state in host memory" in gaps
    settings = to_torchtitan(mixed_plan())
    assert tomllib.loads(settings.text)["activation_checkpoint"] == {"mode": "full"}
    assert "layers that recompute differently: `full`" in " ".join(settings.not_expressed)


def test_megatron_lays_out_uneven_stages() -> None:
    text = to_megatron(make_plan((0, 2, 6))).text
    assert re.search(r"--pipeline-model-parallel-layout 'Et\|tttL'", text)


@pytest.mark.parametrize("export", [to_torchtitan, to_megatron])
def test_stages_that_differ_are_refused(export: object) -> None:
    plan = make_plan()
    first, second = plan.stages
    uneven = replace(plan, stages=(first, replace(second, zero=1)))
    with pytest.raises(InputError, match="stage 1 has another mesh"):
        export(uneven)  # type: ignore[operator]
