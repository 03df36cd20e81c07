"""Mixed clusters: the found plan beside the best plan of equal stages and one mesh, and beside the expert's plans.

    python tests/benchmarks/bench_mixed.py [case ...]

Each case prints: the found plan's simulated step, its bound and gap, the best step with equally many layers a stage and
one tp and dp everywhere ("uniform"), how much faster the found plan is, the best baseline, CPU seconds of the planner,
the process's largest memory, and the stages. Networks are a tenth of a node's own links or less.
"""

from __future__ import annotations

import gc
import os
import resource
import sys

from autopar.cli_requests import Simulations
from autopar.cluster.cluster import Cluster
from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan
from autopar.search.best_first import Engine
from autopar.search.candidates import candidates
from autopar.search.planner import PlanRequest, find_plan

# name: (model, sequence length, global batch, dtype, cluster)
CASES = {
    "a100+v100": ("gpt2-xl", 1024, 512, "float16", "1x8xA100-80GB+2x4xV100-16GB@100Gbps"),
    "h100+a100": ("gpt2-xl", 1024, 512, "bfloat16", "1x8xH100-80GB+1x8xA100-80GB@100Gbps"),
    "h100+a100+l4": ("gpt2-xl", 1024, 512, "bfloat16", "1x8xH100-80GB+1x8xA100-80GB+2x4xL4@100Gbps"),
    "two sites": ("llama-3.1-8b", 2048, 512, "bfloat16", "1x8xH100-80GB+1x8xA100-80GB@5Gbps"),
    "unequal memory": ("llama-3.1-8b", 2048, 512, "bfloat16", "1x8xA100-80GB+1x8xA100-40GB@100Gbps"),
    "four types, 64 nodes": (
        "llama-3.1-70b", 4096, 1024, "bfloat16", "16x8xH100-80GB+16x8xA100-80GB+16x4xA100-40GB+16x4xL4@400Gbps"),
    "a100+v100, 32k tokens": ("llama-3.1-8b", 32768, 16, "float16", "1x8xA100-80GB+1x8xV100-32GB@100Gbps"),
    "2 a100 + 3 v100 nodes, 32k": ("llama-3.1-70b", 32768, 32, "float16", "2x8xA100-80GB+3x8xV100-32GB@400Gbps"),
}
FOR_UNIFORM = tuple(CASES)[:5]  # the others have too many uniform plans, or context axes, which such plans lack


def cpu_s() -> float:
    return sum(os.times()[:2])


def main(names: list[str]) -> None:
    simulations = Simulations()
    print("case | step s | bound s | gap | uniform s | faster | best baseline s | CPU s | MiB | stages")
    for name in names or list(CASES):
        model, seq_len, batch, dtype, cluster = CASES[name]
        graph, machine = simulations.graph(model, seq_len, dtype, "sdpa"), parse_cluster(cluster)
        request = PlanRequest(global_batch=batch, seq_len=seq_len, dtype=dtype)
        gc.collect()
        began = cpu_s()
        plan = find_plan(graph, machine, request)
        seconds = cpu_s() - began
        other = uniform_s(graph, machine, request) if name in FOR_UNIFORM else float("nan")
        print_row(name, plan, other, seconds)


def uniform_s(graph: ModelGraph, machine: Cluster, request: PlanRequest) -> float:
    """The best step with even stages and one mesh for all, 1F1B."""
    engine = Engine(graph, machine, request)
    space = candidates(machine, request, engine.chooser, len(graph.blocks))
    best = engine.search(space, even=True).best
    return best.step_time_s if best is not None else float("inf")


def print_row(name: str, plan: Plan, other: float, seconds: float) -> None:
    found = plan.certificate
    assert found is not None, "planned"
    baselines = [own.step_time_s for own in plan.baselines if own.step_time_s is not None]
    stages = "; ".join(
        f"{stage.last - stage.first} blocks on {stage.devices[0]}-{stage.devices[-1]}: dp {stage.mesh.dp} "
        f"cp {stage.mesh.cp} tp {stage.mesh.tp} zero {stage.zero}" for stage in plan.stages
    )
    order = "in an order of its own" if plan.actions else str(plan.schedule)
    print(
        f"{name} | {found.upper_bound_s:.4g} | {found.lower_bound_s:.4g} | {found.gap:.1%} | {other:.4g} | "
        f"{other / found.upper_bound_s:.2f} | {min(baselines, default=float('nan')):.4g} | {seconds:.1f} | "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} | {plan.num_micro_batches} micro-batches, "
        f"{order}: {stages}", flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
