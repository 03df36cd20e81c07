"""Plan the training of a model on unlike machines, without any of them, and draw the plan:

python examples/mixed_cluster.py

The same from the shell:

autopar plan gpt2-large --cluster examples/mixed_cluster.yaml --global-batch 256 --seq-len 1024 -o plan.json
autopar viz plan.json -o plan.html
"""

import tempfile
from pathlib import Path

import torch
import transformers

import autopar

here = Path(__file__).parent
config = transformers.GPT2Config(n_layer=36, n_head=20, n_embd=1280)  # GPT-2 large
with torch.device("meta"):  # shapes alone: 774 million parameters take no memory
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    tokens = torch.zeros(1, 1024, dtype=torch.int64)

plan = autopar.plan(
    model, {"input_ids": tokens, "labels": tokens}, cluster=str(here / "mixed_cluster.yaml"), global_batch=256,
    max_search_seconds=40,
)
print(plan)
folder = Path(tempfile.mkdtemp())
plan.save(folder / "plan.json")
plan.draw(folder / "plan.html")
print(f"look at {folder / 'plan.html'} in a browser")
