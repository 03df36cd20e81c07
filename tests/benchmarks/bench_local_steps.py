"""Predicted against executed on this machine: three models under a dozen kinds of plans each, on two gloo processes.

    python tests/benchmarks/bench_local_steps.py [--models llama,gpt2,vit] [--plans 0,3,5] [--steps 6] [--save FOLDER]

The machine is profiled first, with two processes at work at once: each op of each plan at the plan's local shapes, the
collectives between the two, optimizer steps and passes over memory by size. Then every plan is simulated and run, and
a line tells the median step, after some in which the process gets its memory from the system, and its prediction, and
by how much the fuller process grew and should have. Plans are those of the data sheet's rates, so that they do not
depend on what was measured. Nothing of a step is fitted.

A virtual machine has slow seconds and minutes (the same products took 1.4 times as long, without other work on it), so
that all plans are run a second time after the last: a step is the mean of the two medians.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from autopar.cluster.local import local_cluster
from autopar.errors import InputError
from autopar.graph.capture import capture
from autopar.graph.source import capture_source, load_source
from autopar.local_check import RealModel
from autopar.plan.plan import Plan, Recompute, Schedule
from autopar.profiler.file import load_profile, save_profile
from autopar.profiler.local import profile_local
from autopar.profiler.op_cases import plan_cases
from autopar.profiler.worker import runtime_cases
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.measured_share import measured_share
from autopar.simulate.simulator import simulate

GLOBAL_BATCH = 8
WARM_UP = 4  # steps until the C library holds what a step needs: in a virtual machine a page costs 5 to 10 us
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "hidden_size": 384,
        "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 4096,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 512, "n_head": 8,
        "vocab_size": 4096, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "vit": {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 6,
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "image_size": 160, "patch_size": 16,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}
SEQ_LEN = {"llama": 128, "gpt2": 128, "vit": None}
PLANS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dp 2", {"dp_replicate": 2, "micro_batch": 4}),
    ("dp 2, 2 micro-batches", {"dp_replicate": 2, "micro_batch": 2}),
    ("zero 2", {"dp_shard": 2, "zero": 2, "micro_batch": 4}),
    ("zero 3", {"dp_shard": 2, "zero": 3, "micro_batch": 4}),
    ("zero 3, 2 micro-batches", {"dp_shard": 2, "zero": 3, "micro_batch": 2}),
    ("zero 3, recompute", {"dp_shard": 2, "zero": 3, "micro_batch": 4, "recompute": Recompute.FULL}),
    ("tp 2", {"tp": 2, "micro_batch": 4}),
    ("tp 2, selective recompute", {"tp": 2, "micro_batch": 4, "recompute": Recompute.SELECTIVE}),
    ("tp 2, sequence parallel", {"tp": 2, "micro_batch": 8, "sequence_parallel": True}),
    ("pp 2, 1f1b, 8 micro-batches", {"pp": 2, "micro_batch": 1}),
    ("pp 2, gpipe, 4 micro-batches", {"pp": 2, "micro_batch": 2, "schedule": Schedule.GPIPE}),
    ("pp 2, 1f1b, 4, recompute", {"pp": 2, "micro_batch": 2, "recompute": Recompute.FULL}),
)


def resident_bytes(what: str = "VmRSS") -> int:
    """What of this process lies in memory, now or (VmHWM) at most since the last reset."""
    found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def return_memory() -> None:
    """From now on this process gives freed memory back to the system at once.

    By calls, not by the C library's environment variables: processes are forked from a server that has started already.
    """
    libc, trim_threshold, mmap_threshold, arena_max = ctypes.CDLL("libc.so.6"), -1, -3, -8
    for option, value in ((arena_max, 1), (mmap_threshold, 65536), (trim_threshold, 0)):
        assert libc.mallopt(option, value) == 1, f"mallopt({option}, {value}) failed"


def trim() -> None:
    """Gives freed memory back to the system, so that only what lives is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def execute(factory: RealModel, plan: Plan, steps: int) -> tuple[list[float], list[float], int]:
    """Seconds of each step, of the optimizer in it, and the bytes by which this process grew at most."""
    torch.manual_seed(0)
    model, example, loss_fn = factory()
    captured = capture(model, make_batch(example, plan.micro_batch, 0), loss_fn=loss_fn)
    batch = make_batch(example, plan.global_batch, 0)
    trim()
    before = resident_bytes() - sum(param.numel() * param.element_size() for param in model.parameters())
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.AdamW(params, lr=1e-3))
    del model, captured
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    times, optimizer = [], []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.forward_backward(batch)
        middle = time.perf_counter()
        trainer.optimizer_step()
        end = time.perf_counter()
        times.append(end - start)
        optimizer.append(end - middle)
    grown = resident_bytes("VmHWM") - before
    trainer.close()
    return times, optimizer, grown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", default=",".join(str(i) for i in range(len(PLANS))))
    parser.add_argument("--steps", type=int, default=10, help="of each run; more than four")
    parser.add_argument("--runs", type=int, default=2, help="of each plan, one after those of all other plans")
    parser.add_argument("--save", type=Path, default=None, help="write profile and results to this folder")
    parser.add_argument("--profile", type=Path, default=None, help="use this profile, measure none")
    options = parser.parse_args()
    chosen = [int(word) for word in options.plans.split(",")]
    cluster = local_cluster(2, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        work = []
        for name in options.models.split(","):
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(MODELS[name]))
            graph = capture_source(load_source(str(path), seq_len=SEQ_LEN[name], dtype="float32"))
            factory = RealModel(spec=str(path), seq_len=SEQ_LEN[name], dtype="float32")
            for index in chosen:
                title, degrees = PLANS[index]
                try:
                    plan = plan_from_degrees(graph, cluster, Degrees(
                        global_batch=GLOBAL_BATCH, seq_len=graph.sequence_length, dtype="float32", **degrees
                    ))
                except InputError as error:
                    print(f"{name} {title}: left out, {error}", flush=True)
                    continue
                work.append((name, title, graph, factory, plan))
        if options.profile is not None:
            profile = load_profile(options.profile)
        else:
            cases = {case.key: case for *_, graph, _, plan in work for case in plan_cases(graph, plan, cluster)}
            profile = profile_local(
                2, budget_s=4.0, dtypes=("float32",), device="cpu", date=date.today().isoformat(),
                cases=list(cases.values()), link_budget_s=6.0,
                runtime=[case for case in runtime_cases("float32", grouped=True) if case.name not in ("adam", "sgd")],
            )
            print(f"profiled {len(profile.ops.samples)} ops and {len(profile.fits)} collectives in "
                  f"{profile.measuring_s:.0f} s on {profile.machine}; {'; '.join(profile.notes)}", flush=True)
        if options.save is not None:
            options.save.mkdir(parents=True, exist_ok=True)
            save_profile(profile, options.save / "profile.json")
        report(work, cluster, profile.apply(cluster), options)


