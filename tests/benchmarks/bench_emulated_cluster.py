"""Plans on unlike hosts, for real: an emulated cluster on this machine is profiled, planned for, and trained on.

    python tests/benchmarks/bench_emulated_cluster.py [--cases 2@200,2@1000,4@200,4@1000] [--rounds 4] [--save FOLDER]

Needs root, ip and tc (iproute2); else it says so and ends. A host is a network namespace behind a link of a limited
rate (emulated_hosts.py) with one gloo process, whose device is paced (paced.py): two hosts of speeds 2:1, or four of
2:2:1:1. In each case the product's profiler measures ops on both kinds of device and messages between the hosts, the
cluster file is written with what was measured, the planner plans for it, and the plan that it finds is run beside at
least a dozen others: data parallel with even and with uneven shares, fully sharded, tensor parallel, even and uneven
pipelines under several schedules and micro-batches. All plans take turns: one round to warm up, then `--rounds`, of
which the median counts. All losses of the first step are compared. "CPU" is the share of a step in which the busiest
rank really computes: where all ranks together come near the machine's cores, or others use those, steps are longer than
the paced devices'.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
import transformers
from emulated_hosts import Hosts, why_not
from paced import BYTES_PER_S, FLOPS_PER_S, Paced
from torch import Tensor, nn

from autopar.cluster.cluster import Cluster
from autopar.cluster.file import load_cluster, save_cluster
from autopar.errors import AutoparError
from autopar.gloo import one_worker_thread
from autopar.graph.capture import Captured, capture
from autopar.graph.model_graph import ModelGraph
from autopar.plan.file import load_plan, save_plan
from autopar.plan.plan import Plan, Schedule, Stage
from autopar.plan.verify import verify_plan
from autopar.profiler import links, op_timing
from autopar.profiler import worker as profiling
from autopar.profiler.clock import Work
from autopar.profiler.collect import collect_records
from autopar.profiler.file import load_profile, save_profile
from autopar.profiler.op_cases import OpCase, model_cases
from autopar.profiler.profile import Profile, merge_profiles
from autopar.profiler.worker import Job, num_device_steps, records, runtime_cases
from autopar.runtime.engine import Trainer
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

SPEEDS = {2: (2.0, 1.0), 4: (1.0, 1.0, 0.5, 0.5)}  # four hosts are slower: their real math has two cores as well
CASES = ((2, 200), (2, 1000), (4, 200), (4, 1000))
LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, ROWS = 8, 192, 6, 512, 16, 24  # as many layers as hosts divide
OPS_ROWS = (1, 2, 3, 6, 12, 24)
LARGEST_MESSAGE = 8 * 2**20
QUEUED_S = 0.005  # of other work before what is timed
SHORTEST_S = 1e-7
LARGEST_PASS = 2**18  # elements, of what is measured of the optimizer
LINK_BUDGET_S = 3.0
WORKER_LIMIT_S = 900.0


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=0,
    ))


def make_batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def captured_model(model: nn.Module) -> Captured:
    return capture(model, make_batch(), tag_rows=True, name="gpt2")


# -- on the hosts


def profile_here(folder: Path, speed: float, *, ops: bool) -> None:
    """Measure as `autopar profile` does under torchrun, on a device of that speed; every rank keeps its own profile."""
    job = Job(
        num_processes=int(os.environ["WORLD_SIZE"]), per_node=1, num_threads=1, dtypes=("float32",),
        device_type="cpu", budget_s=2.0, link_budget_s=0.0 if ops else LINK_BUDGET_S,
        largest_message_bytes=LARGEST_MESSAGE, cases=all_cases() if ops else (),
        runtime=tuple(
            case for case in runtime_cases("float32", grouped=True)
            if case.name in ("adamw", "accumulate", "copy") and case.numel <= LARGEST_PASS
        ) if ops else (),
    )
    began, found = time.perf_counter(), []
    device = torch.device("cpu")
    paced = Paced(speed)
    with one_worker_thread():
        dist.init_process_group("gloo")
    measuring = records(job, device)
    # A paced device has no caches to fill and no slow seconds, and its work keeps no core from those of the messages.
    with (
        patch.object(op_timing, "MAX_INSTANCES", op_timing.MIN_INSTANCES), patch.object(links, "WORK_SIZE", 16),
        patch.object(op_timing, "MAX_PASSES", op_timing.MIN_PASSES + 1),
        patch.object(profiling, "clock_of", lambda device: PacedClock(paced)), patch.object(profiling, "SWEEPS", 1),
    ):
        num_paced = num_device_steps(job)  # then come messages, which no device computes
        while True:
            if len(found) < num_paced:
                paced.lead_s = 1.0 if found else 0.0  # rates, which come first, are timed by the host's clock
                with paced:
                    record = next(measuring, None)
            else:
                record = next(measuring, None)
            if record is None:
                break
            found.append(record)
    dist.barrier()
    profile = collect_records(job, [found], date.today().isoformat(), time.perf_counter() - began)
    assert profile is not None
    name = "ops" if ops else "links"
    save_profile(replace(profile, device=device_name(speed)), folder / f"{name}.{dist.get_rank()}.json")
    dist.destroy_process_group()


class PacedClock:
    """The profiler's clock for a paced device: its own, while work waits in its queue, as the one of a GPU does it."""

    engine_s = ends_s = 0.0

    def __init__(self, paced: Paced) -> None:
        self.paced = paced

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        work = prepare()
        self.paced.flush()
        began = self.paced.busy_until = time.perf_counter() + QUEUED_S
        result = work()
        taken = max(self.paced.busy_until - began, SHORTEST_S)  # views take nothing on such a device
        self.paced.flush()
        del result
        return taken, 0.0


