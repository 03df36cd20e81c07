"""Llama-3.1-8B on 8 H100 under FSDP: the simulated step lies where real ones do."""

from __future__ import annotations

import pytest

from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage
from autopar.simulate.simulator import simulate
from autopar.simulate.timeline import Timeline


@pytest.fixture(scope="module")
def llama() -> ModelGraph:
    return capture_source(load_source("llama-3.1-8b", seq_len=8192, dtype="bfloat16"))


def fsdp(graph: ModelGraph, *, micro_batch: int, recompute: Recompute, compiled: bool = False) -> Timeline:
    stage = Stage(
        first=0, last=len(graph.blocks), devices=tuple(range(8)), mesh=Mesh(dp_shard=8), zero=3, recompute=recompute
    )
    return simulate(graph, parse_cluster("8xH100-80GB"), Plan(
        model_name=graph.name, model_fingerprint="", cluster_name="", cluster_fingerprint="", num_devices=8,
        global_batch=8 * micro_batch, seq_len=8192, dtype="bfloat16", param_dtype="float32", optimizer="adamw",
        micro_batch=micro_batch, num_micro_batches=1, schedule=Schedule.ONE_F_ONE_B, sequence_parallel=False,
        stages=(stage,), compile=compiled,
    ))


def test_mfu_and_memory_are_sane(llama: ModelGraph) -> None:
    eager = fsdp(llama, micro_batch=1, recompute=Recompute.NONE)
    again = fsdp(llama, micro_batch=2, recompute=Recompute.FULL)
    compiled = fsdp(llama, micro_batch=2, recompute=Recompute.FULL, compiled=True)
    assert 0.35 < again.mfu < compiled.mfu < eager.mfu < 0.55
    # Parameters, gradients and AdamW's moments, 16 bytes a parameter, over 8 devices; without the gathered units.
    memory = eager.groups[0].memory
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states == pytest.approx(16 * llama.num_params / 8, rel=0.15)
    assert again.peak_memory_bytes < eager.peak_memory_bytes
    assert eager.breakdown.compute / eager.step_time_s > 0.85  # 8 devices of one node hide most of FSDP's gathering
