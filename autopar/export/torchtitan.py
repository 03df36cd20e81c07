"""A plan as torchtitan settings: the TOML of its JobConfig (torchtitan/config/job_config.py, releases of 2025)."""

from __future__ import annotations

import json

from autopar.export.settings import Settings, common_gaps, even_layers, main_recompute, num_chunks, one_mesh
from autopar.plan.plan import MIXED, Plan, Recompute, Schedule, Stage

SCHEDULES = {
    (Schedule.GPIPE, False): "GPipe", (Schedule.ONE_F_ONE_B, False): "1F1B",
    (Schedule.INTERLEAVED, True): "Interleaved1F1B", (Schedule.INTERLEAVED, False): "1F1B",
    (Schedule.ZERO_BUBBLE, False): "ZBVZeroBubble", (Schedule.ZERO_BUBBLE, True): "InterleavedZeroBubble",
}
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}


def to_torchtitan(plan: Plan) -> Settings:
    """The TOML sections that reproduce the plan; the model itself (`[model]`) stays the user's to name."""
    mesh, zero = one_mesh(plan, "torchtitan")
    chunks = num_chunks(plan)
    num_ranks = len(plan.stages) // chunks
    gaps = common_gaps(plan)
    parallelism: dict[str, object] = {
        "data_parallel_replicate_degree": mesh.dp_replicate,
        "data_parallel_shard_degree": mesh.dp_shard,
        "fsdp_reshard_after_forward": "always" if zero == 3 else "never",
        "tensor_parallel_degree": mesh.tp,
        "context_parallel_degree": mesh.cp,
        "expert_parallel_degree": mesh.ep,
        "pipeline_parallel_degree": num_ranks,
    }
    if num_ranks > 1:
        parallelism["pipeline_parallel_schedule"] = SCHEDULES[plan.schedule, chunks > 1]
        parallelism["pipeline_parallel_microbatch_size"] = plan.micro_batch
        parallelism["module_fqns_per_model_part"] = [_modules(plan, stage) for stage in plan.stages]
        if plan.schedule is Schedule.ZERO_BUBBLE and chunks == 1:
            gaps.append("a zero-bubble schedule of one stage a rank: ZBVZeroBubble has two, in a V")
        if chunks > 1 and plan.num_micro_batches % max(1, plan.num_micro_batches // num_ranks):
            gaps.append(
                f"{plan.num_micro_batches} micro-batches on {num_ranks} interleaved ranks: Interleaved1F1B runs rounds "
                "of equal size alone"
            )
        if not plan.blocks:
            gaps.append("which modules each stage has: the plan file names no blocks")
            del parallelism["module_fqns_per_model_part"]
        elif not even_layers(plan):
            gaps.append("module_fqns_per_model_part needs a torchtitan of 2025-08 or later; older ones split evenly")
    elif plan.num_micro_batches > 1:
        gaps.append(f"{plan.num_micro_batches} micro-batches a step: they come by accumulation, from global_batch_size")
    if mesh.tp > 1 and not plan.sequence_parallel:
        gaps.append("tensor parallelism without sequence parallelism: torchtitan always uses both")
    if zero in (1, 2):
        gaps.append(f"ZeRO-{zero}: written as FSDP that keeps its parameters after the forward, which is nearest")
    if plan.optimizer not in OPTIMIZERS:
        gaps.append(f"the optimizer {plan.optimizer}")
    rows = plan.micro_batch * (plan.num_micro_batches if num_ranks > 1 else 1)
    training: dict[str, object] = {"local_batch_size": rows, "global_batch_size": plan.global_batch}
    if plan.seq_len:
        training["seq_len"] = plan.seq_len
    if plan.dtype in ("bfloat16", "float32"):
        training["mixed_precision_param"] = plan.dtype
    else:
        gaps.append(f"computing in {plan.dtype}: mixed_precision_param takes bfloat16 or float32")
    recompute = main_recompute(plan, plan.stages[0])
    if any(stage.recompute_word == MIXED for stage in plan.stages):
        gaps.append(f"layers that recompute differently: `{recompute}`, what most of them do, is written for all")
    checkpointing: dict[str, object] = {"mode": str(recompute)}
    if recompute is Recompute.SELECTIVE:
        checkpointing["selective_ac_option"] = "op"
        gaps.append("selective recomputation: torchtitan's `op` saves other operators than the plan counts on")
    sections: dict[str, dict[str, object]] = {
        "training": training, "parallelism": parallelism, "activation_checkpoint": checkpointing,
        "compile": {"enable": plan.compile},
    }
    if plan.optimizer in OPTIMIZERS:
        sections["optimizer"] = {"name": OPTIMIZERS[plan.optimizer]}
    lines = [f"# {plan.model_name} on {plan.cluster_name}: {plan.num_devices} devices"]
    for name, entries in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
    return Settings(target="torchtitan", text="\n".join(lines) + "\n", not_expressed=tuple(gaps))


def _modules(plan: Plan, stage: Stage) -> list[str]:
    """The stage's modules under torchtitan's names for a decoder."""
    first, last = plan.layers(stage)
    names = plan.blocks[stage.first : stage.last]
    head = ["tok_embeddings"] if "prologue" in names else []
    tail = ["norm", "output"] if "epilogue" in names else []
    return head + [f"layers.{number}" for number in range(first, last)] + tail
