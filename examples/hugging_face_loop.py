"""Fine-tune a Hugging Face GPT-2 with the loop that you already have: data loader, scheduler, clipping, one line more.

python examples/hugging_face_loop.py
torchrun --nproc-per-node 2 examples/hugging_face_loop.py
"""

import torch
import transformers
from torch.utils.data import DataLoader

import autopar

torch.manual_seed(0)
config = transformers.GPT2Config(
    n_layer=4, n_head=4, n_embd=64, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # so that any number of processes prints the same losses
)
model = transformers.GPT2LMHeadModel(config)

text = ("autopar finds how to spread a training over machines. " * 40).encode()
windows = [torch.tensor(list(text[start : start + 32])) for start in range(0, 1280, 20)]
loader = DataLoader(
    [{"input_ids": window, "labels": window} for window in windows],
    batch_size=16, shuffle=True, drop_last=True,
    generator=torch.Generator().manual_seed(0),  # every rank reads the same global batches
)

# The one line. In one process's script, `optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)` stood here.
trainer = autopar.parallelize(model, next(iter(loader)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))

scheduler = transformers.get_linear_schedule_with_warmup(trainer.optimizer, 2, num_training_steps=3 * len(loader))
first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
for epoch in range(3):
    for batch in loader:
        loss = trainer.forward_backward(batch)  # loss = model(**batch).loss; loss.backward()
        trainer.clip_gradients(1.0)             # torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer_step()                # optimizer.step(); optimizer.zero_grad()
        scheduler.step()
    if first:
        print(f"epoch {epoch}: loss {loss.item():.4f}")

weights = trainer.full_state_dict()  # under the model's own names, on rank 0
if first:
    model.load_state_dict(weights)
    print(f"{len(weights)} tensors are back in the Hugging Face model")