def all_cases() -> tuple[OpCase, ...]:
    graph = captured_model(make_model()).graph
    size = int(os.environ["WORLD_SIZE"])
    nominal = nominal_cluster(SPEEDS[size], 1000.0)
    return model_cases(graph, nominal, "float32", rows=OPS_ROWS, tensor_axes=tuple(n for n in (2, 4) if n <= size))


def run_here(folder: Path, speed: float, rounds: int) -> None:
    """Train under all plans of the folder by turns; rank 0 writes seconds and losses."""
    with one_worker_thread():
        dist.init_process_group("gloo")
    model, batch = make_model(), make_batch()
    captured = captured_model(model)
    names = json.loads((folder / "plans.json").read_text())
    trainers: dict[str, Trainer] = {}
    for name in names:
        trainers[name] = Trainer(
            copy.deepcopy(model), load_plan(folder / f"{name}.json"), captured,
            lambda params: torch.optim.AdamW(params, lr=1e-3), timeout_s=120.0,
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    cpu_share: dict[str, list[float]] = {name: [] for name in names}
    paced = Paced(speed)
    for _ in range(1 + rounds):
        for name, trainer in trainers.items():
            dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            with paced:
                loss = trainer.step(batch)
                paced.flush()
            taken = time.perf_counter() - began
            used = torch.tensor([taken, (time.process_time() - cpu) / taken], dtype=torch.float64)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            seconds[name].append(float(used[0]))
            cpu_share[name].append(float(used[1]))
            losses[name].append(float(loss))
    if dist.get_rank() == 0:
        found = {"seconds": seconds, "losses": losses, "cpu_share": cpu_share}
        (folder / "results.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    for trainer in trainers.values():
        trainer.close()
    dist.destroy_process_group()


# -- the cluster and its plans


def device_name(speed: float) -> str:
    """Named as processes on CPUs are: gloo's collectives block, and nothing computes beside them."""
    return f"CPU-paced-{speed:g}"


def cluster_yaml(speeds: Sequence[float], megabits: float) -> str:
    """The cluster as a user would write it down; what is measured comes on top."""
    lines = ["version: 1", f"name: {len(speeds)} hosts at {megabits:g} Mb/s", "nodes:"]
    for speed in speeds:
        lines += [
            "  - devices: 1",
            f"    device: {{name: {device_name(speed)}, memory_gib: 2, "
            f"memory_bandwidth_gb_per_s: {BYTES_PER_S * speed / 1e9:g}, "
            f"peak_tflops: {{float32: {FLOPS_PER_S * speed / 1e12:g}}}}}",
            "    link: {name: memory, bandwidth_gb_per_s: 1, latency_us: 50}",
            f"    network: {{gbps: {megabits / 1e3:g}, latency_us: 100}}",
        ]
    return "\n".join(lines) + "\n"


def nominal_cluster(speeds: Sequence[float], megabits: float) -> Cluster:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(cluster_yaml(speeds, megabits))
        return load_cluster(path)


def measured_cluster(folder: Path, speeds: Sequence[float], megabits: float) -> tuple[Cluster, list[Profile]]:
    """The cluster of the file with what was measured of each kind of device and of the links."""
    path = folder / "cluster.yaml"
    path.write_text(cluster_yaml(speeds, megabits))
    cluster, profiles = load_cluster(path), []
    for speed in dict.fromkeys(speeds):
        rank = list(speeds).index(speed)
        ops = load_profile(folder.parent / f"ops.{rank}.json")
        messages = load_profile(folder / f"links.{rank}.json")
        fits = load_profile(folder / "links.0.json").fits  # the slowest rank's times, the same on all
        profile = merge_profiles(messages, replace(ops, fits=fits))
        profiles.append(profile)
        cluster = profile.apply(cluster)
    save_cluster(cluster, folder / "cluster.json")
    return cluster, profiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A plan to run; `uniform`: it treats all devices alike."""

    name: str
    plan: Plan
    uniform: bool


def other_plans(graph: ModelGraph, cluster: Cluster, speeds: Sequence[float]) -> list[Named]:
    """What an expert would write by hand, for devices that are alike and for these."""
    n = len(speeds)
    found: list[Named] = []

    def add(name: str, degrees: dict[str, Any], *, uniform: bool = True, layers: Sequence[int] = (),
            rows: Sequence[int] = ()) -> None:
        own = {"micro_batch": ROWS // n, **degrees}
        plan = plan_from_degrees(graph, cluster, Degrees(
            global_batch=ROWS, seq_len=LENGTH, dtype="float32", **own))
        if layers:
            plan = with_layers(plan, layers)
        if rows:
            stage = replace(plan.stages[0], rows=tuple(rows))
            plan = replace(plan, micro_batch=max(rows), stages=(stage,))
        verify_plan(plan, graph, cluster)
        found.append(Named(name=name, plan=plan, uniform=uniform))

    shares = [int(ROWS * speed / sum(speeds)) for speed in speeds]
    add("ddp", dict(dp_replicate=n))
    add("ddp, rows by speed", dict(dp_replicate=n), uniform=False, rows=shares)
    add("fsdp", dict(dp_shard=n, zero=3))
    add("fsdp, rows by speed", dict(dp_shard=n, zero=3), uniform=False, rows=shares)
    add("tp", dict(tp=n, micro_batch=ROWS))
    layers = {2: (5, 3), 4: (3, 3, 1, 1)}[n]
    add("pipeline 1f1b x8", dict(pp=n, micro_batch=3))
    add("pipeline gpipe x4", dict(pp=n, micro_batch=6, schedule=Schedule.GPIPE))
    add("pipeline zb x8", dict(pp=n, micro_batch=3, schedule=Schedule.ZERO_BUBBLE))
    if n == 2:
        add("pipeline interleaved x8", dict(pp=n, micro_batch=3, virtual_stages=2))
    else:
        add("pipeline dp 2, 1f1b x6", dict(pp=2, dp_replicate=2, micro_batch=2))
        add("pipeline dp 2, 5+3 1f1b x6", dict(pp=2, dp_replicate=2, micro_batch=2), uniform=False, layers=(5, 3))
        add("tp 2, dp 2", dict(tp=2, dp_replicate=2, micro_batch=ROWS // 2))
    words = "+".join(map(str, layers))
    add(f"pipeline {words} 1f1b x4", dict(pp=n, micro_batch=6), uniform=False, layers=layers)
    add(f"pipeline {words} 1f1b x8", dict(pp=n, micro_batch=3), uniform=False, layers=layers)
    add(f"pipeline {words} zb x12", dict(pp=n, micro_batch=2, schedule=Schedule.ZERO_BUBBLE), uniform=False,
        layers=layers)
    return found


def with_layers(plan: Plan, layers: Sequence[int]) -> Plan:
    """The plan with so many layers on each stage: what comes before them is on the first, what comes after on the last.
    """
    stages: list[Stage] = []
    first = 0
    for index, stage in enumerate(plan.stages):
        last = first + layers[index] + (index == 0)
        last = len(plan.blocks) if index == len(plan.stages) - 1 else last
        stages.append(replace(stage, first=first, last=last))
        first = last
    return replace(plan, stages=tuple(stages))


def plan_words(plan: Plan) -> str:
    """A plan in a few words."""
    parts = []
    for stage in plan.stages:
        first, last = plan.layers(stage)
        mesh = stage.mesh
        how = [f"dp {'+'.join(map(str, stage.rows)) if stage.rows else mesh.dp}"] if mesh.dp > 1 else []
        how += [f"tp {mesh.tp}"] if mesh.tp > 1 else []
        how += [f"zero {stage.zero}"] if stage.zero else []
        devices = ",".join(map(str, stage.devices))
        parts.append(f"{last - first} layers on {devices}{' (' + ', '.join(how) + ')' if how else ''}")
    order = "an order of its own" if plan.actions else str(plan.schedule)
    return f"{' | '.join(parts)}; {order} x{plan.num_micro_batches}"


# -- a case


def profile_ops(hosts: Hosts, folder: Path) -> None:
    began = time.perf_counter()
    hosts.limit(1000)
    hosts.run(Path(__file__), ["--worker", "ops", "--folder", str(folder)], WORKER_LIMIT_S, folder / "ops.log")
    say(f"{hosts.count} hosts: profiled ops in {time.perf_counter() - began:.0f} s")


def run_case(hosts: Hosts, megabits: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Profile the links, plan, run, print the table; what was measured, for a file. Without rounds nothing is run."""
    speeds = SPEEDS[hosts.count]
    hosts.limit(megabits)
    began = time.perf_counter()
    if not (folder / "links.0.json").exists():
        hosts.run(Path(__file__), ["--worker", "links", "--folder", str(folder)], WORKER_LIMIT_S, folder / "links.log")
    cluster, profiles = measured_cluster(folder, speeds, megabits)
    fits = cluster.nodes[0].network.fits
    ratio = ":".join(f"{speed / min(speeds):g}" for speed in speeds)
    say(f"\n{hosts.count} hosts of speeds {ratio} at {megabits:g} Mb/s: "
        f"{len(profiles[0].ops.samples)} ops, {len(fits)} collectives (links in {time.perf_counter() - began:.0f} s): "
        + ", ".join(f"{fit.collective} of {fit.num_ranks} {fit.bytes_per_s * 8 / 1e6:.0f} Mb/s" for fit in fits))
    graph = captured_model(make_model()).graph
    began = time.perf_counter()
    request = PlanRequest(global_batch=ROWS, seq_len=LENGTH, dtype="float32", param_dtype="float32", offload=False)
    best = find_plan(graph, cluster, request)
    say(f"planned in {time.perf_counter() - began:.1f} s: {plan_words(best)}")
    plans = [Named(name="found", plan=best, uniform=False), *other_plans(graph, cluster, speeds)]
    if not rounds:
        return {}
    for item in plans:
        save_plan(item.plan, folder / f"{item.name}.json")
    (folder / "plans.json").write_text(json.dumps([item.name for item in plans]))
    hosts.run(
        Path(__file__), ["--worker", "run", "--folder", str(folder), "--rounds", str(rounds)], WORKER_LIMIT_S,
        folder / "run.log",
    )
    return report(graph, cluster, plans, json.loads((folder / "results.json").read_text()), megabits)


def report(
    graph: ModelGraph, cluster: Cluster, plans: Sequence[Named], results: dict[str, Any], megabits: float
) -> dict[str, Any]:
    """Prints a case's table; the figures of it."""
    rows = []
    first = results["losses"]["found"][0]
    for item in plans:
        seen = results["seconds"][item.name][1:]
        predicted = simulate(graph, cluster, item.plan, detail=False).step_time_s
        spread = (max(seen) - min(seen)) / median(seen)
        rows.append((item, predicted, median(seen), spread, median(results["cpu_share"][item.name][1:]),
                     abs(results["losses"][item.name][0] / first - 1)))
    say(f"{'plan':28} {'predicted ms':>12} {'measured ms':>12} {'error':>7} {'spread':>7} {'CPU':>5} "
        f"{'loss differs':>13}")
    for item, predicted, measured, spread, cpu, differs in rows:
        say(f"{item.name:28} {predicted * 1e3:12.0f} {measured * 1e3:12.0f} {predicted / measured - 1:+7.1%} "
            f"{spread:7.1%} {cpu:5.0%} {differs:13.1e}")
    found_s = rows[0][2]
    best = min(rows, key=lambda row: row[2])
    uniform = min((row for row in rows if row[0].uniform), key=lambda row: row[2])
    figures = {
        "hosts": len(cluster.nodes), "megabits_per_s": megabits, "num_plans": len(rows),
        "found": plan_words(plans[0].plan),
        "found_over_best": found_s / best[2], "best": best[0].name, "uniform_over_found": uniform[2] / found_s,
        "uniform": uniform[0].name, "error": rows[0][1] / found_s - 1,
        "largest_loss_difference": max(row[5] for row in rows),
        "plans": {item.name: {"predicted_s": predicted, "measured_s": measured, "spread": spread, "cpu_share": cpu}
                  for item, predicted, measured, spread, cpu, _ in rows},
    }
    say(f"found: {figures['found_over_best']:.3f} of the best of {len(rows)} executed ({best[0].name}; at most 1.05); "
        f"{figures['uniform_over_found']:.2f}x over the best uniform plan ({uniform[0].name}; at least 1.2); predicted "
        f"{figures['error']:+.1%} (at most 10%)")
    return figures


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(f"{count}@{rate}" for count, rate in CASES), help="HOSTS@Mb/s,...")
    parser.add_argument("--rounds", type=int, default=4, help="that count; 0: profile and plan alone")
    parser.add_argument("--save", type=Path, default=None,
                        help="keep profiles, plans and results in this folder; profiles that are there are used")
    parser.add_argument("--worker", choices=("ops", "links", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        speed = SPEEDS[int(os.environ["WORLD_SIZE"])][int(os.environ["RANK"])]
        torch.set_num_threads(1)
        if options.worker == "run":
            run_here(options.folder, speed, options.rounds)
        else:
            profile_here(options.folder, speed, ops=options.worker == "ops")
        return
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    cases = [tuple(map(int, case.split("@"))) for case in options.cases.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        base = options.save or Path(temporary)
        found = []
        try:
            for count in dict.fromkeys(count for count, _ in cases):
                with Hosts(count) as hosts:
                    folder = base / str(count)
                    folder.mkdir(parents=True, exist_ok=True)
                    if not (folder / "ops.0.json").exists():
                        profile_ops(hosts, folder)
                    for rate in (rate for own, rate in cases if own == count):
                        own = folder / f"{rate}"
                        own.mkdir(exist_ok=True)
                        found.append(run_case(hosts, rate, own, options.rounds))
        except (RuntimeError, AutoparError) as error:
            raise SystemExit(f"failed: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit("interrupted; no host is left") from None
        if options.save is not None and options.rounds:
            (base / "figures.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
