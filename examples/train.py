"""Train a small Llama on random tokens, alone or on several processes:

python examples/train.py
torchrun --nproc-per-node 4 examples/train.py
"""

import torch
import transformers

import autopar

torch.manual_seed(0)
config = transformers.LlamaConfig(
    num_hidden_layers=4, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=512, max_position_embeddings=64,
)
model = transformers.LlamaForCausalLM(config)
tokens = torch.randint(0, config.vocab_size, (16, 64))
batch = {"input_ids": tokens, "labels": tokens}

trainer = autopar.parallelize(model, batch, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))

first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
if first:
    print(trainer.plan)
for step in range(10):
    loss = trainer.step(batch)
    if first:
        print(f"step {step}: loss {loss.item():.4f}")
trainer.save("checkpoint")
