"""torch and transformers after a lean capture, in a process of its own, since they are imported once."""

from __future__ import annotations

import subprocess
import sys

LEAN = """
import os, sys, tempfile, warnings
warnings.simplefilter("ignore")
from autopar.graph.lean_torch import _MODULES, lean_torch
from autopar.graph.lazy_modules import _Lazy
lean_torch()
import torch
from autopar.graph.source import capture_source, load_source
graph = capture_source(load_source("gpt2", seq_len=64))
def unrun():
    return [name for name in _MODULES if isinstance(sys.modules.get(name), _Lazy)]
"""
MESH = """
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkstemp()[1]}", rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
model = torch.nn.Linear(4, 4)
"""


def _run(script: str, start: str = LEAN) -> str:
    done = subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_capture_runs_none_of_the_lazy_modules_and_gives_the_same_graph() -> None:
    lean = _run("""
from autopar.graph.fingerprint import model_fingerprint
imported = [name for name in _MODULES if name in sys.modules and not name.endswith("constants")]
assert unrun() == imported and len(imported) > 5, (unrun(), imported)
print(model_fingerprint(graph), graph)
""")
    usual = _run("from autopar.graph.fingerprint import model_fingerprint\nprint(model_fingerprint(graph), graph)",
                 LEAN.replace("lean_torch()\n", ""))
    assert lean == usual and len(usual) > 1000


def test_compiled_functions_train() -> None:
    assert _run("""
@torch.compile(backend="aot_eager")
def function(x):
    return (x.sin() * x).sum()
x = torch.ones(3, requires_grad=True)
function(x).backward()
expected = torch.ones(3).sin() + torch.ones(3).cos()
from torch._functorch import aot_autograd, partitioners
assert aot_autograd.default_partition is partitioners.default_partition
print(torch.allclose(x.grad, expected), "torch._functorch.partitioners" in unrun())
""") == "True False"


def test_fsdp_shards_and_trains() -> None:
    assert _run(MESH + """
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy())
model(torch.ones(2, 4)).sum().backward()
from torch.distributed.tensor import DTensor
from torch.distributed._composable.fsdp import fully_shard as same
import torch.distributed.fsdp._fully_shard._fsdp_param_group as group
assert same is fully_shard and isinstance(model, FSDPModule) and FSDPModule.__module__ == "torch.distributed.fsdp"
assert torch._dynamo.variables.functions._fsdp_param_group is group
print(isinstance(model.weight.grad, DTensor), "torch.distributed.fsdp" in unrun())
""") == "True False"


def test_distributed_checkpoints_are_written_and_read() -> None:
    assert _run(MESH + """
import torch.distributed.checkpoint as dcp
folder = tempfile.mkdtemp()
dcp.save({"weight": torch.arange(4.0)}, checkpoint_id=folder)
read = {"weight": torch.zeros(4)}
dcp.load(read, checkpoint_id=folder)
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
import transformers.distributed.checkpoint as theirs
assert getattr(theirs, "HuggingFaceStorageReader", HuggingFaceStorageReader) is HuggingFaceStorageReader
print(read["weight"].tolist(), sorted(get_model_state_dict(model)))
""") == "[0.0, 1.0, 2.0, 3.0] ['bias', 'weight']"


def test_transformers_and_what_it_uses_are_whole() -> None:
    assert _run("""
import accelerate, jinja2, jinja2.sandbox, pickle, psutil
from accelerate import Accelerator, dispatch_model
from accelerate.utils import get_max_memory
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
import transformers.integrations.accelerate as theirs
assert theirs.dispatch_model is dispatch_model and theirs.accelerate_max_memory is get_max_memory
model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16))
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
again = GPT2LMHeadModel.from_pretrained(folder, device_map="cpu")
assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
assert isinstance(pickle.loads(pickle.dumps(model)), GPT2LMHeadModel)
assert pickle.loads(pickle.dumps(Accelerator)) is Accelerator and psutil.virtual_memory().total > 0
from transformers.utils.chat_template_utils import render_jinja_template
conversation = [{"role": "user", "content": "hello"}]
print(render_jinja_template([conversation], chat_template="{{ messages[0].content }}")[0][0])
""") == "hello"


def test_saved_programs_are_read() -> None:
    assert _run("""
import io
buffer = io.BytesIO()
torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
buffer.seek(0)
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package_weights import Weights
import torch._inductor.codecache as codecache
assert codecache.Weights is Weights and "torch.export.pt2_archive" not in unrun()
print(torch.export.load(buffer).module()(torch.ones(1, 2)).shape)
""") == "torch.Size([1, 2])"


def test_stand_ins_are_for_functions_and_classes() -> None:
    """So that no constant is taken for a true value."""
    assert _run("""
from importlib import import_module
for name, stand_ins in _MODULES.items():
    module = import_module(name)
    assert [given for given in stand_ins or () if not callable(getattr(module, given))] == [], name
print("done")
""", LEAN.partition("import torch\n")[0]) == "done"
