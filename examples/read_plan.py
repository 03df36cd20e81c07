"""Read a plan in Python: what each stage holds, what is proved, what a step costs and where its memory goes:

python examples/read_plan.py
"""

import tempfile
from pathlib import Path

import torch
import transformers

import autopar

config = transformers.LlamaConfig(
    num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # the shape of Llama 3.2 1B
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
planned = autopar.plan(
    model, {"input_ids": tokens, "labels": tokens}, cluster="1x4xA100-40GB", global_batch=64, max_search_seconds=30
)

path = Path(tempfile.mkdtemp()) / "plan.json"
planned.save(path)
plan = autopar.load_plan(path)  # what a file holds; `planned` also knows its model and cluster

for number, stage in enumerate(plan.stages):
    mesh, names = stage.mesh, plan.blocks[stage.first : stage.last]
    print(f"stage {number}: {len(names)} blocks, {names[0]} to {names[-1]}, on devices {stage.devices}")
    print(f"  replicas {mesh.dp_replicate} x shards {mesh.dp_shard}, tensor parallel {mesh.tp}, ZeRO {stage.zero}")
    print(f"  {stage.peak_memory_bytes / 2**30:.1f} of {stage.memory_limit_bytes / 2**30:.1f} GiB")
print(f"{plan.num_micro_batches} micro-batches of {plan.micro_batch} rows a replica, schedule {plan.schedule}")

proof = plan.certificate
print(f"step {proof.upper_bound_s:.3f} s; nothing in the searched space is under {proof.lower_bound_s:.3f} s")
print("not searched:", "; ".join(proof.not_searched))
for baseline in plan.baselines:
    print(f"  {baseline.name:14s} {baseline.step_time_s or float('nan'):.3f} s  {baseline.summary}")

parts = autopar.simulate(planned).report()["breakdown_s"]
print("where the step goes:", ", ".join(f"{name} {part:.3f} s" for name, part in parts.items() if part))
