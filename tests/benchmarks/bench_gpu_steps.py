"""Predicted against executed on one GPU: steps and memory of emitted programs, beside plain PyTorch.

    python tests/benchmarks/bench_gpu_steps.py [NAME ...] [--profile FILE] [--steps 12] [--save FILE] [--kernels FOLDER]

Each row trains one model with AdamW on one device, as `autopar.parallelize` runs its plan, and then as one writes it
by hand: bfloat16 by autocast where parameters rest in float32, else the model in one dtype; compiled as a whole where
the plan is. A row tells the median step and its prediction, the allocator's peak and its prediction, and the ratio of
the two sides' steps, which take turns in pairs of rounds. With `--profile`, predictions are also made from measured
ops. Runs nothing on a CPU unless `--device cpu` is given, which tries the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import autopar
from autopar.cluster.cluster import Cluster
from autopar.cluster.local import local_cluster
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.plan import Plan, Recompute
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.simulator import simulate
from autopar.simulate.timeline import Timeline

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2-medium": ({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 24, "n_embd": 1024, "n_head": 16,
        "vocab_size": 50257, "n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "use_cache": False,
    }, 1024),
    "llama-1b": ({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 22, "hidden_size": 2048,
        "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "use_cache": False,
    }, 2048),
    "tiny": ({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "use_cache": False,
    }, 32),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. `mixed`: parameters rest in float32."""

    model: str
    rows: int
    compile: bool = False
    recompute: bool = False
    mixed: bool = True

    @property
    def name(self) -> str:
        words = [self.model, f"mb{self.rows}", *(word for word in ("compile", "recompute") if getattr(self, word))]
        return "-".join([*words, *([] if self.mixed else ["bf16"])])


CASES = {case.name: case for case in (
    Case(model="gpt2-medium", rows=1),
    Case(model="gpt2-medium", rows=4),
    Case(model="gpt2-medium", rows=16),
    Case(model="gpt2-medium", rows=4, compile=True),
    Case(model="gpt2-medium", rows=16, recompute=True),
    Case(model="llama-1b", rows=1),
    Case(model="llama-1b", rows=4),
    Case(model="llama-1b", rows=4, compile=True),
    Case(model="llama-1b", rows=16, recompute=True),
    Case(model="gpt2-medium", rows=4, mixed=False),
    Case(model="llama-1b", rows=4, mixed=False),
    Case(model="llama-1b", rows=4, mixed=False, compile=True),
    Case(model="gpt2-medium", rows=16, compile=True),
    Case(model="llama-1b", rows=1, compile=True),
)}
TINY = {case.name: case for case in (
    Case(model="tiny", rows=2), Case(model="tiny", rows=2, recompute=True), Case(model="tiny", rows=2, mixed=False),
    Case(model="tiny", rows=2, compile=True),
)}


def make_model(case: Case, device: torch.device) -> nn.Module:
    """The model with random weights, made on the device."""
    settings = {name: value for name, value in MODELS[case.model][0].items() if name != "architectures"}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with device:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if case.mixed else torch.bfloat16, attn_implementation="sdpa"
        )
    return model.train()


