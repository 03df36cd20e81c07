"""Step times of emitted programs against hand-written PyTorch for the same strategy, on two gloo processes.

    python tests/benchmarks/bench_side_by_side.py [NAME ...] [--rounds 21] [--json]

Both sides train one Llama from the same weights on the same batch, by turns in one run, each turn after a barrier. A
row a strategy: median seconds of a step by hand and emitted, their ratio, the ratio of the CPU seconds of all ranks
(which other processes on the machine disturb less), and the largest difference of the two sides' weights after the
run's steps, relative to the largest weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import by_hand
import torch
import torch.distributed as dist
import transformers
from local_machines import slow_cluster
from torch import Tensor, nn

from autopar.graph.capture import Captured, capture
from autopar.plan.plan import Plan, Schedule
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.search.degrees import Degrees, plan_from_degrees

ROWS, LENGTH, MICRO_BATCHES = 8, 128, 4
LIMITS = {"ddp": 1.05, "fsdp2": 1.05, "tp": 1.0, "pipeline": 1.05}
DEGREES: dict[str, dict[str, Any]] = {
    "ddp": dict(dp_replicate=2, micro_batch=ROWS // 2),
    "fsdp2": dict(dp_shard=2, zero=3, micro_batch=ROWS // 2),
    "tp": dict(tp=2, micro_batch=ROWS),
    "pipeline": dict(pp=2, micro_batch=ROWS // MICRO_BATCHES, schedule=Schedule.ONE_F_ONE_B),
}
BY_HAND = {"ddp": by_hand.ddp, "fsdp2": by_hand.fsdp2, "tp": by_hand.tensor_parallel,
           "pipeline": partial(by_hand.pipeline, num_micro_batches=MICRO_BATCHES)}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=by_hand.VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def make_batch() -> dict[str, Tensor]:
    ids = torch.randint(0, by_hand.VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def plan_of(name: str, captured: Captured) -> Plan:
    wanted = Degrees(global_batch=ROWS, dtype="float32", param_dtype="float32", **DEGREES[name])
    return plan_from_degrees(captured.graph, slow_cluster(2), wanted)


def turns(name: str, plan: Plan, captured: Captured, rounds: int) -> dict[str, Any]:
    """This rank's wall and CPU seconds of every step, of both sides, and how far their weights are apart."""
    batch = make_batch()
    plain = make_model()
    trainer = Trainer(make_model(), plan, captured, by_hand.adamw)
    steps = {"hand": BY_HAND[name](plain, batch), "emitted": partial(trainer.step, batch)}
    wall: dict[str, list[float]] = {side: [] for side in steps}
    cpu: dict[str, list[float]] = {side: [] for side in steps}
    for turn in range(rounds + 3):
        for side in sorted(steps, reverse=turn % 2 == 0):
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            steps[side]()
            spent, used = time.perf_counter() - began, time.process_time() - used
            if turn >= 3:
                wall[side].append(spent)
                cpu[side].append(used)
    return {"wall": wall, "cpu": cpu, "apart": _apart(name, plain, trainer)}


def _apart(name: str, plain: nn.Module, trainer: Trainer) -> float:
    """Largest difference between the two sides' weights, over the largest weight; on rank 0, of what it holds."""
    emitted = trainer.full_state_dict()
    worst = 0.0
    for key, value in plain.state_dict().items():
        if name == "pipeline" and (".layers.2." in key or ".layers.3." in key or key in ("model.norm.weight",
                                                                                       "lm_head.weight")):
            continue  # rank 1 trains these
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        if emitted:
            worst = max(worst, ((full - emitted[key]).abs().max() / emitted[key].abs().max()).item())
    return worst


def row(name: str, pool: LocalPool, captured: Captured, rounds: int) -> dict[str, Any]:
    """The figures of one strategy: a step ends when its slowest rank does."""
    results = pool.run(turns, name, plan_of(name, captured), captured, rounds, timeout_s=600)
    wall = {
        side: statistics.median(map(max, zip(*(found["wall"][side] for found in results), strict=True)))
        for side in ("hand", "emitted")
    }
    cpu = {
        side: statistics.median(map(sum, zip(*(found["cpu"][side] for found in results), strict=True)))
        for side in ("hand", "emitted")
    }
    return {
        "strategy": name, "by_hand_s": wall["hand"], "emitted_s": wall["emitted"],
        "ratio": wall["emitted"] / wall["hand"], "by_hand_cpu_s": cpu["hand"], "emitted_cpu_s": cpu["emitted"],
        "cpu_ratio": cpu["emitted"] / cpu["hand"], "limit": LIMITS[name], "weights_apart": results[0]["apart"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"strategies; {', '.join(DEGREES)} if left out")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each side that are timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    if unknown := sorted({*options.names} - DEGREES.keys()):
        parser.error(f"no strategy {unknown[0]!r}; there are {', '.join(DEGREES)}")
    warnings.simplefilter("ignore")
    captured = capture(make_model(), make_batch(), tag_rows=True)
    rows = []
    if not options.json:
        print(f"{'':<10} {'by hand':>9} {'emitted':>9} {'ratio':>6} {'limit':>6} {'of CPU time':>12} {'apart':>8}")
    with LocalPool(2) as pool:
        for name in options.names or DEGREES:
            rows.append(found := row(name, pool, captured, options.rounds))
            if not options.json:
                print(f"{name:<10} {found['by_hand_s'] * 1e3:6.1f} ms {found['emitted_s'] * 1e3:6.1f} ms "
                      f"{found['ratio']:6.3f} {found['limit']:6.2f} {found['cpu_ratio']:12.3f} "
                      f"{found['weights_apart']:8.1e}", flush=True)
    if options.json:
        print(json.dumps({"strategies": rows}))


if __name__ == "__main__":
    main()
