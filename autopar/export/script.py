"""A plan as a training script of plain PyTorch: fully_shard, parallelize_module, torch.distributed.pipelining.

The script imports nothing of autopar. What these calls cannot express is left out and said in a line each; a plan whose
numbers or devices they cannot keep is refused in one.
"""

from __future__ import annotations

import json
import pprint
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import InputError
from autopar.export import script_parts as parts
from autopar.export.settings import Settings, main_recompute, num_chunks, one_mesh
from autopar.graph.capture import capture
from autopar.graph.model_graph import Block, ModelGraph
from autopar.graph.source import load_source
from autopar.plan.plan import MIXED, Plan, Recompute, Schedule, is_layer
from autopar.plan.verify import verify_plan
from autopar.sharding.state import Kind, State

OPTIMIZERS = {"adamw": "torch.optim.AdamW", "adam": "torch.optim.Adam", "sgd": "torch.optim.SGD"}
SCHEDULES = {Schedule.GPIPE: "ScheduleGPipe", Schedule.ONE_F_ONE_B: "Schedule1F1B"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptModel:
    """The model that a script trains: its graph, the text of `build`, and whether it maps tokens to next tokens."""

    graph: ModelGraph
    build: str
    is_causal: bool


def script_model(spec: str, plan: Plan) -> ScriptModel:
    """The model that `spec` names (see `load_source`), built on fake tensors."""
    source = load_source(spec, seq_len=plan.seq_len if not _is_factory(spec) else None, dtype=plan.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch, loss_fn = source.build()
    graph = capture(model, batch, loss_fn=loss_fn, tag_rows=True, name=source.name).graph
    if _is_factory(spec):
        path, _, factory = spec.rpartition(":")
        place = Path(path).resolve()
        build = parts.FACTORY_BUILD.format(
            rows=plan.global_batch, folder=str(place.parent), path=str(place), factory=factory
        )
        return ScriptModel(graph=graph, build=build, is_causal=False)
    kind = type(model).__name__
    is_causal = kind.endswith(("ForCausalLM", "LMHeadModel"))
    if not is_causal:
        raise InputError(
            f"{spec} is a {kind}: the script can make random batches for causal language models alone; give a factory, "
            "file.py:function, that returns the model and a batch"
        )
    config: Any = model.config
    dropped = ("transformers_version", "dtype", "torch_dtype", "model_type", "architectures")
    values = {key: value for key, value in json.loads(config.to_json_string()).items() if key not in dropped}
    build = parts.CONFIG_BUILD.format(
        rows=plan.global_batch, config_class=type(config).__name__, values=pprint.pformat(values, width=100),
        model_class=kind, seq_len=graph.sequence_length or plan.seq_len,
    )
    return ScriptModel(graph=graph, build=build, is_causal=True)


def _is_factory(spec: str) -> bool:
    return spec.rpartition(":")[0].endswith(".py")


def to_script(plan: Plan, model: ScriptModel) -> Settings:
    """The script, and what of the plan it leaves out; InputError where it would train something else."""
    verify_plan(plan, model.graph)
    mesh, _ = one_mesh(plan, "the script")
    if mesh.cp > 1:
        raise InputError("the plan has a context axis, which no public call of torch splits models over: plan without")
    if mesh.ep > 1:
        raise InputError("the plan parts experts over data ranks (ep), which no call of torch does: plan without ep")
    if any(stage.rows for stage in plan.stages):
        raise InputError("the plan shares out rows unequally, and FSDP2 and DDP average over ranks: plan without")
    gaps = _gaps(plan)
    made = _Script(constants={
        "RANKS": plan.num_devices, "GLOBAL_BATCH": plan.global_batch, "MICRO_BATCHES": plan.num_micro_batches,
        "LEARNING_RATE": 3e-4,
    })
    if plan.num_stages > 1:
        _write_pipeline(made, plan, model, gaps)
    else:
        _write_one_stage(made, plan, model, gaps)
    head = [f'"""Trains {plan.model_name} on {plan.num_devices} processes, as autopar planned it:', "",
            f"    torchrun --nproc-per-node {plan.num_devices} THIS_FILE [--steps N]", ""]
    head += [f"Not expressed: {gap}." for gap in gaps]
    constants = "\n".join(f"{name} = {pprint.pformat(value, width=110)}" for name, value in made.constants.items())
    text = "\n".join([*head, '"""', ""]) + "\n" + "\n".join([
        _imports(made.imports), "", constants, "", model.build, *made.functions, parts.END.lstrip("\n"),
    ])
    return Settings(target="script", text=_one_gap(text), not_expressed=tuple(gaps))


@dataclass(slots=True)
class _Script:
    """What is gathered while a script is written."""

    constants: dict[str, Any]
    imports: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)


def _imports(lines: list[str]) -> str:
    """Imports in two groups, each in order: Python's own, then torch's."""
    every = dict.fromkeys([*parts.IMPORTS, *lines])
    groups = [[line for line in every if ("torch" in line.split()[1]) is wanted] for wanted in (False, True)]
    return "\n\n".join("\n".join(sorted(group, key=lambda line: (line.startswith("from"), line))) for group in groups)


def _one_gap(text: str) -> str:
    """No more than two empty lines in a row."""
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text


def _gaps(plan: Plan) -> list[str]:
    gaps = []
    if plan.sequence_parallel:
        gaps.append("activations between the blocks are whole on every tensor rank, not split by sequence")
    if any(stage.num_offloaded for stage in plan.stages):
        gaps.append("activations in host memory")
    if any(stage.offload_optimizer for stage in plan.stages):
        gaps.append("optimizer state in host memory")
    if plan.rewrites:
        gaps.append("rewritten layers: the model's own operators run")
    if plan.compile:
        gaps.append("torch.compile: wrap the model's layers yourself")
    kinds = {stage.recompute_word for stage in plan.stages}
    if str(Recompute.SELECTIVE) in kinds or (MIXED in kinds and any(
        stage.recompute_layers(plan.num_layers(stage))["selective"] for stage in plan.stages
    )):
        gaps.append("recomputation of the attention core alone: such layers keep everything")
    return gaps


# -- one stage


def _write_one_stage(made: _Script, plan: Plan, model: ScriptModel, gaps: list[str]) -> None:
    stage = plan.stages[0]
    mesh, zero = stage.mesh, stage.zero
    names = [("dp_replicate", mesh.dp_replicate), ("dp_shard", mesh.dp_shard), ("tp", mesh.tp)]
    made.constants |= {"DATA_RANKS": mesh.dp, "TENSOR_RANKS": mesh.tp, "ROWS_EACH": plan.micro_batch}
    apply = []
    if mesh.tp > 1:
        _write_tensor_axis(made, plan, model, gaps)
        apply.append('split_tensors(model, mesh["tp"])')
    layers = [block.name for block in model.graph.blocks if is_layer(block.name)]
    recomputed = [
        name for name, variant in zip(layers, stage.layer_variants(len(layers)), strict=True)
        if variant.recompute is Recompute.FULL
    ]
    if recomputed:
        made.constants["RECOMPUTED"] = recomputed
        made.imports += ["from functools import partial", "from torch.utils.checkpoint import checkpoint"]
        made.functions.append(parts.RECOMPUTE)
        apply.append("recompute(model)")
    sync, context = "", "contextlib.nullcontext()"
    made.imports += ["import contextlib", "from torch.distributed.device_mesh import init_device_mesh"]
    mixed = plan.dtype != plan.param_dtype
    if zero == 0 and mesh.dp > 1 and mesh.tp == 1 and not mixed:
        made.imports.append("from torch.nn.parallel import DistributedDataParallel")
        apply.append("model = DistributedDataParallel(model)")
        context = "contextlib.nullcontext() if i == MICRO_BATCHES - 1 else model.no_sync()"
    elif mesh.dp > 1 or mixed:
        if zero == 0:
            gaps.append("whole copies beside a tensor axis or in mixed precision: written as FSDP2 over replicas")
            names = [("dp_replicate", mesh.dp), ("dp_shard", 1), ("tp", mesh.tp)]
        made.constants["UNITS"] = layers
        made.imports.append("from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard")
        policy = "MixedPrecisionPolicy()"
        if mixed:
            policy = (f"MixedPrecisionPolicy(param_dtype=torch.{plan.dtype}, reduce_dtype=torch.{plan.param_dtype}, "
                      "cast_forward_inputs=False)")
        made.functions.append(parts.SHARD.format(zero=zero, policy=policy, reshard=zero == 3))
        axes = '["dp_replicate", "dp_shard"]' if dict(names)["dp_replicate"] > 1 else '["dp_shard"]'
        apply.append(f"shard(model, mesh{axes})")
        if zero < 2 and plan.num_micro_batches > 1:
            sync = "        model.set_requires_gradient_sync(i == MICRO_BATCHES - 1)\n"
    made.functions += [
        parts.START.format(), parts.STEP.format(sync=sync, context=context),
        parts.MAIN.format(
            sizes=", ".join(str(size) for _, size in names), names=", ".join(f'"{name}"' for name, _ in names),
            apply="\n".join(f"    {line}" for line in apply) or "    # one process: nothing is split",
            optimizer=OPTIMIZERS[plan.optimizer],
        ),
    ]


def _write_tensor_axis(made: _Script, plan: Plan, model: ScriptModel, gaps: list[str]) -> None:
    """Columns and rows of linears, and embeddings, as the plan stores their weights."""
    columns: list[str] = []
    rows: list[str] = []
    gathered: list[str] = []
    of_whole: list[str] = []
    left_whole: list[str] = []
    for block in model.graph.blocks:
        linears, others = _split_modules(plan, model.graph, block)
        for name, kind, dim in others:
            if kind == "embedding" and dim == 0:
                of_whole.append(name)
            elif kind == "linear" and dim in (0, 1):
                (gathered if dim == 0 else of_whole).append(name)
            else:
                left_whole.append(name)
        for name, dim in linears:
            (columns if dim == 0 else rows).append(name)
    if left_whole:
        gaps.append(f"parameters that stay whole on every tensor rank: {', '.join(left_whole[:4])}"
                    + (", ..." if len(left_whole) > 4 else ""))
    if not (columns or rows or gathered or of_whole):
        raise InputError(
            "the plan's tensor axis splits no linear and no embedding, which is all that parallelize_module can split"
        )
    if gathered:
        gaps.append(f"results of {', '.join(gathered[:4])}{', ...' if len(gathered) > 4 else ''} are gathered: what "
                    "follows them (a loss split by vocabulary) runs whole")
    made.constants |= {"COLUMNS": columns, "ROWS": rows, "COLUMNS_GATHERED": gathered, "ROWS_OF_WHOLE": of_whole}
    made.imports += ["from torch.distributed.tensor import Replicate",
                     "from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, "
                     "parallelize_module"]
    made.functions.append(parts.TENSOR.format())


def _split_modules(
    plan: Plan, graph: ModelGraph, block: Block
) -> tuple[list[tuple[str, int]], list[tuple[str, str, int]]]:
    """The block's split modules: linears that pass their splits on, (name, dim); and others, (name, kind, dim).

    Columns hand over to rows where all linears of one parent module are by columns but the last, which is by rows.
    """
    cls = graph.block_class[block.cls]
    stage = plan.stages[0]
    (choice,) = [own for own in plan.class_shardings(block.cls, stage) if own.axis == "tp"]
    state = dict(zip(cls.params, choice.params, strict=True))
    path = dict(zip(cls.params, block.params, strict=True))
    by_parent: dict[str, list[tuple[str, int]]] = {}
    others: list[tuple[str, str, int]] = []
    seen: set[str] = set()
    for op in cls.ops:
        kind = {"aten.linear.default": "linear", "aten.embedding.default": "embedding"}.get(op.target, "")
        weights = [name for name in op.operands if name in path and _is_split(state[name])]
        for weight in weights:
            name = path[weight].rpartition(".")[0]
            if name in seen or path[weight].endswith(".bias"):
                continue
            seen.add(name)
            if kind == "linear" and state[weight].outer == 1 and block.name in name:
                by_parent.setdefault(name.rpartition(".")[0], []).append((name, state[weight].dim))
            elif state[weight].outer == 1 and not state[weight].length:
                others.append((name, kind, state[weight].dim))
            else:
                others.append((name, "", -1))
    passing: list[tuple[str, int]] = []
    for found in by_parent.values():
        dims = [dim for _, dim in found]
        if len(dims) > 1 and dims[-1] == 1 and set(dims[:-1]) == {0}:
            passing += found
        else:
            others += [(name, "linear", dim) for name, dim in found]
    return passing, others


def _is_split(state: State) -> bool:
    return state.kind is Kind.SHARDED


# -- a pipeline


def _write_pipeline(made: _Script, plan: Plan, model: ScriptModel, gaps: list[str]) -> None:
    stage = plan.stages[0]
    if stage.mesh.size > 1 or plan.dtype != plan.param_dtype:
        raise InputError(
            "the plan has stages of several devices or in mixed precision, and torch cuts the model by tracing it, "
            "after which its modules are not there to be split: plan with one device a stage, or without stages"
        )
    if not model.is_causal:
        raise InputError("torch's schedules compute the loss on the last stage, which the script can only write for "
                         "causal language models of Hugging Face: plan without stages")
    if num_chunks(plan) > 1 or plan.schedule not in SCHEDULES or plan.actions:
        gaps.append(f"the schedule {'of its own actions' if plan.actions else plan.schedule}: 1F1B is written")
        if num_chunks(plan) > 1:
            raise InputError("the plan has several stages a device, which the script does not write: plan with 1f1b")
    cuts = [model.graph.blocks[one.first].name for one in plan.stages[1:]]
    if wrong := next((name for name in cuts if not is_layer(name)), None):
        raise InputError(f"a stage begins at the {wrong}, and torch cuts models before modules: plan other stages")
    if any(main_recompute(plan, one) is Recompute.FULL for one in plan.stages):
        gaps.append("recomputation: the traced stages keep everything")
    made.constants |= {"STAGES": plan.num_stages, "CUTS": cuts}
    schedule = SCHEDULES.get(plan.schedule, "Schedule1F1B")
    made.imports.append(f"from torch.distributed.pipelining import {schedule}, SplitPoint, pipeline")
    made.imports.append("from torch import nn")
    made.functions += [
        parts.START.format(), parts.PIPELINE.format(schedule=schedule, optimizer=OPTIMIZERS[plan.optimizer])
    ]
