"""Train a small Llama with Hugging Face's Trainer, its scheduler, clipping and checkpoints, and one line more.

pip install accelerate             (which the Trainer needs)
python examples/hugging_face_trainer.py
torchrun --nproc-per-node 2 examples/hugging_face_trainer.py
"""

import os
import tempfile

import torch
import transformers

import autopar

torch.manual_seed(0)
config = transformers.LlamaConfig(
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=176,
    vocab_size=256, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
)
model = transformers.LlamaForCausalLM(config)

text = ("autopar finds how to spread a training over machines. " * 40).encode()
windows = [torch.tensor(list(text[start : start + 32])) for start in range(0, 1280, 20)]

with tempfile.TemporaryDirectory() as folder:
    args = transformers.TrainingArguments(
        folder, per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", "1")), num_train_epochs=3,
        learning_rate=1e-3, warmup_steps=2, weight_decay=0.01, max_grad_norm=1.0, dataloader_drop_last=True,
        use_cpu=not torch.cuda.is_available(), logging_steps=4, save_strategy="epoch", report_to=[], disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, args, train_dataset=[{"input_ids": window, "labels": window} for window in windows]
    )

    autopar.parallelize_trainer(trainer)  # the one line; without it, each process would train a whole copy

    trainer.train()
    trainer.save_model(os.path.join(folder, "model"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("after each epoch: " + ", ".join(f"loss {loss:.4f}" for loss in losses))
        saved = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "model"))
        print(f"a model of {saved.num_parameters()} parameters is saved as any other")
