"""`autopar demo`: the whole path on this machine, with a small Llama and a process for each of up to four cores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from autopar.cluster.cluster import Cluster
from autopar.cluster.local import local_cluster, num_cores
from autopar.errors import InputError
from autopar.files import write_text
from autopar.graph.capture import capture
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.local_check import RealModel, check_locally
from autopar.plan.file import save_plan
from autopar.plan.plan import Plan
from autopar.plan.text import plan_json, plan_table, seconds
from autopar.profiler.local import profile_local
from autopar.profiler.op_cases import plan_cases
from autopar.profiler.worker import UNIT, runtime_cases
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import make_batch
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate
from autopar.viz.page import page_html
from autopar.viz.picture import picture
from autopar.viz.trace import chrome_trace

FEWEST_PROCESSES, MOST_PROCESSES = 2, 4
GLOBAL_BATCH = 16
SEQ_LEN = 64
CHECKED_STEPS = 3
TRAINED_STEPS = 6
PROFILE_BUDGET_S = 4.0
OPS_BUDGET_S, LINK_BUDGET_S = 1.0, 0.5
SMALLEST_UNIT, LARGEST_PASS = 2**16, 2**22  # elements of the units, and of all passes, that are measured
MODEL: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "hidden_size": 256,
    "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}


def demo_processes(cores: int) -> int:
    """How many processes train: two, or four where each has a core to itself.

    Processes that share cores take longer than predicted: what gloo's threads do for one costs the others, and the
    caches are shared.
    """
    return MOST_PROCESSES if cores >= MOST_PROCESSES else FEWEST_PROCESSES


def run_demo(folder: Path, *, show: Callable[..., None]) -> dict[str, Any]:
    """What the demo found, as `--json` prints it; `show` is told about it in words on the way.

    Writes llama.json (a Hugging Face config), plan.json, plan.html and trace.json into `folder`.
    """
    start, processes = time.perf_counter(), demo_processes(num_cores())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError(f"{folder}: no folder can be made there ({failure.strerror}); name another with -o") from None
    model_path, plan_path, trace_path = folder / "llama.json", folder / "plan.json", folder / "trace.json"
    page_path = folder / "plan.html"
    write_text(model_path, json.dumps(MODEL, indent=1) + "\n")

    graph = capture_source(load_source(str(model_path), seq_len=SEQ_LEN, dtype="float32"))
    show(f"1. Captured a Llama with {graph.num_params / 1e6:.1f} M parameters: {len(graph.blocks)} blocks of "
         f"{len({block.cls for block in graph.blocks})} kinds, without making a weight.")
    profile = profile_local(processes, budget_s=PROFILE_BUDGET_S, dtypes=("float32",), device="cpu",
                            date=date.today().isoformat())
    cluster = profile.apply(local_cluster(processes, device="cpu"))
    device = cluster.device(0)
    show(f"2. Profiled this machine with {processes} processes at once: each computes at "
         f"{device.peak('float32') / 1e9:.1f} GFLOP/s, memory {device.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s, "
         f"link {cluster.nodes[0].link.bandwidth_bytes_per_s / 1e9:.2f} GB/s.")
    plan = find_plan(graph, cluster, PlanRequest(global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN, dtype="float32"))
    timeline = simulate(graph, cluster, plan)
    drawn = picture(graph, cluster, plan, timeline)
    save_plan(plan, plan_path, drawn)
    write_text(page_path, page_html(drawn))
    write_text(trace_path, json.dumps(chrome_trace(timeline)))
    show(f"3. Planned the training on {processes} processes, {GLOBAL_BATCH} rows of {SEQ_LEN} tokens a step:", "")
    show(plan_table(plan, timeline.report()), "")

    with LocalPool(processes) as pool:
        parity = check_locally(plan, str(model_path), dtype="float32", steps=CHECKED_STEPS, pool=pool)
        name, error = parity.worst
        show(f"4. Ran {CHECKED_STEPS} steps on {processes} processes and on one, from the same weights:")
        show(f"   loss     {_list(parity.losses)}", f"   expected {_list(parity.expected_losses)}",
             f"   largest relative error: loss {parity.loss_error:.1e}, of {len(parity.gradient_errors)} gradients "
             f"{error:.1e} ({name}); allowed {parity.tolerance:.0e}: {'equal' if parity.passed else 'NOT EQUAL'}")
        factory = RealModel(spec=str(model_path), seq_len=SEQ_LEN, dtype="float32")
        losses, times_s = pool.run(train, factory, plan, TRAINED_STEPS)[0]
    measured_s = median(times_s[1:])
    show(f"5. Trained {TRAINED_STEPS} steps with AdamW: loss {losses[0]:.4f} -> {losses[-1]:.4f}; a step took "
         f"{seconds(measured_s)}, predicted {seconds(timeline.step_time_s)} from the rates of line 2 alone.")
    told_s, num_ops = predicted_from_ops(graph, cluster, plan)
    show(f"   Predicted {seconds(told_s)} once the plan's {num_ops} ops, its communication and its optimizer were "
         "measured one by one, as `autopar profile all` does.")
    if plan.certificate is not None and parity.passed:
        bound = plan.certificate
        show(f"6. Proved: in the cost model no searched plan is under {seconds(bound.lower_bound_s)}, and this one "
             f"takes {seconds(bound.upper_bound_s)} (gap {bound.gap:.1%}); its run gives the numbers of one process.")
    show(f"Wrote {page_path} (open it in a browser), {plan_path} (autopar show {plan_path}) and {trace_path} (for "
         f"ui.perfetto.dev), in {time.perf_counter() - start:.0f} s.")
    return {
        "plan": plan_json(plan, timeline.report()),
        "parity": parity.to_dict(),
        "training": {"losses": losses, "step_times_s": times_s, "median_step_time_s": measured_s,
                     "predicted_step_time_s": timeline.step_time_s, "profiled_step_time_s": told_s},
        "files": {"model": str(model_path), "plan": str(plan_path), "page": str(page_path),
                  "trace": str(trace_path)},
        "seconds": time.perf_counter() - start,
    }


def predicted_from_ops(graph: ModelGraph, cluster: Cluster, plan: Plan) -> tuple[float, int]:
    """Seconds of a step of the plan on this machine, its ops measured, and how many ops these are."""
    cases = plan_cases(graph, plan, cluster)
    data = any(stage.mesh.dp * stage.mesh.cp > 1 for stage in plan.stages)
    sharded = data and any(stage.zero for stage in plan.stages)
    kinds = {("accumulate", False), (plan.optimizer, sharded)} | ({(UNIT, sharded)} if data else set())
    runtime = [
        case for case in runtime_cases("float32", grouped=True)
        if (case.name, case.sharded) in kinds and case.numel <= LARGEST_PASS
        and (case.name != UNIT or case.numel >= SMALLEST_UNIT)
    ]
    exchanges = any(stage.mesh.tp > 1 or stage.mesh.cp > 1 for stage in plan.stages)
    profile = profile_local(
        cluster.num_devices, budget_s=OPS_BUDGET_S, dtypes=("float32",), device="cpu", date=date.today().isoformat(),
        cases=cases, runtime=runtime, link_budget_s=LINK_BUDGET_S if exchanges else 0.0,
    )
    local = local_cluster(cluster.num_devices, device="cpu")
    return simulate(graph, profile.apply(local), plan).step_time_s, len(cases)


def train(factory: RealModel, plan: Plan, steps: int) -> tuple[list[float], list[float]]:
    """This rank's losses and step times under the plan, with AdamW. Runs under a process group."""
    torch.manual_seed(0)
    model, example, loss_fn = factory()
    captured = capture(model, make_batch(example, plan.micro_batch, 0), loss_fn=loss_fn)
    trainer = Trainer(model, plan, captured, lambda params: torch.optim.AdamW(params, lr=1e-3))
    batch = make_batch(example, plan.global_batch, 0)
    losses, times_s = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(trainer.step(batch).item())
        times_s.append(time.perf_counter() - start)
    trainer.close()
    return losses, times_s


def _list(losses: tuple[float, ...]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)
