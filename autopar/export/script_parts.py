"""The pieces of an exported training script, as text: plain PyTorch that a reader can change."""

# Names that a script imports always; those that its pieces need are added.
IMPORTS = ("import argparse", "import os", "import torch", "import torch.distributed as dist")

CONFIG_BUILD = '''
def build():
    """The model, a global batch of {rows} rows (random tokens: put your data here), and no loss function of its own."""
    import transformers

    config = transformers.{config_class}(**{values})
    model = transformers.{model_class}(config)
    tokens = torch.randint(0, config.vocab_size, (GLOBAL_BATCH, {seq_len}), generator=torch.Generator().manual_seed(1))
    return model, {{"input_ids": tokens, "labels": tokens}}, None
'''

FACTORY_BUILD = '''
def build():
    """The model, a global batch of {rows} rows made of the factory's (put your data here), and its loss function."""
    import importlib.util
    import sys

    sys.path.insert(0, {folder!r})
    spec = importlib.util.spec_from_file_location("model_file", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, example, *loss_fn = module.{factory}()
    size = max(value.shape[0] for value in example.values() if torch.is_tensor(value) and value.dim())
    index = torch.arange(GLOBAL_BATCH) % size
    batch = {{name: value[index] if torch.is_tensor(value) and value.dim() and value.shape[0] == size else value
             for name, value in example.items()}}
    return model, batch, loss_fn[0] if loss_fn else None
'''

TENSOR = '''
def split_tensors(model, mesh):
    """Linears by columns and by rows over the tensor axis, the embedding by vocabulary."""
    plan = {{}}
    for name in COLUMNS:
        plan[name] = ColwiseParallel()
    for name in ROWS:
        plan[name] = RowwiseParallel()
    for name in COLUMNS_GATHERED:
        plan[name] = ColwiseParallel(output_layouts=Replicate())
    for name in ROWS_OF_WHOLE:
        plan[name] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, plan)
'''

SHARD = '''
def shard(model, mesh):
    """ZeRO {zero}: each layer a unit of its own, the rest with the root, which stays gathered."""
    policy = {policy}
    for name in UNITS:
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy, reshard_after_forward={reshard})
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
'''

RECOMPUTE = '''
def recompute(model):
    """These layers keep their inputs alone, and run again in the backward."""
    for name in RECOMPUTED:
        layer = model.get_submodule(name)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
'''

STEP = '''
def train_step(model, optimizer, batch, loss_fn, data_rank):
    """One step over this rank's rows of every micro-batch; the mean loss of its rows."""
    total = 0.0
    optimizer.zero_grad()
    for i in range(MICRO_BATCHES):
        first = (i * DATA_RANKS + data_rank) * ROWS_EACH
        part = {{name: value[first : first + ROWS_EACH] if torch.is_tensor(value) and value.dim() else value
                for name, value in batch.items()}}
{sync}        with {context}:
            output = model(**part)
            loss = loss_fn(output, part) if loss_fn else getattr(output, "loss", output)
            (loss / MICRO_BATCHES).backward()
        total += loss.detach() / MICRO_BATCHES
    optimizer.step()
    return total
'''

PIPELINE = '''
class Logits(nn.Module):
    """The model without its loss, which the schedule computes on the last stage."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def next_token_loss(logits, labels):
    """The mean over all positions that have a next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    device = start()
    torch.manual_seed(0)
    model, batch, _ = build()
    wrapped = Logits(model.to(device))
    ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
    splits = {{"model." + name: SplitPoint.BEGINNING for name in CUTS}}
    pipe = pipeline(wrapped, mb_args=(ids[: ids.shape[0] // MICRO_BATCHES],), split_spec=splits)
    rank = dist.get_rank()
    stage = pipe.build_stage(rank, device)
    schedule = {schedule}(stage, n_microbatches=MICRO_BATCHES, loss_fn=next_token_loss)
    optimizer = {optimizer}(stage.submod.parameters(), lr=LEARNING_RATE)
    for step in range(options.steps):
        optimizer.zero_grad()
        losses = []
        if rank == 0:
            schedule.step(ids)
        elif rank == STAGES - 1:
            schedule.step(target=labels, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        if rank == STAGES - 1:
            print(f"step {{step}}: loss {{torch.stack(losses).mean().item():.9f}}", flush=True)
    dist.destroy_process_group()
'''

START = '''
def start():
    """Joins the job that torchrun started; this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    if dist.get_world_size() != RANKS:
        raise SystemExit(f"this script is for {{RANKS}} processes, and the job has {{dist.get_world_size()}}")
    return device
'''

MAIN = '''
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    device = start()
    torch.manual_seed(0)
    model, batch, loss_fn = build()
    model = model.to(device)
    batch = {{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}}
    mesh = init_device_mesh(device.type, ({sizes}), mesh_dim_names=({names}))
{apply}
    optimizer = {optimizer}(model.parameters(), lr=LEARNING_RATE)
    for step in range(options.steps):
        loss = train_step(model, optimizer, batch, loss_fn, dist.get_rank() // TENSOR_RANKS)
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {{step}}: loss {{loss.item() / RANKS:.9f}}", flush=True)
    dist.destroy_process_group()
'''

END = '''

if __name__ == "__main__":
    main()
'''
