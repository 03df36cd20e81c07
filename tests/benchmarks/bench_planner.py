"""What planning costs: seconds of capture and of search, memory, and how good and how well proved the plan is.

    python tests/benchmarks/bench_planner.py [CASE ...] [--json] [--list]

Each case runs in a process of its own. A row: CPU seconds of capture (building the model on fake tensors included) and
of the search, CPU and wall seconds of the whole process with its imports, its largest resident memory in MiB, the
plan's step, the bound, the gap, the step of the best baseline, and the plan in a few words. Wall seconds need a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on a cluster. `goal` says what the figures are to be held against."""

    model: str  # a preset, or zoo:NAME for a tiny model of tests/zoo
    cluster: str
    global_batch: int
    seq_len: int | None = None
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)  # of PlanRequest
    goal: str = ""


SPEED_CASES = {
    "llama-8b, 32 H100": Case(
        model="llama-3.1-8b", cluster="4x8xH100-80GB", global_batch=512, seq_len=8192,
    ),
    "llama-8b, mesh dp=8,tp=4": Case(
        model="llama-3.1-8b", cluster="4x8xH100-80GB", global_batch=512, seq_len=8192,
        options={"mesh": (("dp", 8), ("tp", 4))}, goal="capture + search <= 5 s",
    ),
    "llama-8b, 256 H100": Case(
        model="llama-3.1-8b", cluster="32x8xH100-80GB", global_batch=1024, seq_len=8192, goal="<= 20 s, <= 1 GiB",
    ),
    "llama-405b, 16384 H100": Case(
        model="llama-3.1-405b", cluster="2048x8xH100-80GB", global_batch=2048, seq_len=8192,
        goal="whole <= 10 s, <= 1 GiB, gap <= 2%",
    ),
    "gpt3-175b, 1024 A100": Case(
        model="gpt3-175b", cluster="128x8xA100-80GB", global_batch=1536, seq_len=2048,
        goal="whole <= 10 s, <= 1 GiB, gap <= 2%",
    ),
}
OTHER_CASES = {
    "llama-70b, 64 H100": Case(model="llama-3.1-70b", cluster="8x8xH100-80GB", global_batch=1024, seq_len=8192),
    "llama-8b, 8 A100-40GB": Case(model="llama-3.1-8b", cluster="1x8xA100-40GB", global_batch=64, seq_len=4096),
    "llama-8b, 12 A100": Case(model="llama-3.1-8b", cluster="3x4xA100-80GB", global_batch=96, seq_len=4096),
    "llama-8b, 8 L4": Case(model="llama-3.1-8b", cluster="2x4xL4@100Gbps", global_batch=32, seq_len=1024),
    "llama-8b, A100 and V100": Case(
        model="llama-3.1-8b", cluster="2x8xA100-80GB+2x8xV100-32GB@100Gbps", global_batch=128, seq_len=2048,
    ),
    "llama-8b, long rows": Case(model="llama-3.1-8b", cluster="2x8xH100-80GB", global_batch=4, seq_len=65536),
    "mixtral, 32 H100": Case(model="mixtral-8x7b", cluster="4x8xH100-80GB", global_batch=256, seq_len=4096),
    "bert-large, 8 V100": Case(model="bert-large", cluster="2x4xV100-16GB", global_batch=256),
    "gpt2, 8 H100": Case(model="gpt2", cluster="1x8xH100-80GB", global_batch=8, seq_len=256),
    "gpt2-xl, 4 T4": Case(model="gpt2-xl", cluster="1x4xT4", global_batch=16, seq_len=1024),
    "gpt2-xl, A100 and V100": Case(
        model="gpt2-xl", cluster="1x8xA100-80GB+2x4xV100-16GB@100Gbps", global_batch=256, seq_len=1024,
    ),
    "gpt2-xl, unlike stages": Case(
        model="gpt2-xl", cluster="1x4xA100-80GB+1x4xV100-16GB@100Gbps", global_batch=64, seq_len=1024,
        options={"unlike_stages": True},
    ),
    "vit-l, 8 A100": Case(model="vit-l", cluster="1x8xA100-40GB", global_batch=512),
    "llama-8b, no offload": Case(
        model="llama-3.1-8b", cluster="2x4xA100-40GB", global_batch=32, seq_len=4096, options={"offload": False},
    ),
}
CASES = {**SPEED_CASES, **OTHER_CASES}


