"""The options of the commands, each with what --help says of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autopar.plan.dtypes import SHORT_NAMES
from autopar.plan.goal import Goal
from autopar.plan.plan import MOST_ROWS, Recompute, Schedule


class Attention(StrEnum):
    SDPA = "sdpa"
    EAGER = "eager"


class Target(StrEnum):
    SCRIPT = "script"
    TORCHTITAN = "torchtitan"
    MEGATRON = "megatron"


Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A Hugging Face config.json or its folder, a preset (llama-3.1-8b), or file.py:factory.")]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="As for `plan`.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that `autopar plan -o` wrote.")]
OptionalPlanFile = Annotated[Path | None, typer.Argument(
    metavar="PLAN", help="A plan file that `autopar plan -o` wrote.")]
Compare = Annotated[tuple[Path, Path] | None, typer.Option(
    "--compare", metavar="A B", help="Instead of one PLAN: two plan files of one model, side by side.")]
ClusterText = Annotated[str, typer.Option(
    "--cluster", metavar="C", help="A YAML file, or shorthand such as 4x8xH100-80GB@3200Gbps, or `local`.")]
OptionalCluster = Annotated[str | None, typer.Option("--cluster", metavar="C", help="As for `plan`.")]
_ROWS = typer.Option(
    "--global-batch", metavar="N", min=1, max=MOST_ROWS, help="Rows of one training step: sequences, not tokens.")
GlobalBatch = Annotated[int, _ROWS]
OptionalGlobalBatch = Annotated[int | None, _ROWS]
SeqLen = Annotated[int | None, typer.Option(
    "--seq-len", metavar="S", min=1, help="Tokens a row; the model's own if left out.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"Compute dtype: {', '.join(SHORT_NAMES)}.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, adam or sgd.")]
AttentionKind = Annotated[Attention, typer.Option("--attention", help="Fused (sdpa) or plain (eager) attention.")]
SearchedMicroBatch = Annotated[int | None, typer.Option(
    "--micro-batch", metavar="M", min=1, help="Rows of a micro-batch; searched if left out.")]
SearchSeconds = Annotated[float | None, typer.Option(
    "--max-search-seconds", metavar="T", min=0, help="Stop the search then, with the best plan so far.")]
MeshOption = Annotated[str | None, typer.Option(
    "--mesh", metavar="AXIS=N,...",
    help="Fix axes (pp, dp, dp_replicate, dp_shard, ep, cp, tp); the rest is searched.")]
Compile = Annotated[bool, typer.Option("--compile", help="The model runs under torch.compile.")]
OffloadOption = Annotated[bool, typer.Option(
    "--offload/--no-offload", help="Let activations and optimizer state rest in host memory where that pays.")]
UnlikeStages = Annotated[bool, typer.Option(
    "--unlike-stages/--no-unlike-stages",
    help="On a cluster of unlike nodes, let stages have meshes and ZeRO levels of their own.")]
ObjectiveOption = Annotated[Goal, typer.Option(
    "--objective", help="time: the fastest step. cost: the cheapest step, by the prices in the cluster file. devices: "
    "the fewest devices that keep to the step or the deadline.")]
MaxStepSeconds = Annotated[float | None, typer.Option(
    "--max-step-seconds", metavar="T", min=0, help="A step may take at most so long.")]
DeadlineHours = Annotated[float | None, typer.Option(
    "--deadline-hours", metavar="H", min=0, help="The whole training may take at most so long; needs --tokens.")]
Tokens = Annotated[float | None, typer.Option(
    "--tokens", metavar="N", min=1, help="Tokens of the whole training, such as 1.5e12, for --deadline-hours.")]
IdleDevices = Annotated[bool, typer.Option(
    "--idle-devices", help="Leave devices unused where a step is quicker without them.")]
OffloadActivations = Annotated[bool, typer.Option(
    "--offload-activations", help="Keep what every layer saves for its backward in host memory.")]
OffloadOptimizer = Annotated[bool, typer.Option(
    "--offload-optimizer", help="Keep the optimizer's state in host memory.")]
PlanOption = Annotated[Path | None, typer.Option("--plan", metavar="PLAN", help="Simulate this plan file.")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree.")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="Pipeline-parallel degree.")]
VirtualStages = Annotated[int, typer.Option(
    "--virtual-stages", metavar="V", min=1, help="Chunks of each pipeline rank.")]
Cp = Annotated[int, typer.Option("--cp", min=1, help="Context-parallel degree.")]
Ep = Annotated[int, typer.Option("--ep", min=1, help="Expert-parallel degree.")]
DpReplicate = Annotated[int | None, typer.Option("--dp-replicate", metavar="R", min=1, help="Replicas of the model.")]
DpShard = Annotated[int | None, typer.Option(
    "--dp-shard", metavar="D", min=1, help="Devices that share the states of a replica.")]
Zero = Annotated[int | None, typer.Option("--zero", min=0, max=3, help="ZeRO level: what --dp-shard splits.")]
MicroBatch = Annotated[int, typer.Option("--micro-batch", metavar="M", min=1, help="Rows of a micro-batch.")]
RecomputeOption = Annotated[Recompute, typer.Option("--recompute", help="Activations to compute again.")]
ScheduleOption = Annotated[Schedule | None, typer.Option("--schedule", help="The pipeline's schedule.")]
SequenceParallel = Annotated[bool, typer.Option("--sequence-parallel", help="Split the sequence between blocks.")]
Trace = Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Write the step as a Chrome trace.")]
DryRunOption = Annotated[bool, typer.Option(
    "--dry-run", help="Run each distinct rank's program on fake tensors: communication, shapes, memory.")]
Requests = Annotated[Path | None, typer.Option(
    "--requests", metavar="FILE", help="Many at once: one JSON object a line, with these options as keys.")]
To = Annotated[Target, typer.Option("--to", help="The system to write settings for.")]
ExplainOption = Annotated[str | None, typer.Option(
    "--explain", metavar="[LAYER]", help="Say why a layer is sharded so and what the next best would cost: a block's "
    "name or class; the first layer if left out.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it to this file.")]
DemoFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder for plan.json and trace.json.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help="The plan's model, as for `plan`.")]
PictureModel = Annotated[str | None, typer.Option(
    "--model", metavar="MODEL", help="The plan's model, for a plan that was saved without its picture.")]
ScriptModel = Annotated[str | None, typer.Option(
    "--model", metavar="MODEL", help="The plan's model, which a script builds.")]
CheckedDtype = Annotated[str | None, typer.Option(
    "--dtype", help="Compare in this dtype; the plan's own if left out, fp32 for a plan in two bytes.")]
Live = Annotated[Path | None, typer.Option(
    "--live", metavar="TRACE", help="Lay a run beside the prediction: what `trainer.trace` or `verify --trace` wrote.")]
RunTrace = Annotated[Path | None, typer.Option(
    "--trace", metavar="FILE", help="Record a few more steps as a Chrome trace, for `viz --live`.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps to compare.")]
ProfileOption = Annotated[Path | None, typer.Option(
    "--profile", metavar="FILE", help="Use the rates that `autopar profile -o` measured.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
