"""How much memory each rank takes to read a model's safetensors files under a plan, against the whole model.

    python tests/benchmarks/bench_weight_loading.py

A Llama of about 100 million parameters is written in four files and read under several plans by local processes, into a
model without data. What counts is the largest anonymous memory (RssAnon of Linux, sampled every 2 ms) above that before
the trainer is made: pages of the files themselves belong to the kernel's cache. The least is what the rank then holds.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from local_machines import slow_cluster
from safetensors.torch import save_file
from torch import Tensor, nn

import autopar
from autopar.graph.capture import Captured, capture
from autopar.plan.plan import Plan
from autopar.runtime.data_parallel import local_tensor
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.search.degrees import Degrees, plan_from_degrees

NUM_FILES = 4
PLANS: dict[str, dict[str, int]] = {
    "fsdp 4": dict(dp_shard=4, zero=3), "tp 4": dict(tp=4), "tp 2 x fsdp 2": dict(tp=2, dp_shard=2, zero=3),
    "pp 4": dict(pp=4), "ddp 2": dict(dp_replicate=2),
}


def make_model() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=8, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=2048, tie_word_embeddings=False, use_cache=False,
    ))


def make_batch() -> dict[str, Tensor]:
    ids = torch.zeros(8, 16, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def captured_model() -> Captured:
    with autopar.empty_parameters():
        return capture(make_model(), make_batch(), tag_rows=True, name="llama")


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def read(plan: Plan, captured: Captured, folder: str) -> tuple[int, int]:
    """The most bytes above those before, and those of the parameters that are then there."""
    torch.set_num_threads(1)
    with autopar.empty_parameters():
        model = make_model()
    before = most = anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.002):
            most = max(most, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.SGD(params, lr=0.1), weights=folder)
    time.sleep(0.01)
    ended.set()
    thread.join()
    held: list[Any] = [local_tensor(param.detach()) for param in trainer.named_parameters().values()]
    trainer.close()
    return most - before, sum(value.numel() * value.element_size() for value in held)


def main() -> None:
    warnings.simplefilter("ignore")
    captured = captured_model()
    with tempfile.TemporaryDirectory() as folder:
        weights = dict(make_model().state_dict())
        whole = sum(value.numel() * value.element_size() for value in weights.values())
        names, index = sorted(weights), {}
        for k in range(NUM_FILES):
            file = f"model-{k}.safetensors"
            save_file({name: weights[name].contiguous() for name in names[k::NUM_FILES]}, Path(folder) / file)
            index.update(dict.fromkeys(names[k::NUM_FILES], file))
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        largest = max(value.numel() * value.element_size() for value in weights.values())
        del weights
        mib = 2**20
        print(f"the whole model: {whole / mib:.0f} MiB in {NUM_FILES} files, largest tensor {largest / mib:.0f} MiB")
        print(f"{'plan':<16} {'most MiB of a rank':>20} {'then held':>10} {'of the whole':>13}")
        for name, degrees in PLANS.items():
            size = 1
            for axis in ("tp", "pp", "dp_shard", "dp_replicate"):
                size *= degrees.get(axis, 1)
            plan = plan_from_degrees(captured.graph, slow_cluster(size), Degrees(
                global_batch=8, micro_batch=2, seq_len=16, dtype="float32", param_dtype="float32", optimizer="sgd",
                **degrees))
            with LocalPool(size) as pool:  # a process that has read before has freed memory at hand
                results = pool.run(read, plan, captured, folder)
            most, held = max(results)
            print(f"{name:<16} {most / mib:20.0f} {held / mib:10.0f} {most / whole:13.0%}", flush=True)


if __name__ == "__main__":
    main()