def make_batch(case: Case, device: torch.device) -> dict[str, Tensor]:
    settings, length = MODELS[case.model]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, settings["vocab_size"], (case.rows, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def graph_of(case: Case, folder: Path) -> ModelGraph:
    settings, length = MODELS[case.model]
    path = folder / f"{case.model}.json"
    path.write_text(json.dumps(settings))
    return capture_source(load_source(str(path), seq_len=length, dtype="bfloat16"))


def plan_of(case: Case, graph: ModelGraph, cluster: Cluster) -> Plan:
    return plan_from_degrees(graph, cluster, Degrees(
        global_batch=case.rows, micro_batch=case.rows, seq_len=graph.sequence_length, dtype="bfloat16",
        param_dtype="float32" if case.mixed else "bfloat16", compile=case.compile,
        recompute=Recompute.FULL if case.recompute else Recompute.NONE,
    ))


def adamw(params: Any) -> torch.optim.Optimizer:
    on_gpu = torch.cuda.is_available()
    return torch.optim.AdamW(params, lr=1e-4, fused=True if on_gpu else None)


# -- the two sides: each gives a step, and a function that ends it


def emitted(case: Case, plan: Plan, device: torch.device) -> tuple[Callable[[], Any], Callable[[], None]]:
    model, batch = make_model(case, device), make_batch(case, device)
    trainer = autopar.parallelize(model, batch, adamw, plan=plan, device=device, dtype="bfloat16")
    return partial(trainer.step, batch), trainer.close


def by_hand(case: Case, device: torch.device) -> tuple[Callable[[], Any], Callable[[], None]]:
    model, batch = make_model(case, device), make_batch(case, device)
    optimizer = adamw(model.parameters())
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    call: Any = torch.compile(model) if case.compile else model

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if case.mixed else contextlib.nullcontext():
            loss: Tensor = call(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step, lambda: None


# -- measuring


class Meter:
    """Times steps on a device, and reads its allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def times(self, step: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each of `count` steps, which follow one another without waiting for the device."""
        if self.device.type != "cuda":
            taken = []
            for _ in range(count):
                began = time.perf_counter()
                step()
                taken.append(time.perf_counter() - began)
            return taken
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        self.wait()
        return [one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)]


def run(case: Case, plan: Plan, device: torch.device, steps: int, kernels: Path | None) -> dict[str, Any]:
    """What both sides took, one after the other: two sets of steps each, of which the faster median counts."""
    meter = Meter(device)
    found: dict[str, Any] = {}
    for side in ("emitted", "by_hand"):
        meter.reset_peak()
        step: Callable[[], Any] | None = None
        try:
            step, close = emitted(case, plan, device) if side == "emitted" else by_hand(case, device)
            began = time.perf_counter()
            loss = [float(step().detach()) for _ in range(3)]
            meter.wait()
            found[side] = {"first_steps_s": time.perf_counter() - began, "losses": loss}
            meter.reset_peak()
            meter.times(step, 2)
            meter.reset_peak()
            times = [meter.times(step, steps) for _ in range(2)]
            allocated, reserved = meter.peaks()
            found[side] |= {
                "step_s": min(map(statistics.median, times)), "times_s": times, "allocated_bytes": allocated,
                "reserved_bytes": reserved,
            }
            if kernels is not None:
                _save_kernels(step, kernels / f"{case.name}-{side}.txt")
            close()
        except torch.OutOfMemoryError as error:
            found[side] = {"failure": f"out of memory: {str(error)[:200]}"}
        except Exception as error:  # a row that fails is told, and the others run
            found[side] = {"failure": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()}
        step = None
        torch._dynamo.reset()
    return found


def _save_kernels(step: Callable[[], Any], path: Path) -> None:
    """The kernels of three steps, by device time, and the ops, by the host's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = recorded.key_averages()
    path.write_text("\n".join(
        averages.table(sort_by=key, row_limit=45, max_name_column_width=90)
        for key in ("self_cuda_time_total", "self_cpu_time_total")
    ))


# -- predicting and printing


def predicted(timeline: Timeline) -> dict[str, Any]:
    memory = timeline.groups[0].memory
    return {"step_s": timeline.step_time_s, "allocated_bytes": memory.total, "reserved_bytes": memory.reserved,
            "memory": asdict(memory), "breakdown_s": asdict(timeline.breakdown)}


def line(case: Case, found: dict[str, Any]) -> str:
    own, hand, before = found["emitted"], found["by_hand"], found["predicted"]
    if "failure" in own:
        return f"{case.name:30} {own['failure']}"
    after = found.get("from_profile")
    gib = 2.0**30
    text = (f"{case.name:30} {own['step_s'] * 1e3:8.1f} {before['step_s'] * 1e3:8.1f} "
            f"{before['step_s'] / own['step_s'] - 1:+7.1%} "
            + (f"{after['step_s'] / own['step_s'] - 1:+7.1%}" if after else f"{'':>7}")
            + f" {own['allocated_bytes'] / gib:8.2f} {before['allocated_bytes'] / gib:8.2f} ")
    if own["allocated_bytes"]:
        text += f"{before['allocated_bytes'] / own['allocated_bytes'] - 1:+7.1%} "
    if "failure" in hand:
        return f"{text}  {hand['failure']}"
    return (f"{text} {hand['step_s'] * 1e3:8.1f} {own['step_s'] / hand['step_s']:6.3f} "
            f"{hand['allocated_bytes'] / gib:8.2f}")




def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all if left out")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many seconds")
    parser.add_argument("--profile", type=Path, default=None)
    parser.add_argument("--save", type=Path, default=None, help="write all figures to this file, row by row")
    parser.add_argument("--kernels", type=Path, default=None, help="write each side's kernels to this folder")
    options = parser.parse_args()
    cases = CASES if options.device == "cuda" else TINY
    if unknown := sorted({*options.names} - cases.keys()):
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(cases)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    began = time.perf_counter()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    cluster = local_cluster(1, device=options.device)
    measured = None
    if options.profile is not None:
        from autopar.profiler.file import load_profile

        measured = load_profile(options.profile).apply(cluster)
    rows: list[dict[str, Any]] = []
    print(f"{cluster.device(0).name}, torch {torch.__version__}\n"
          f"{'row':30} {'step ms':>8} {'predict.':>8} {'error':>7} {'profile':>7} {'peak GiB':>8} {'predict.':>8} "
          f"{'error':>7} {'by hand':>8} {'ratio':>6} {'GiB':>8}", flush=True)
    graphs: dict[str, ModelGraph] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or cases:
            if time.perf_counter() - began > options.seconds:
                break
            case = cases[name]
            if case.model not in graphs:
                graphs[case.model] = graph_of(case, Path(folder))
            graph = graphs[case.model]
            plan = plan_of(case, graph, cluster)
            found = {"row": name, "device": cluster.device(0).name, "torch": torch.__version__}
            found["predicted"] = predicted(simulate(graph, cluster, plan))
            if measured is not None:
                found["from_profile"] = predicted(simulate(graph, measured, plan))
            found |= run(case, plan, device, options.steps, options.kernels)
            rows.append(found)
            print(line(case, found), flush=True)
            if options.save is not None:
                options.save.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
