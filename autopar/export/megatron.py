"""A plan as Megatron-LM arguments (megatron/training/arguments.py, core 0.12 and later)."""

from __future__ import annotations

import shlex

from autopar.export.settings import Settings, common_gaps, even_layers, main_recompute, num_chunks, one_mesh
from autopar.plan.plan import MIXED, Plan, Recompute, Schedule, Stage
from autopar.simulate.schedules import round_size

OPTIMIZERS = {"adamw": "adam", "adam": "adam", "sgd": "sgd"}
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}


def to_megatron(plan: Plan) -> Settings:
    """The arguments that reproduce the plan, one a line; the model's own stay the user's to give."""
    mesh, zero = one_mesh(plan, "Megatron-LM")
    chunks = num_chunks(plan)
    num_ranks = len(plan.stages) // chunks
    gaps = common_gaps(plan)
    arguments: list[tuple[str, ...]] = [
        ("--tensor-model-parallel-size", str(mesh.tp)),
        ("--pipeline-model-parallel-size", str(num_ranks)),
        ("--context-parallel-size", str(mesh.cp)),
        ("--expert-model-parallel-size", str(mesh.ep)),
        ("--micro-batch-size", str(plan.micro_batch)),
        ("--global-batch-size", str(plan.global_batch)),
    ]
    if plan.seq_len:
        arguments.append(("--seq-length", str(plan.seq_len)))
    if plan.sequence_parallel:
        arguments.append(("--sequence-parallel",))
    if plan.dtype in ("bfloat16", "float16"):
        arguments.append(("--bf16" if plan.dtype == "bfloat16" else "--fp16",))
    if num_ranks > 1:
        if plan.blocks and (chunks > 1 or not even_layers(plan)):
            arguments.append(("--pipeline-model-parallel-layout", "|".join(_layout(plan, s) for s in plan.stages)))
        if plan.schedule in (Schedule.GPIPE, Schedule.ZERO_BUBBLE):
            gaps.append(f"the {plan.schedule} schedule: Megatron-LM runs 1F1B, interleaved with virtual stages")
        if chunks > 1 and (size := round_size(num_ranks, plan.num_micro_batches)) != num_ranks:
            arguments.append(("--microbatch-group-size-per-virtual-pipeline-stage", str(size)))
    if zero == 1:
        arguments.append(("--use-distributed-optimizer",))
    elif zero > 1:
        arguments += [("--use-megatron-fsdp",), ("--use-distributed-optimizer",),
                      ("--data-parallel-sharding-strategy", SHARDING[zero])]
    if zero and mesh.dp_replicate > 1:
        arguments.append(("--num-distributed-optimizer-instances", str(mesh.dp_replicate)))
    recompute = main_recompute(plan, plan.stages[0])
    mixed = [stage for stage in plan.stages if stage.recompute_word == MIXED]
    if mixed:
        full = [stage.recompute_layers(plan.num_layers(stage))["full"] for stage in plan.stages]
        # Megatron-LM's block method recomputes the first layers of every stage.
        arguments += [("--recompute-granularity", "full"), ("--recompute-method", "block"),
                      ("--recompute-num-layers", str(max(full)))]
        if len(set(full)) > 1:
            gaps.append(f"stages that recompute {full} layers: the largest number is written for all")
        if any(stage.recompute_layers(plan.num_layers(stage))["selective"] for stage in plan.stages):
            gaps.append("selective recomputation of some layers beside full recomputation of others")
    elif recompute is Recompute.FULL:
        arguments += [("--recompute-granularity", "full"), ("--recompute-method", "uniform"),
                      ("--recompute-num-layers", "1")]
    elif recompute is Recompute.SELECTIVE:
        arguments.append(("--recompute-granularity", "selective"))
    if plan.optimizer in OPTIMIZERS:
        arguments.append(("--optimizer", OPTIMIZERS[plan.optimizer]))
    else:
        gaps.append(f"the optimizer {plan.optimizer}")
    if plan.compile:
        gaps.append("torch.compile: Megatron-LM fuses by its own kernels")
    text = " \\\n".join(shlex.join(argument) for argument in arguments) + "\n"
    return Settings(target="megatron", text=text, not_expressed=tuple(gaps))


def _layout(plan: Plan, stage: Stage) -> str:
    """The stage in Megatron's words: E the embedding, t a layer, L the head with the loss."""
    first, last = plan.layers(stage)
    names = plan.blocks[stage.first : stage.last]
    return "E" * ("prologue" in names) + "t" * (last - first) + "L" * ("epilogue" in names)
