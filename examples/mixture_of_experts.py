"""Train a small Mixtral, and see what autopar would do with a large one on 16 GPUs:

python examples/mixture_of_experts.py
torchrun --nproc-per-node 2 examples/mixture_of_experts.py
"""

import torch
import transformers

import autopar

torch.manual_seed(0)
config = transformers.MixtralConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4, num_experts_per_tok=2, vocab_size=256, max_position_embeddings=64,
)
model = transformers.MixtralForCausalLM(config)
tokens = torch.randint(0, config.vocab_size, (8, 32))
batch = {"input_ids": tokens, "labels": tokens}

trainer = autopar.parallelize(model, batch, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
for step in range(10):
    loss = trainer.step(batch)
    if first:
        print(f"step {step}: loss {loss.item():.4f}")

if first:
    # Two layers stand for many: a model is described by its config, and no weight is made.
    large = transformers.MixtralConfig(num_hidden_layers=2)  # the widths of Mixtral 8x7B
    with torch.device("meta"):
        wide = transformers.MixtralForCausalLM(large).to(torch.bfloat16)
        example = {name: torch.zeros(1, 4096, dtype=torch.int64) for name in ("input_ids", "labels")}
    plan = autopar.plan(wide, example, cluster="2x8xH100-80GB", global_batch=64, max_search_seconds=30)
    print(plan)
    split = [choice.factor for sharding in plan.shardings for choice in sharding.strategy.values()]
    print(f"{sum(factor is not None for factor in split)} of {len(split)} operators are split over the tensor axis")