def zoo_cases() -> dict[str, Case]:
    """All tiny models of tests/zoo, whose import takes seconds."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
    from all_entries import ENTRIES

    return {
        f"zoo {entry.name}": Case(
            model=f"zoo:{entry.name}", cluster="1x8xH100-80GB", global_batch=32, dtype="float32", goal="gap <= 1%"
        ) for entry in ENTRIES
    }


def measure(case: Case) -> dict[str, Any]:
    """The figures of one case, in this process."""
    import warnings

    warnings.simplefilter("ignore")
    import torch._dynamo
    import torch.export  # noqa: F401
    import transformers  # noqa: F401

    from autopar.cluster.parse import parse_cluster
    from autopar.errors import InfeasibleError
    from autopar.plan.dtypes import param_dtype
    from autopar.search.planner import PlanRequest, find_plan

    began = time.process_time()
    if case.model.startswith("zoo:"):
        from all_entries import ENTRIES

        from autopar.runtime.parity import capture_for

        began = time.process_time()
        entry = next(entry for entry in ENTRIES if entry.name == case.model.removeprefix("zoo:"))
        graph = capture_for(entry.build, case.dtype).graph
    else:
        from autopar.cli_requests import Simulations

        graph = Simulations().graph(case.model, case.seq_len, case.dtype, "sdpa")
    captured = time.process_time()
    request = PlanRequest(
        global_batch=case.global_batch, seq_len=graph.sequence_length, dtype=case.dtype,
        param_dtype=param_dtype(case.dtype), **case.options,
    )
    found: dict[str, Any] = {"capture_s": captured - began, "goal": case.goal}
    try:
        plan = find_plan(graph, parse_cluster(case.cluster), request)
        proved = plan.certificate
        assert proved is not None, "planned"
        baselines = [own.step_time_s for own in plan.baselines if own.step_time_s is not None]
        found |= {
            "step_s": proved.upper_bound_s, "bound_s": proved.lower_bound_s, "gap": proved.gap,
            "baseline_s": min(baselines, default=None), "searched": proved.searched,
            "plan": f"pp {len(plan.stages)}, {plan.num_micro_batches} x {plan.micro_batch}, " + "; ".join(dict.fromkeys(
                f"dp {mesh.dp_replicate}x{mesh.dp_shard} cp {mesh.cp} tp {mesh.tp}{'s' * plan.sequence_parallel} "
                f"zero {stage.zero}" for stage in plan.stages for mesh in [stage.mesh]
            )),
        }
    except InfeasibleError as error:
        found["plan"] = str(error)
    times = os.times()
    return found | {
        "search_s": time.process_time() - captured, "cpu_s": times.user + times.system,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_own_process(name: str) -> dict[str, Any]:
    """The figures of one case, with the wall seconds of its process."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--alone", name], stdout=subprocess.PIPE, text=True, check=False, timeout=1800,
    )
    if done.returncode:
        return {"case": name, "plan": f"failed with exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": name, "wall_s": time.monotonic() - began, **figures}


COLUMNS = (
    ("capture s", "capture_s", "9.1f"), ("search s", "search_s", "8.1f"), ("whole CPU s", "cpu_s", "11.1f"),
    ("wall s", "wall_s", "6.1f"), ("MiB", "resident_mib", "5.0f"), ("step s", "step_s", "9.4g"),
    ("bound s", "bound_s", "9.4g"), ("gap", "gap", "6.2%"), ("baseline s", "baseline_s", "10.4g"),
)


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    nan = float("nan")
    cells = [format(nan if found.get(key) is None else found[key], form) for _, key, form in COLUMNS]
    return f"{found['case']:<26} " + " ".join(
        f"{cell:>{max(len(cell), len(word))}}" for cell, (word, _, _) in zip(cells, COLUMNS, strict=True)
    ) + f"  {found.get('plan', '')}" + (f"  [{found['goal']}]" if found.get("goal") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help="cases, or speed, other, zoo; speed if left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--alone", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        cases = zoo_cases() if options.alone.startswith("zoo ") else CASES
        print(json.dumps(measure(cases[options.alone])))
        return
    if options.list:
        print("\n".join([*CASES, *zoo_cases()]))
        return
    zoo = zoo_cases() if any(word.startswith("zoo") for word in options.names) else {}
    groups = {"speed": SPEED_CASES, "other": OTHER_CASES, "zoo": zoo}
    names = [name for word in options.names or ["speed"] for name in groups.get(word, {word: None})]
    if unknown := [name for name in names if name not in CASES and name not in zoo]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join([*groups, *CASES])}")
    if not options.json:
        print(f"{'case':<26} " + " ".join(f"{word:>{len(format(0, form))}}" for word, _, form in COLUMNS), flush=True)
    rows = []
    for name in names:
        rows.append(in_own_process(name))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
