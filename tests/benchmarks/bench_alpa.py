"""Our plans beside those that Alpa (Zheng et al., OSDI 2022) found for GPT on V100s, both in our cost model.

    python tests/benchmarks/bench_alpa.py [case ...]

p3.16xlarge nodes: 8 V100-16GB, 25 Gb/s. Of Alpa's plans the stages' groups and meshes are given; cuts, micro-batches,
ZeRO levels, recomputation and the order of micro-batches are the best that we find for them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise, product
from pathlib import Path

from autopar.cli_requests import Simulations
from autopar.cluster.cluster import Cluster
from autopar.cluster.parse import parse_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, divisors
from autopar.search.mixed_costs import ClusterPools, MixedCosts, Setting
from autopar.search.mixed_plans import Part, mixed_plan
from autopar.search.plan_schedules import other_schedule
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

BATCH, SEQ_LEN, VOCABULARY = 1024, 1024, 51200
# name: (layers, hidden, heads, cluster, Alpa's stages as (dp, tp); None: any mesh of so many devices)
CASES = {
    "1.3B": (24, 2048, 32, "1x4xV100-16GB@25Gbps", [(2, 1)] * 2),
    "2.6B": (32, 2560, 32, "1x8xV100-16GB@25Gbps", [2, 2, 4]),
    "6.7B": (32, 4096, 32, "2x8xV100-16GB@25Gbps", [(2, 4)] * 2),
    "15B": (48, 5120, 40, "4x8xV100-16GB@25Gbps", [(2, 4)] * 4),
    "39B": (48, 8192, 64, "8x8xV100-16GB@25Gbps", [(1, 4)] * 16),
}


def gpt(layers: int, hidden: int, heads: int) -> ModelGraph:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_embd": hidden,
        "n_head": heads, "vocab_size": VOCABULARY, "n_positions": SEQ_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        return Simulations().graph(str(file), SEQ_LEN, "float16", "sdpa")


def theirs_s(graph: ModelGraph, machine: Cluster, request: PlanRequest, groups: list[tuple[int, int] | int]) -> float:
    """The best step with Alpa's groups and meshes; layers are dealt out by the groups' sizes, a few either way."""
    engine, pools, best = Engine(graph, machine, request), ClusterPools(machine), float("inf")
    n = len(graph.blocks)
    sizes = [own if isinstance(own, int) else own[0] * own[1] for own in groups]
    ends = [0, *(round(n * sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes)))]
    for count in divisors(BATCH):
        for zero, meshes in product((0, 1, 2, 3), _meshes(groups)):
            choice = engine.chooser.choose(max(tp for _, tp in meshes), sequence_parallel=False)
            assert choice is not None, "GPT's layers split"
            costs = MixedCosts(engine, pools, count, choice.rewrites)
            parts: list[Part] = []
            start = 0
            for (dp, tp), (first, last) in zip(meshes, pairwise(ends), strict=True):
                if BATCH // count % dp:
                    break
                ranks = tuple(range(start, start + dp * tp))
                start += dp * tp
                sharded = zero if dp > 1 else 0
                candidate = Candidate(
                    pp=len(groups), tp=tp, dp_replicate=1 if sharded else dp, dp_shard=dp if sharded else 1,
                    zero=sharded, sequence_parallel=False, offload_optimizer=False, micro_batch=BATCH // count // dp,
                    num_micro_batches=count,
                )
                parts.append(Part(first, last, Setting(candidate, engine.layout.kind_of(candidate, ranks)), ranks, 0))
            if len(parts) < len(groups):
                continue
            plan = mixed_plan(engine, costs, parts)
            for own in (plan, other_schedule(graph, machine, plan)):
                timeline = simulate(graph, machine, own, detail=False) if own is not None else None
                if timeline is not None and timeline.feasible:
                    best = min(best, timeline.step_time_s)
    return best


def _meshes(groups: list[tuple[int, int] | int]) -> list[tuple[tuple[int, int], ...]]:
    """Every choice of (dp, tp) for the groups of which only the size is known."""
    options = [[own] if isinstance(own, tuple) else [(own // tp, tp) for tp in divisors(own)] for own in groups]
    return list(product(*options))


def main(names: list[str]) -> None:
    print("model | cluster | Alpa's plan s | ours s | ratio | bound s | CPU s | ours")
    for name in names or list(CASES):
        layers, hidden, heads, cluster, groups = CASES[name]
        graph, machine = gpt(layers, hidden, heads), parse_cluster(cluster)
        request = PlanRequest(global_batch=BATCH, seq_len=SEQ_LEN, dtype="float16", param_dtype="float32")
        began = sum(os.times()[:2])
        plan = find_plan(graph, machine, request)
        seconds = sum(os.times()[:2]) - began
        other = theirs_s(graph, machine, request, list(groups))
        assert plan.certificate is not None
        ours, bound = plan.certificate.upper_bound_s, plan.certificate.lower_bound_s
        stage = plan.stages[0]
        print(
            f"{name} | {cluster} | {other:.4g} | {ours:.4g} | {other / ours:.2f} | {bound:.4g} | {seconds:.1f} | "
            f"pp {plan.num_stages}, dp {stage.mesh.dp}, tp {stage.mesh.tp}, zero {stage.zero}, "
            f"{plan.num_micro_batches} micro-batches, {plan.schedule}"
            f"{' in an order of its own' if plan.actions else ''}", flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