def report(work: list[Any], plain: Any, measured: Any, options: argparse.Namespace) -> None:
    """Runs the plans and prints the table."""
    mib = 2.0**20
    step_errors, plain_errors, memory_errors, results = [], [], [], []
    print(f"{'model':6} {'plan':30} {'step ms':>8} {'each run':>10} {'predicted':>10} {'error':>7} "
          f"{'unprofiled':>11} {'optim. ms':>10} {'pred.':>6} {'grown MiB':>10} {'predicted':>10} {'error':>7} "
          f"{'kept':>6}  exact", flush=True)
    # A second pool tells the memory: in it, what is freed goes back to the system at once. Else the C library keeps
    # freed pieces ("kept"), and resident memory is not what the step needs.
    with LocalPool(2) as pool, LocalPool(2) as frugal:
        frugal.run(return_memory)
        earlier = [
            [pool.run(execute, factory, plan, options.steps) for *_, factory, plan in work]
            for _ in range(options.runs - 1)
        ]
        for number, (name, title, graph, factory, plan) in enumerate(work):
            timeline, before = simulate(graph, measured, plan), simulate(graph, plain, plan)
            share = measured_share(graph, measured, plan)
            ranks = pool.run(execute, factory, plan, options.steps)
            runs = [*(run[number] for run in earlier), ranks]
            steps = [max(median(times[WARM_UP:]) for times, _, _ in run) for run in runs]
            step = fmean(steps)
            optimizer = fmean(max(median(times[WARM_UP:]) for _, times, _ in run) for run in runs)
            kept, times = max(grown for _, _, grown in ranks), [[times for times, _, _ in run] for run in runs]
            ranks = frugal.run(execute, factory, plan, 2)
            full = max(range(len(ranks)), key=lambda rank: ranks[rank][2])
            grown = ranks[full][2]
            memory = next(group.memory for group in timeline.groups if full in group.ranks)
            errors = timeline.step_time_s / step - 1, before.step_time_s / step - 1, memory.total / grown - 1
            for found, error in zip((step_errors, plain_errors, memory_errors), errors, strict=True):
                found.append(error)
            each = " ".join(f"{own * 1e3:.0f}" for own in steps)
            print(f"{name:6} {title:30} {step * 1e3:8.0f} {each:>10} {timeline.step_time_s * 1e3:10.0f} "
                  f"{errors[0]:+7.1%} {errors[1]:+11.1%} {optimizer * 1e3:10.0f} "
                  f"{timeline.breakdown.optimizer * 1e3:6.0f} {grown / mib:10.0f} {memory.total / mib:10.0f} "
                  f"{errors[2]:+7.1%} {kept / mib:6.0f}  {share.exact if share else 0:.0%}", flush=True)
            results.append({
                "model": name, "plan": title, "step_s": step, "predicted_s": timeline.step_time_s,
                "unprofiled_s": before.step_time_s, "grown_bytes": grown, "predicted_bytes": memory.total,
                "times_s": times, "breakdown": repr(timeline.breakdown),
                "kept_bytes": kept, "memory": repr(memory),
            })
    print(f"{len(results)} plans: step time off by {fmean(map(abs, step_errors)):.1%} on average (bias "
          f"{fmean(step_errors):+.1%}; without the profile {fmean(map(abs, plain_errors)):.1%}), growth by "
          f"{fmean(map(abs, memory_errors)):.1%} (bias {fmean(memory_errors):+.1%})")
    if options.save is not None:
        (options.save / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
