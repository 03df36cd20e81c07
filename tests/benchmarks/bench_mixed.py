"""Mixed clusters: the found plan beside the best plan of one mesh for all stages, and beside the expert's plans.

    python tests/benchmarks/bench_mixed.py [case ...]

Each case prints: step with stages of their own meshes, its bound and gap, the best step with one mesh for all stages
(uneven cuts allowed), the best baseline, seconds of search and the process's largest memory.
"""

from __future__ import annotations

import resource
import sys
import time

from autopar.cli_requests import Simulations
from autopar.cluster.parse import parse_cluster
from autopar.search.planner import PlanRequest, find_plan

# name: (model, sequence length, global batch, cluster)
CASES = {
    "a100+v100": ("gpt2-xl", 1024, 256, "1x8xA100-80GB+2x4xV100-16GB@100Gbps"),
    "h100+a100": ("gpt2-xl", 1024, 256, "1x8xH100-80GB+1x8xA100-80GB@100Gbps"),
    "h100+a100+l4": ("gpt2-xl", 1024, 256, "1x8xH100-80GB+1x8xA100-80GB+2x4xL4@100Gbps"),
    "two sites": ("gpt2-large", 1024, 256, "1x8xA100-80GB+1x4xA100-80GB@5Gbps"),
    "unequal memory": ("gpt2-xl", 1024, 256, "1x8xA100-80GB+1x8xA100-40GB@100Gbps"),
}


def main(names: list[str]) -> None:
    simulations = Simulations()
    print("case | step s | bound s | gap | one mesh s | speedup | best baseline s | seconds | MiB | stages")
    for name in names or list(CASES):
        model, seq_len, batch, cluster = CASES[name]
        graph, machine = simulations.graph(model, seq_len, "bfloat16", "sdpa"), parse_cluster(cluster)
        began = time.monotonic()
        plan = find_plan(graph, machine, PlanRequest(global_batch=batch, seq_len=seq_len, unlike_stages=True))
        seconds = time.monotonic() - began
        alike = find_plan(graph, machine, PlanRequest(global_batch=batch, seq_len=seq_len))
        found, other = plan.certificate, alike.certificate
        assert found is not None and other is not None, "planned"
        baselines = [own.step_time_s for own in plan.baselines if own.step_time_s is not None]
        stages = "; ".join(
            f"{stage.last - stage.first} blocks on {len(stage.devices)}: dp {stage.mesh.dp} tp {stage.mesh.tp} "
            f"zero {stage.zero}" for stage in plan.stages
        )
        print(
            f"{name} | {found.upper_bound_s:.4g} | {found.lower_bound_s:.4g} | {found.gap:.1%} | "
            f"{other.upper_bound_s:.4g} | {other.upper_bound_s / found.upper_bound_s:.2f} | "
            f"{min(baselines, default=float('nan')):.4g} | {seconds:.0f} | "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} | {stages}", flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
