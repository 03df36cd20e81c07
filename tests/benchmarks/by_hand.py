"""A Llama trained on two processes as one writes it with torch alone: DDP, fully_shard, parallelize_module, pipelining.

Each function gives a training step over the global batch on this rank. They are the other side of
bench_side_by_side.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, Tensor]
Step = Callable[[], Any]
VOCABULARY = 2048


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def shifted(batch: Batch) -> Tensor:
    """Each position's next token; the last has none."""
    return nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def _rows(batch: Batch) -> Batch:
    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: value.chunk(size)[rank] for name, value in batch.items()}


def ddp(model: nn.Module, batch: Batch) -> Step:
    """Replicas, whose gradients are averaged while the backward runs."""
    replica, own = DistributedDataParallel(model), _rows(batch)
    optimizer = adamw(replica.parameters())

    def step() -> None:
        optimizer.zero_grad()
        replica(**own).loss.backward()
        optimizer.step()

    return step


def fsdp2(model: Any, batch: Batch) -> Step:
    """Each layer a unit of its own, gathered anew for its backward; the rest is the root's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, own = adamw(model.parameters()), _rows(batch)

    def step() -> None:
        optimizer.zero_grad()
        model(**own).loss.backward()
        optimizer.step()

    return step


def tensor_parallel(model: Any, batch: Batch) -> Step:
    """Columns, then rows; embedding, head and loss split by vocabulary."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        **{f"model.layers.*.{name}": ColwiseParallel() for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
    })
    optimizer, target = adamw(model.parameters()), shifted(batch)

    def step() -> None:
        optimizer.zero_grad()
        with loss_parallel():
            logits = model(batch["input_ids"], use_cache=False).logits
            mean_loss(logits, target).backward()
        optimizer.step()

    return step


class _Part(nn.Module):
    """Some layers of a Llama, with the embedding before the first and the head behind the last."""

    def __init__(self, model: transformers.LlamaForCausalLM, first: int, last: int) -> None:
        super().__init__()
        whole = model.model
        self.embed = whole.embed_tokens if first == 0 else None
        self.layers = nn.ModuleList(whole.layers[first:last])
        is_last = last == len(whole.layers)
        self.norm, self.head = (whole.norm, model.lm_head) if is_last else (None, None)
        self.rotary = whole.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        places = torch.arange(x.shape[1], device=x.device)[None]
        cos_sin = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, position_embeddings=cos_sin)
        return x if self.head is None else self.head(self.norm(x))


def pipeline(model: Any, batch: Batch, *, num_micro_batches: int) -> Step:
    """Half of the layers each, one forward and one backward by turns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    each = len(model.model.layers) // size
    part = _Part(model, rank * each, (rank + 1) * each)
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=num_micro_batches, loss_fn=mean_loss)
    optimizer, target = adamw(part.parameters()), shifted(batch)

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(batch["input_ids"])
        else:
            schedule.step(target=target, losses=[])
        optimizer.step()

    return step
