"""Exported scripts are plain PyTorch, run under torchrun, and print the losses of one process."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_machines import slow_cluster

from autopar.errors import InputError
from autopar.export.script import ScriptModel, script_model, to_script
from autopar.plan.plan import Plan, Recompute, Schedule, Variant
from autopar.search.degrees import Degrees, plan_from_degrees

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@cache
def model_of(spec: str) -> tuple[Plan, ScriptModel]:
    """The model, and the plan of one device for it."""
    from autopar.graph.source import capture_source, load_source

    graph = capture_source(load_source(spec, seq_len=16))
    plan = plan_from_degrees(graph, slow_cluster(1), Degrees(
        global_batch=8, micro_batch=4, seq_len=16, dtype="float32", param_dtype="float32",
    ))
    return plan, script_model(spec, plan)


def plan_of(spec: str, **degrees: Any) -> Plan:
    size = 1
    for axis in ("tp", "pp", "dp_replicate", "dp_shard", "cp"):
        size *= degrees.get(axis, 1)
    wanted = Degrees(global_batch=8, seq_len=16, dtype="float32", param_dtype="float32", **degrees)
    return plan_from_degrees(model_of(spec)[1].graph, slow_cluster(size), wanted)


def losses_of(script: Path, num_processes: int) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(num_processes), str(script), "--steps", "3"],
        capture_output=True, text=True, timeout=300, cwd=script.parent, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(text) for text in re.findall(r"loss ([\d.]+)", done.stdout)]


def losses_of_one_process(script: Path) -> list[float]:
    """Those of the script's own model and batch, trained plainly."""
    spec = importlib.util.spec_from_file_location("exported", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model, batch, _ = module.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=module.LEARNING_RATE)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.processes
@pytest.mark.parametrize(("degrees", "words"), [
    (dict(dp_shard=2, zero=3, micro_batch=2, recompute=Recompute.FULL), ["fully_shard(", "reshard_after_forward=True"]),
    (dict(tp=2, micro_batch=4), ["parallelize_module(", "'model.layers.0.self_attn.q_proj'", "RowwiseParallel()"]),
    (dict(pp=2, micro_batch=2), ["Schedule1F1B(", "SplitPoint.BEGINNING"]),
], ids=["fsdp2", "tp2", "pp2"])
def test_a_script_has_the_losses_of_one_process(
    config: str, tmp_path: Path, degrees: dict[str, Any], words: list[str]
) -> None:
    settings = to_script(plan_of(config, **degrees), model_of(config)[1])
    for word in words:
        assert word in settings.text
    script = tmp_path / "train.py"
    script.write_text(settings.text)
    assert losses_of(script, 2) == pytest.approx(losses_of_one_process(script), rel=1e-4)


@pytest.mark.parametrize("degrees", [
    dict(dp_replicate=2, micro_batch=2), dict(dp_replicate=2, dp_shard=2, zero=2, micro_batch=1),
    dict(dp_shard=2, tp=2, zero=3, micro_batch=2), dict(dp_replicate=2, tp=2, micro_batch=2), dict(micro_batch=8),
    dict(pp=3, micro_batch=4, schedule=Schedule.GPIPE),
], ids=lambda degrees: "x".join(degrees))
def test_scripts_are_python_that_imports_torch_alone(config: str, degrees: dict[str, Any]) -> None:
    settings = to_script(plan_of(config, **degrees), model_of(config)[1])
    tree = ast.parse(settings.text)
    assert compile(tree, "train.py", "exec")
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name.split(".")[0] for name in imported} <= {
        "argparse", "contextlib", "functools", "os", "torch", "transformers"}
    assert not [name for name in imported if any(part.startswith("_") for part in name.split("."))], "public names"
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {
        node.targets[0].id for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    constants = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.isupper()}
    assert constants <= defined
    assert "autopar." not in settings.text
    for gap in settings.not_expressed:
        assert "\n" not in gap and f"Not expressed: {gap}." in settings.text


def test_what_the_calls_cannot_express_is_said_or_refused(config: str) -> None:
    model = model_of(config)[1]
    plan = plan_of(config, dp_shard=2, zero=3, micro_batch=2)
    stage = plan.stages[0]
    away = replace(plan, stages=(replace(stage.with_variants([Variant(offload=True)] * 3), offload_optimizer=True),))
    assert to_script(away, model).not_expressed == ("activations in host memory", "optimizer state in host memory")
    plan = plan_of(config, tp=2, micro_batch=4, sequence_parallel=True)
    assert any("not split by sequence" in gap for gap in to_script(plan, model).not_expressed)
    for wrong, words in (
        (plan_of(config, cp=2, micro_batch=4), "context axis"),
        (plan_of(config, pp=2, tp=2, micro_batch=4), "several devices"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            to_script(wrong, model)
        assert "\n" not in str(caught.value)


def test_a_factory_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))"
        "\n\n"
        "    def forward(self, x, y):\n        return nn.functional.cross_entropy(self.layers(x), y)\n\n\n"
        "def make():\n    return Net(), {'x': torch.randn(4, 8), 'y': torch.arange(4)}\n"
    )
    spec = f"{path}:make"
    from autopar.graph.source import capture_source, load_source

    graph = capture_source(load_source(spec))
    plan = plan_from_degrees(graph, slow_cluster(2), Degrees(
        global_batch=8, micro_batch=4, dp_replicate=2, dtype="float32", param_dtype="float32", optimizer="sgd",
    ))
    text = to_script(plan, script_model(spec, plan)).text
    assert "DistributedDataParallel(model)" in text and str(path) in text
    compile(text, "train.py", "exec")
